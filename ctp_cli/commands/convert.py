"""ctp convert"""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from ctp_cli.commands.common import Force, Json, Output, Quiet, reports_errors
from ctp_cli.console import Console, size_text


@reports_errors
def convert(
    model: Annotated[str, typer.Argument(help="A quantized checkpoint, also of others' making.")],
    format: Annotated[
        Literal["gptq", "compressed-tensors", "ctp", "dense"],
        typer.Option(help="gptq, compressed-tensors (vLLM), ctp (small where pruned), or dense."),
    ],
    output: Output = None,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Bring a quantized checkpoint into another format; its codes stay as they are.

    \b
    ctp convert smollm2-135m-s50-w4 --format ctp
    ctp convert stitched/ --format gptq -o for-vllm
    """
    console = Console(quiet=quiet, json_mode=json)
    from ctp_cli.models.resolve import resolve_model
    from ctp_cli.stages import convert as stage

    progress = console.progress()
    resolved = resolve_model(model, progress)
    report = stage.convert(
        format,
        model=resolved,
        output=output or Path(f"{resolved.name}-{format}"),
        force=force,
        progress=progress,
    )
    rows = [
        (report.source_format, size_text(report.source_bytes)),
        (report.format, size_text(report.checkpoint_bytes)),
    ]
    console.table("weight files", ("", ""), rows)
    console.document("convert", asdict(report) | {"path": str(report.path)})
    console.result(str(report.path))
    console.next_step("ctp", "eval", report.path)
