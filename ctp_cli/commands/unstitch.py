"""ctp unstitch"""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from ctp_cli.commands.common import Force, Json, Output, Quiet, reports_errors
from ctp_cli.console import Console, size_text


@reports_errors
def unstitch(
    model: Annotated[Path, typer.Argument(help="A checkpoint that `ctp stitch` made.")],
    output: Output = None,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Take a stitched prompt out again: the checkpoint it was stitched onto.

    \b
    ctp unstitch smollm2-135m-s50-w4-stitched
    """
    console = Console(quiet=quiet, json_mode=json)
    from ctp_cli.stages import unstitch as stage

    target = output or Path(f"{model.resolve().name.removesuffix('-stitched')}-unstitched")
    report = stage.unstitch(model_path=model, output=target, force=force)
    rows = [("linked, unread", size_text(report.linked_bytes)), ("written", size_text(report.written_bytes))]
    console.table("unstitched", ("", ""), rows)
    console.document("unstitch", asdict(report) | {"path": str(report.path)})
    console.result(str(report.path))
    console.next_step("ctp", "eval", report.path)
