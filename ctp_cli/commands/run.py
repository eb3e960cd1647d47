"""ctp run"""

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from ctp_cli.commands.common import Device, DryRun, Json, Quiet, note_without_effect, reports_errors
from ctp_cli.console import Console, time_text
from ctp_cli.files import read_json
from ctp_cli.recipe import load


@reports_errors
def run(
    recipe: Annotated[Path, typer.Argument(help="A recipe, e.g. recipes/quickstart.yaml.")],
    set: Annotated[
        list[str] | None,
        typer.Option("--set", help="section.key=value; may be repeated.", metavar="KEY=VALUE"),
    ] = None,
    redo: Annotated[
        list[str] | None,
        typer.Option(
            help="Make this stage again, and those that use what it makes: compress, learn, ...; may be repeated.",
            metavar="STAGE",
        ),
    ] = None,
    dry_run: DryRun = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace what was made with other settings.", rich_help_panel="Output")
    ] = False,
    device: Device = "auto",
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Run a recipe: every stage it names, skipping what is already made.

    \b
    ctp run recipes/quickstart.yaml
    ctp run recipes/quickstart.yaml --set compress.bits=3 --set output=runs/w3
    ctp run recipes/quickstart.yaml --redo learn
    """
    console = Console(quiet=quiet, json_mode=json)
    resolved = load(recipe, set or ())
    note_without_effect(console, resolved.compress, resolved.learn)
    from ctp_cli import runner
    from ctp_cli.models.devices import resolve_device

    started = time.monotonic()
    progress = console.progress()
    plan = runner.plan(
        resolved,
        device=resolve_device(resolved.device if device == "auto" else device),
        force=force,
        redo=redo or (),
        progress=progress,
    )
    if dry_run:
        rows = [(step.section, "already made" if step.made else "to be made", str(step.output)) for step in plan.steps]
        console.table(f"{recipe}, on {plan.model.name} ({plan.model.path})", ("stage", "", "output"), rows)
        console.document("run-plan", {"model": str(plan.model.path), "steps": [list(row) for row in rows]})
        return
    done = runner.run(plan, progress=progress)
    _summary(console, plan)
    seconds = time.monotonic() - started
    rows = [(step.name, str(step.output), "already made" if already else "made now") for step, already in done]
    console.document("run", {"seconds": seconds, "steps": [list(row) for row in rows], "scores": _scores(plan)})
    for name in ("report/recovery.png", "prompt/learning.png", "benchmark/latency.png"):
        if plan.output(name).is_file():
            rows.append((name.split("/")[1], str(plan.output(name)), ""))
    width = max(len(name) for name, _, _ in rows)
    for name, path, how in rows:
        console.result(f"{name:{width}}  {path}" + (f"  ({how})" if how else ""))
    console.note(f"{time_text(seconds)} in all")
    runner.check_gates(plan)


def _scores(plan: Any) -> list[dict[str, Any]]:
    path = plan.output("evaluation") / "scores.json"
    scores: list[dict[str, Any]] = read_json(path)["scores"] if path.is_file() else []
    return scores


def _summary(console: Console, plan: Any) -> None:
    """One table over everything: size, perplexity, share of the gap won back, latency."""
    scores = _scores(plan)
    if not scores:
        return
    from ctp_cli.benchmark.figures import share_won_back

    sizes = {
        "full": plan.model.path,
        "compressed": plan.output("compressed"),
        "compressed + prompt": plan.output("compressed"),
    }
    texts = list(dict.fromkeys(score["text"] for score in scores))
    cell = {(score["label"], score["text"]): score for score in scores}
    rows = []
    for label in dict.fromkeys(score["label"] for score in scores):
        row = [label, _weights(sizes.get(label))]
        for text in texts:
            score = cell[label, text]
            row.append(f"{score['perplexity']:.2f} ± {score['standard_error']:.2f}")
            won = None
            if label == "compressed + prompt":
                values = [cell[key, text]["perplexity"] for key in ("full", "compressed", label)]
                won = share_won_back(*values)
            row.append("" if won is None else f"{won:.0%}")
        rows.append(row)
    columns = ["", "weights"]
    for text in texts:
        columns += [f"perplexity, {text}", "won back"]
    console.table(
        f"{plan.model.name}: what compression cost and the prompt won back",
        columns,
        rows,
        caption="\n".join(
            [
                "perplexity ± standard error over windows; won back: share of the gap between compressed and full",
                *_latency_lines(plan.output("benchmark") / "latency.json"),
            ]
        ),
    )


def _latency_lines(path: Path) -> list[str]:
    """What the longest prompt costs at run time, in words."""
    if not path.is_file():
        return []
    measured = read_json(path)
    longest = max(row["prompt_tokens"] for row in measured["rows"])
    return [
        f"a {longest}-token prompt, {'its prefix reused' if row['prefix_reused'] else 'computed each time'}: "
        f"time to first token after {measured['seqlen']} tokens of text × {row['first_token_ratio']['median']:.2f}, "
        f"time per further token × {row['per_token_ratio']['median']:.2f}"
        for row in measured["rows"]
        if row["prompt_tokens"] == longest and longest
    ]


def _weights(folder: Path | None) -> str:
    from ctp_cli.console import size_text

    return "" if folder is None else size_text(sum(f.stat().st_size for f in folder.glob("*.safetensors")))
