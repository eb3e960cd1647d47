"""ctp stitch"""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from ctp_cli.commands.common import Force, Json, Output, Quiet, reports_errors, shows_defaults
from ctp_cli.console import Console, size_text
from ctp_cli.recipe import StitchSection, build


@reports_errors
@shows_defaults(StitchSection)
def stitch(
    prompt: Annotated[Path, typer.Argument(help="prompt.safetensors, or its folder.")],
    model: Annotated[str, typer.Argument(help="Checkpoint to stitch it onto: any compression of the same model.")],
    format: Annotated[
        str | None, typer.Option(help="vocab (any engine serves it), peft (an adapter) or kv (a filled cache).")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="auto, float32, bfloat16 or float16: of the tensors written, and what config.json then says."
        ),
    ] = None,
    vocab_multiple: Annotated[
        int | None, typer.Option(help="Pad the vocabulary behind the prompt's tokens to a multiple of this.")
    ] = None,
    output: Output = None,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Stitch a prompt onto a checkpoint; the result is an ordinary checkpoint (or a PEFT adapter).

    \b
    ctp stitch prompt.safetensors model/
    ctp stitch my-prompt/ newly-compressed-model/ --format peft -o adapter
    ctp stitch my-prefix/ model/ --format kv
    ctp stitch prompt.safetensors model/ --dtype float16 --vocab-multiple 128
    """
    console = Console(quiet=quiet, json_mode=json)
    section = build(StitchSection, {"format": format, "dtype": dtype, "vocab_multiple": vocab_multiple})
    from ctp_cli.models.resolve import resolve_model
    from ctp_cli.prompts.file import load_prompt
    from ctp_cli.stages import stitch as stage

    load_prompt(prompt)  # a bad prompt is said before a model is looked for
    progress = console.progress()
    resolved = resolve_model(model, progress)
    report = stage.stitch(
        section,
        prompt_path=prompt,
        model_path=resolved.path,
        output=output or Path(f"{resolved.name}-{'stitched' if section.format == 'vocab' else section.format}"),
        force=force,
        progress=progress,
    )
    for note in report.notes:
        console.note(f"note: {note}")
    rows = [("linked, unread", size_text(report.linked_bytes)), ("written", size_text(report.written_bytes))]
    if report.copied_bytes:
        rows.append(("of which copied unchanged", size_text(report.copied_bytes)))
    if report.mass_mean is not None and report.mass_max is not None:
        rows.append(
            (
                "probability left on prompt tokens",
                f"{report.mass_mean:.1e} on average, {report.mass_max:.1e} at most",
            )
        )
    console.table(f"stitched as {section.format}", ("", ""), rows)
    console.document("stitch", asdict(report) | {"path": str(report.path)})
    console.result(str(report.path))
    evaluated: dict[str, list[str | Path]] = {
        "vocab": [report.path],
        "peft": [model, "--prompt", prompt],
        "kv": [model, "--prompt", report.path],
    }
    behind = ["--bos"] if report.layout == "bos-prompt-text" else []
    console.next_step("ctp", "eval", *evaluated[section.format], *behind)
