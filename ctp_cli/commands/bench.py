"""ctp bench"""

from pathlib import Path
from typing import Annotated

import typer

from ctp_cli.commands.common import Device, Force, Json, Output, Quiet, newest_or, reports_errors
from ctp_cli.commands.compress import EMBEDDED
from ctp_cli.console import Console
from ctp_cli.errors import RecipeError
from ctp_cli.recipe import BenchSection, build


@reports_errors
def bench(
    model: Annotated[str | None, typer.Argument(help="Checkpoint; the newest one here by default.")] = None,
    prompt_len: Annotated[str | None, typer.Option(help="Prompt lengths, comma separated.")] = None,
    prompt: Annotated[Path | None, typer.Option(help="Prompt file; random rows otherwise.")] = None,
    seqlen: Annotated[int | None, typer.Option(help="Text tokens before the first generated one.")] = None,
    new_tokens: Annotated[int | None, typer.Option(help="Tokens generated to time one.")] = None,
    rounds: Annotated[int | None, typer.Option(help="Measurements per configuration.")] = None,
    max_latency_ms: Annotated[float | None, typer.Option(help="Exit with 4 if a token takes longer.")] = None,
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
    """
    console = Console(quiet=quiet, json_mode=json)
    section = build(
        BenchSection,
        {
            "prompt_len": _lengths(prompt_len),
            "seqlen": seqlen,
            "new_tokens": new_tokens,
            "rounds": rounds,
            "max_latency_ms": max_latency_ms,
        },
    )
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


def _lengths(given: str | None) -> tuple[int, ...] | None:
    if given is None:
        return None
    try:
        return tuple(int(part) for part in given.split(",") if part.strip())
    except ValueError:
        raise RecipeError(
            f"--prompt-len {given}: give whole numbers separated by commas", hint="e.g. --prompt-len 0,50,100"
        ) from None
