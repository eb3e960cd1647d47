"""ctp compress"""

import contextlib
import json as jsons
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ctp_cli.artifact import made_for, manifest_of, refuse_existing
from ctp_cli.commands.common import (
    Device,
    DryRun,
    Force,
    Json,
    Output,
    Quiet,
    follows,
    note_without_effect,
    reports_errors,
    shows_defaults,
)
from ctp_cli.console import Console, size_text, time_text
from ctp_cli.errors import RecipeError
from ctp_cli.models.embedded import NAME
from ctp_cli.recipe import CompressSection, build

if TYPE_CHECKING:
    from ctp_cli.stages.compress import CompressReport

EMBEDDED = NAME

WHAT, HOW, TEXT = "What to compress", "How", "Calibration text"


@reports_errors
@shows_defaults(CompressSection)
def compress(
    model: Annotated[str | None, typer.Argument(help=f"Folder, hub id, or {EMBEDDED} (the default).")] = None,
    sparsity: Annotated[
        str | None, typer.Option(help="Fraction to prune (0.5), or n:m (2:4).", rich_help_panel=WHAT)
    ] = None,
    bits: Annotated[int | None, typer.Option(help="2, 3, 4 or 8 bits per kept weight.", rich_help_panel=WHAT)] = None,
    format: Annotated[
        str | None,
        typer.Option(help="auto, gptq, compressed-tensors, ctp or dense; or several: gptq,ctp.", rich_help_panel=WHAT),
    ] = None,
    group_size: Annotated[
        str | None,
        typer.Option(
            help="auto (the largest of 128, 64, 32 that fits), row, or inputs per scale.", rich_help_panel=HOW
        ),
    ] = None,
    symmetric: Annotated[
        bool | None,
        typer.Option(
            "--symmetric/--asymmetric", help="Zero in the middle of the grid, or anywhere.", rich_help_panel=HOW
        ),
    ] = None,
    mse_clip: Annotated[
        bool | None, typer.Option(help="Clip each group's range by least error.", rich_help_panel=HOW)
    ] = None,
    act_order: Annotated[str | None, typer.Option(help="none, column, group or static.", rich_help_panel=HOW)] = None,
    true_sequential: Annotated[
        bool | None, typer.Option(help="Layers see compressed predecessors.", rich_help_panel=HOW)
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(help="full: aim at the full model's outputs; layer: at the layer's own.", rich_help_panel=HOW),
    ] = None,
    tune_windows: Annotated[
        int | None, typer.Option(help="Tune end to end on so many windows; 0: not at all.", rich_help_panel=HOW)
    ] = None,
    tune: Annotated[
        str | None, typer.Option(help="weights (then scales), or scales only (less memory).", rich_help_panel=HOW)
    ] = None,
    tune_learning_rate: Annotated[
        float | None, typer.Option(help="Relative to the size of what is tuned.", rich_help_panel=HOW)
    ] = None,
    dampening: Annotated[float | None, typer.Option(help="Share of mean diag(H).", rich_help_panel=HOW)] = None,
    pruner: Annotated[
        str | None, typer.Option(help="alternating, sparsegpt, wanda or magnitude.", rich_help_panel=HOW)
    ] = None,
    allocation: Annotated[
        str | None,
        typer.Option(help="uniform, or owl: blocks with more outliers are pruned less.", rich_help_panel=HOW),
    ] = None,
    quantizer: Annotated[str | None, typer.Option(help="gptq or rtn.", rich_help_panel=HOW)] = None,
    rounds: Annotated[int | None, typer.Option(help="Turns of the alternating pruner.", rich_help_panel=HOW)] = None,
    refine: Annotated[
        int | None, typer.Option(help="Sweeps over GPTQ's codes, each made the best.", rich_help_panel=HOW)
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            help=f"pydoc (of {EMBEDDED} the default), c4 (of others), wikitext2, ptb, or FILE[:COLUMN].",
            rich_help_panel=TEXT,
        ),
    ] = None,
    windows: Annotated[int | None, typer.Option(help="Number of windows.", rich_help_panel=TEXT)] = None,
    seqlen: Annotated[int | None, typer.Option(help="Tokens per window.", rich_help_panel=TEXT)] = None,
    bos: Annotated[
        bool | None,
        typer.Option("--bos/--no-bos", help="Every window begins with the tokenizer's BOS.", rich_help_panel=TEXT),
    ] = None,
    max_memory: Annotated[
        str | None,
        typer.Option(
            help="For the whole process, e.g. 4GB: past it, hidden states go to files. No limit by default.",
            rich_help_panel=HOW,
        ),
    ] = None,
    output: Output = None,
    force: Force = False,
    dry_run: DryRun = False,
    device: Device = "auto",
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Prune and quantize a model, block by block: one of them is in memory at a time.

    \b
    ctp compress --sparsity 0.5 --bits 4
    ctp compress path/to/llama --bits 4 --calibration c4 -o llama-w4
    ctp compress path/to/opt --sparsity 2:4 --calibration texts.jsonl
    ctp compress --bits 4 --format gptq,compressed-tensors -o w4     # w4 and w4-compressed-tensors
    ctp compress path/to/llama-70b --bits 4 --max-memory 24GB --dry-run
    torchrun --nproc-per-node 2 -m ctp_cli compress path/to/llama --bits 4   # shares the calibration
    """
    console = Console(quiet=quiet or follows(), json_mode=json)
    first, *others = _formats(format)
    sections = [
        build(
            CompressSection,
            {
                "sparsity": sparsity,
                "bits": bits,
                "format": one,
                "group_size": int(group_size) if group_size and group_size.isdecimal() else group_size,
                "symmetric": symmetric,
                "mse_clip": mse_clip,
                "act_order": act_order,
                "true_sequential": true_sequential,
                "target": target,
                "tune_windows": tune_windows,
                "tune": tune,
                "tune_learning_rate": tune_learning_rate,
                "dampening": dampening,
                "pruner": pruner,
                "allocation": allocation,
                "quantizer": quantizer,
                "rounds": rounds,
                "refine": refine,
                "calibration": calibration,
                "windows": windows,
                "seqlen": seqlen,
                "bos": bos,
                "max_memory": max_memory,
            },
        )
        for one in (first, *others)
    ]
    section = sections[0]
    note_without_effect(console, section)
    if others and (section.format == "dense" or section.bits is None):
        raise RecipeError(
            "compress.format: of several formats the first must be one of quantized weights",
            hint="put dense last, and give --bits",
        )
    from ctp_cli.data.sources import load_text
    from ctp_cli.models.devices import resolve_device
    from ctp_cli.models.resolve import resolve_model
    from ctp_cli.stages import compress as stage
    from ctp_cli.stages.convert import convert

    if model is None:
        console.note(f"no MODEL given: taking the embedded default, {EMBEDDED}")
    progress = console.progress()
    resolved = resolve_model(model or EMBEDDED, progress)
    path = output or Path(stage.output_name(resolved, section))
    beside = {one: path.with_name(f"{path.name}-{one}") for one in others if one is not None}
    key = ""
    if beside:
        stage.check_formats(sections, model=resolved)  # before hours of work that end in one that does not fit
        # what an interrupted command of several formats has finished is known by what it was made for
        text = load_text(section.calibration or stage.default_text(resolved), default_part="train")
        key = jsons.dumps([format, stage.identity(section, resolved, text)], sort_keys=True, default=str)
    made = {one for one in (path, *beside.values()) if (manifest_of(one) or {}).get("made_for") == key}
    if force or len(made) > len(beside):
        made = set()
    for extra in beside.values():
        if extra not in made:
            refuse_existing(extra, resolved.path, force=force)
    if dry_run:
        plan = stage.dry_run(section, model=resolved, output=path, force=force or path in made)
        console.document("compress-plan", {**plan, "also_not_counted": [str(extra) for extra in beside.values()]})
        console.table("would compress", ("", ""), _plan_rows(plan, list(beside.values())))
        return
    also = [str(extra) for extra in beside.values()]
    with made_for(key) if beside else contextlib.nullcontext():
        report = None
        if path not in made:
            report = stage.compress(
                section, model=resolved, output=path, device=resolve_device(device), force=force, progress=progress
            )
        if follows():  # another process is the one that converts and speaks
            return
        for one, extra in beside.items():
            if extra not in made:
                convert(one, model=resolve_model(str(path)), output=extra, force=force, progress=progress)
    if report is None:
        console.note(f"{path} was made already: the other formats are made from it")
        document = {"path": str(path), "also": also}
    else:
        _show(console, report, resolved.name)
        document = asdict(report) | {"path": str(report.path), "also": also}
    console.document("compress", document)
    for result in (str(path), *also):
        console.result(result)
    console.next_step("ctp", "learn", path, "--max-time", "10m")


def _show(console: Console, report: "CompressReport", name: str) -> None:
    for note in report.notes:
        console.note(f"note: {note}")
    console.table(
        f"compressed {name}",
        ("", ""),
        [
            (
                "checkpoint",
                f"{size_text(report.checkpoint_bytes)} ({size_text(report.original_bytes)} before)",
            ),
            (
                "bits per weight",
                f"{report.bits_per_weight:.2f} of everything, {report.linear_bits_per_weight:.2f} of linear layers",
            ),
            ("zeros in linear layers", _zeros_text(report.linear_sparsity, report.block_sparsities)),
            (
                "mean relative error",
                "-" if report.mean_relative_error is None else f"{report.mean_relative_error:.4f}",
            ),
            ("time", time_text(report.seconds)),
        ],
    )


def _plan_rows(plan: dict[str, Any], also: Sequence[Path]) -> list[tuple[str, str]]:
    rows = [
        ("model", plan["model"]),
        ("calibration", f"{plan['calibration']}, {plan['windows']} windows of {plan['seqlen']} tokens"),
        ("output", f"{plan['output']}, {plan['format']}"),
        ("linear layers", f"{plan['linear_layers']} in {plan['blocks']} blocks"),
        ("in memory", "two whole models, for tuning" if plan["whole_models_in_memory"] else "one block at a time"),
        ("hidden states", plan["hidden_states"]),
        ("estimated size", size_text(plan["checkpoint_bytes"])),
        ("estimated memory", size_text(plan["memory_bytes"])),
        ("estimated disk", size_text(plan["disk_bytes"])),
        ("estimated time", time_text(plan["seconds"])),
    ]
    return rows + ([("also, not counted", ", ".join(map(str, also)))] if also else [])


def _formats(given: str | None) -> list[str | None]:
    """Of a list none may be auto, which could be any of the others, and none may come twice."""
    formats: list[str | None] = [one.strip() for one in given.split(",")] if given else [None]
    if len(formats) > 1 and ("auto" in formats or len(set(formats)) < len(formats)):
        raise RecipeError(f"--format {given}: of several formats each is named, once", hint="e.g. --format gptq,ctp")
    return formats


def _zeros_text(share: float, of_blocks: Sequence[float] | None) -> str:
    return f"{share:.2%}" + (f", of blocks {min(of_blocks):.1%} to {max(of_blocks):.1%}" if of_blocks else "")
