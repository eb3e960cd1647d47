"""ctp bench"""

from pathlib import Path
from typing import Annotated

import typer

from ctp_cli.commands.common import Device, Force, Json, Output, Quiet, newest_or, reports_errors, shows_defaults
from ctp_cli.commands.compress import EMBEDDED
from ctp_cli.console import Console
from ctp_cli.errors import RecipeError
from ctp_cli.recipe import BenchSection, build


@reports_errors
@shows_defaults(BenchSection)
def bench(
    model: Annotated[
        str | None, typer.Argument(help="Checkpoint; the newest one here by default, with --kernels usual shapes.")
    ] = None,
    prompt_len: Annotated[str | None, typer.Option(help="Prompt lengths, comma separated.")] = None,
    prompt: Annotated[Path | None, typer.Option(help="Prompt file; random rows otherwise.")] = None,
    seqlen: Annotated[int | None, typer.Option(help="Text tokens before the first generated one.")] = None,
    new_tokens: Annotated[int | None, typer.Option(help="Tokens generated to time one.")] = None,
    rounds: Annotated[int | None, typer.Option(help="Measurements of each; 6 or more give intervals.")] = None,
    packed: Annotated[
        bool | None, typer.Option("--packed/--no-packed", help="Keep quantized weights packed in memory.")
    ] = None,
    max_latency_ms: Annotated[float | None, typer.Option(help="Exit with 4 if a token takes longer.")] = None,
    kernels: Annotated[
        bool, typer.Option("--kernels", help="Time products with packed layers instead.", rich_help_panel="Kernels")
    ] = False,
    tune: Annotated[
        bool, typer.Option("--tune", help="Find each layer's fastest tiles first.", rich_help_panel="Kernels")
    ] = False,
    explain: Annotated[
        bool, typer.Option("--explain", help="Only say which way products take.", rich_help_panel="Kernels")
    ] = False,
    output: Output = None,
    force: Force = False,
    device: Device = "auto",
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Time to first token and per token against prompt length, with and without prefix reuse.

    \b
    ctp bench --prompt-len 100
    ctp bench path/to/model --prompt-len 0,25,50,75,100 --rounds 9
    ctp bench --kernels
    """
    console = Console(quiet=quiet, json_mode=json)
    section = build(
        BenchSection,
        {
            "prompt_len": _lengths(prompt_len),
            "seqlen": seqlen,
            "new_tokens": new_tokens,
            "rounds": rounds,
            "packed": packed,
            "max_latency_ms": max_latency_ms,
        },
    )
    if kernels:
        given = {
            "prompt-len": prompt_len,
            "prompt": prompt,
            "seqlen": seqlen,
            "new-tokens": new_tokens,
            "packed": packed,
        }
        _refuse({**given, "max-latency-ms": max_latency_ms}, "not with --kernels, which times layers and no model")
        if explain:
            _refuse(
                {"rounds": rounds, "output": output, "tune": tune or None}, "not with --explain, which times nothing"
            )
        _kernels(console, section, model, output=output, force=force, device=device, tune=tune, explain=explain)
        return
    _refuse({"tune": tune or None, "explain": explain or None}, "only with --kernels")
    from ctp_cli.benchmark import latency
    from ctp_cli.models.resolve import resolve_model
    from ctp_cli.stages import bench as stage
    from ctp_cli.stages.compress import KIND as COMPRESSED

    progress = console.progress()
    resolved = resolve_model(model or newest_or((COMPRESSED,), EMBEDDED, console), progress)
    report = stage.bench(
        section,
        model_path=resolved.path,
        prompt_path=prompt,
        output=output or Path(f"{resolved.name}-bench"),
        device=device,
        force=force,
        progress=progress,
    )
    console.table(
        f"latency of {resolved.name}",
        latency.COLUMNS,
        latency.table_rows(report.latency),
        latency.caption(report.latency),
    )
    console.document("bench", report.document)
    console.result(str(report.output / "latency.png"))
    stage.check_gate(section, report)


def _kernels(
    console: Console,
    section: BenchSection,
    model: str | None,
    *,
    output: Path | None,
    force: bool,
    device: str,
    tune: bool,
    explain: bool,
) -> None:
    from ctp_cli.benchmark import kernels
    from ctp_cli.models.resolve import resolve_model
    from ctp_cli.stages import kernels as stage

    progress = console.progress()
    resolved = None if model is None else resolve_model(model, progress)
    name, path = ("layers", None) if resolved is None else (resolved.name, resolved.path)
    if explain:
        choices = stage.choices(stage.layer_shapes(path), device=device)
        for line in kernels.choice_lines(choices):
            console.result(line)
        console.document("kernel-choices", kernels.choice_document(choices))
        return
    report = stage.bench_kernels(
        section,
        model_path=path,
        output=output or Path(f"{name}-kernels"),
        device=device,
        force=force,
        tuning=tune,
        progress=progress,
    )
    console.table(
        f"products with {name}", kernels.COLUMNS, kernels.table_rows(report.measured), kernels.caption(report.measured)
    )
    if report.predicted:
        console.table(
            "prediction for GPUs, not measured",
            kernels.PREDICTED_COLUMNS,
            kernels.predicted_rows(report.predicted),
            kernels.predicted_caption(),
        )
    console.document("kernel-bench", report.document)
    console.result(str(report.output / "kernels.png"))


def _refuse(given: dict[str, object], why: str) -> None:
    if names := [f"--{name}" for name, value in given.items() if value is not None]:
        raise RecipeError(f"{', '.join(names)}: {why}", hint="ctp bench --help shows which options go together")


def _lengths(given: str | None) -> tuple[int, ...] | None:
    if given is None:
        return None
    try:
        return tuple(int(part) for part in given.split(",") if part.strip())
    except ValueError:
        raise RecipeError(
            f"--prompt-len {given}: give whole numbers separated by commas", hint="e.g. --prompt-len 0,50,100"
        ) from None
