"""ctp eval"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from ctp_cli.commands.common import Device, Force, Json, Quiet, newest_or, reports_errors, shows_defaults
from ctp_cli.commands.compress import EMBEDDED
from ctp_cli.console import Console
from ctp_cli.recipe import EvalSection, build


@reports_errors
@shows_defaults(EvalSection)
def evaluate(
    models: Annotated[
        list[str] | None, typer.Argument(help="Checkpoints; the newest one here by default.", metavar="MODEL")
    ] = None,
    prompt: Annotated[
        list[Path] | None,
        typer.Option(help="Prompt file; every model is also scored behind it. May be repeated."),
    ] = None,
    ppl: Annotated[
        str | None,
        typer.Option(
            help=f"Texts, comma separated: pydoc:test (of {EMBEDDED} the default), c4 (of others), wikitext2, ptb, "
            "[LABEL=]FILE[:COLUMN]."
        ),
    ] = None,
    seqlen: Annotated[int | None, typer.Option(help="Tokens per window.")] = None,
    windows: Annotated[int | None, typer.Option(help="At most so many windows of each text.")] = None,
    bos: Annotated[
        bool | None,
        typer.Option(
            "--bos/--no-bos", help="The tokenizer's BOS before every window, not scored: for Gemma and others."
        ),
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Windows at a time.")] = None,
    convention: Annotated[
        str | None, typer.Option(help="true, or paper (counts prompt positions, for comparison only).")
    ] = None,
    packed: Annotated[
        bool | None, typer.Option("--packed/--no-packed", help="Keep quantized weights packed in memory.")
    ] = None,
    max_ppl: Annotated[float | None, typer.Option(help="Exit with 4 if any perplexity is above.")] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", help="Folder to make for the scores; by default none.", rich_help_panel="Output"
        ),
    ] = None,
    force: Force = False,
    device: Device = "auto",
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Perplexity of models, with and without prompts, side by side.

    \b
    ctp eval smollm2-135m smollm2-135m-s50-w4 --prompt my-prompt/
    ctp eval path/to/model --ppl wikitext2,ptb
    ctp eval path/to/model --ppl news=news.jsonl:body --seqlen 512
    """
    console = Console(quiet=quiet, json_mode=json)
    section = build(
        EvalSection,
        {
            "ppl": tuple(part.strip() for part in ppl.split(",") if part.strip()) if ppl is not None else None,
            "seqlen": seqlen,
            "windows": windows,
            "bos": bos,
            "batch_size": batch_size,
            "convention": convention,
            "packed": packed,
            "max_ppl": max_ppl,
        },
    )
    from ctp_cli.models.devices import resolve_device
    from ctp_cli.models.resolve import resolve_model
    from ctp_cli.stages import eval as stage
    from ctp_cli.stages.compress import KIND as COMPRESSED

    progress = console.progress()
    names = models or [newest_or((COMPRESSED, "stitched-checkpoint"), EMBEDDED, console)]
    targets: list[stage.Target] = []
    for name in names:
        resolved = resolve_model(name, progress)
        targets.append(stage.Target(_unused(resolved.name, targets), resolved))
        for path in prompt or []:
            label = f"{resolved.name} + {_prompt_name(path)}"
            targets.append(stage.Target(_unused(label, targets), resolved, path))
    report = stage.evaluate(
        section, targets=targets, output=output, device=resolve_device(device), force=force, progress=progress
    )
    show(console, report)
    console.document("eval", stage.document(report))
    if output is not None:
        console.result(str(output))
    stage.check_gate(section, report)


def _prompt_name(path: Path) -> str:
    """Of a prompt's folder, which may be given by the file in it; a file of another name stands for itself."""
    whole = path.resolve()
    if whole.is_dir():
        return whole.name
    return whole.parent.name if path.parent.name else path.stem


def _unused(label: str, targets: Sequence[Any]) -> str:
    taken = {target.label for target in targets}
    numbered = (f"{label} ({n})" if n > 1 else label for n in range(1, len(taken) + 2))
    return next(name for name in numbered if name not in taken)


def show(console: Console, report: Any) -> None:
    """The table of an EvalReport: a row per target, a column per text."""
    rows = []
    for label in report.labels():
        cells = [s for s in report.scores if s.label == label]
        rows.append([label, *(f"{s.perplexity:.2f} ± {s.standard_error:.2f}" for s in cells)])
        if any(s.against_first for s in cells):
            rows.append(["  against the first", *(s.against_first or "" for s in cells)])
    first = report.scores[0].details
    counts = [f"{s.text}: {s.details['windows']}" for s in report.scores if s.label == report.labels()[0]]
    behind = ", each behind a BOS" if first["bos"] else ""
    caption = f"perplexity ± standard error over windows of {first['seqlen']} tokens{behind} ({', '.join(counts)})"
    if report.convention == "paper":
        caption += "; convention of the publication: prompt positions are counted, so prompted figures are too low"
    console.table("perplexity", ("", *report.texts()), rows, caption=caption)
    for line in report.warnings:
        console.warning(line)
