"""Compress a model: check, open, do the passes (`passes.py`) the plan asks for (`plan.py`), finish as one artifact."""

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ctp_cli.artifact import (
    Workspace,
    folder_fingerprint,
    manifest_of,
    refuse_existing,
    refuse_other_work,
    unfinished,
    workspace,
)
from ctp_cli.checkpoints import writer
from ctp_cli.data.sources import Text, load_text
from ctp_cli.data.windows import bos_of, token_ids, windows
from ctp_cli.errors import InputError, RecipeError
from ctp_cli.models import embedded
from ctp_cli.models.blocks import Block, find_blocks
from ctp_cli.models.loading import dense_skeleton, load_config, load_tokenizer
from ctp_cli.models.processes import Processes
from ctp_cli.models.resolve import ResolvedModel
from ctp_cli.models.streaming import WholeModel, stream_model
from ctp_cli.progress import SILENT, Progress
from ctp_cli.recipe import CompressSection
from ctp_cli.stages.estimate import estimate
from ctp_cli.stages.passes import SCRATCH, Passes
from ctp_cli.stages.plan import Job

KIND = "compressed-checkpoint"


@dataclass(frozen=True)
class CompressReport:
    """What was made. Bits count everything stored: codes, scales, zeros, indices and what was left uncompressed."""

    path: Path
    checkpoint_bytes: int
    original_bytes: int
    bits_per_weight: float
    linear_bits_per_weight: float
    linear_sparsity: float
    block_sparsities: tuple[float, ...] | None
    """What each block was to be pruned to, where that differs."""
    mean_relative_error: float | None
    seconds: float
    notes: tuple[str, ...]


def output_name(model: ResolvedModel, section: CompressSection) -> str:
    """smollm2-135m-s50-w4: what the checkpoint holds."""
    parts = [model.name]
    if isinstance(section.sparsity, str):
        parts.append("s" + section.sparsity.replace(":", "of"))
    elif section.sparsity is not None:
        parts.append(f"s{section.sparsity * 100:g}".replace(".", "p"))
    if section.bits is not None:
        parts.append(f"w{section.bits}")
    return "-".join(parts)


def default_text(model: ResolvedModel) -> str:
    """The embedded model is for trying things out without a network; any other model gets the field's usual text."""
    base = (manifest_of(model.path) or {}).get("base_model")
    return "pydoc" if embedded.NAME in (base, model.name) and (model.embedded or base) else "c4"


def identity(section: CompressSection, model: ResolvedModel, calibration: Text) -> dict[str, Any]:
    """What the result depends on but for rounding: device and kernels change the order of sums."""
    return {
        "model": {"name": model.name, "sha256": folder_fingerprint(model.path)},
        "compress": section.model_dump(exclude={"calibration", "max_memory"}),
        "calibration": {"source": calibration.source, "sha256": calibration.sha256},
    }


def compress(
    section: CompressSection,
    *,
    model: ResolvedModel,
    output: Path,
    device: str = "cpu",
    force: bool = False,
    progress: Progress = SILENT,
) -> CompressReport | None:
    """Raises CtpError kinds for whatever the user can mend; unfinished work is kept in `output`.partial.

    None in all processes of a job but the main one. They share the calibration windows.
    """
    refuse_existing(output, model.path, force=force)
    config = _config_of_original(model)
    tokenizer = load_tokenizer(model.path)
    calibration = load_text(section.calibration or default_text(model), default_part="train")
    ids_NT = _windows(section, calibration, tokenizer)
    if said := _too_little(section, ids_NT):
        progress.say(said)
    _check_fits_model(config, tokenizer, ids_NT)
    processes = Processes.of_job(device)
    count = min(section.windows, ids_NT.shape[0])
    if processes.count > 1:
        _check_can_be_shared(section, processes, count)
    opened = WholeModel(model.path, device=device) if section.tune_windows else stream_model(model.path, device=device)
    network, blocks = opened.network, opened.blocks
    job = Job.plan(section, network, blocks)
    needs = estimate(job, network, blocks, windows=-(-count // processes.count), device=ids_NT.device.type)
    activations = needs.activations(section.max_memory, unfinished(output))
    made_of = identity(section, model, calibration)
    main = processes.is_main
    place = workspace(output, kind=KIND, identity=made_of, force=force) if main else contextlib.nullcontext()
    with place as space:
        if space is not None and space.resumed:
            progress.say(f"going on with the unfinished work in {space.path}")
        processes.total(0)  # nobody goes on before the folder is there
        passes = Passes(job, unfinished(output), opened, model.path, activations, processes, progress)
        report, tunings = passes.run(ids_NT.to(device))
        sparsities = passes.sparsities
        if space is None:
            return None
        job.write_shared_files(space.path, network, tokenizer)
        sizes = _sizes(job, space, network, blocks)
        notes = _notes(job, sizes)
        space.finish(
            {
                "recipe": {"model": model.name, "compress": section.model_dump()},
                "inputs": space.identity,
                "calibration": {
                    "source": calibration.source,
                    "sha256": calibration.sha256,
                    "windows": count,
                    "seqlen": section.seqlen,
                },
                "processes": processes.count,
                "format": job.format,
                "base_model": model.name,
                "results": sizes
                | {"layers": report, "notes": notes, "tunings": tunings, "block_sparsities": sparsities},
            },
            scratch=SCRATCH,
        )
    errors = [layer["relative_error"] for layer in report if layer["relative_error"] is not None]
    return CompressReport(
        path=output,
        mean_relative_error=sum(errors) / len(errors) if errors else None,
        block_sparsities=None if sparsities is None else tuple(sparsities),
        linear_sparsity=sum(x["zeros"] for x in report) / sum(x["weights"] for x in report),
        seconds=time.monotonic() - space.started,
        notes=notes,
        **sizes,
    )


def _check_can_be_shared(section: CompressSection, processes: Processes, windows: int) -> None:
    if section.tune_windows:
        raise RecipeError(
            f"compress.tune_windows: tuning is the work of one process, and there are {processes.count}",
            hint="start ctp without torchrun, or use --tune-windows 0",
        )
    if windows < processes.count:
        raise RecipeError(
            f"compress.windows: {windows} windows cannot be shared by {processes.count} processes",
            hint="give every process at least one",
        )


def check_formats(sections: Sequence[CompressSection], *, model: ResolvedModel) -> None:
    """Raises RecipeError if the model's layers cannot be stored as one of the sections says."""
    skeleton, _ = dense_skeleton(_config_of_original(model))
    blocks = find_blocks(skeleton)
    for section in sections:
        Job.plan(section, skeleton, blocks)


def dry_run(section: CompressSection, *, model: ResolvedModel, output: Path, force: bool = False) -> dict[str, Any]:
    """Check what can be checked without weights, which need not be there; estimate sizes, memory and time.

    Sizes come from shapes, time from a probe of the machine. What ends in `_bytes` and `seconds` are these estimates.
    """
    refuse_existing(output, model.path, force=force)
    config = _config_of_original(model)
    calibration = load_text(section.calibration or default_text(model), default_part="train")
    if unfinished(output).exists():
        refuse_other_work(output, identity(section, model, calibration), force=force)
    tokenizer = load_tokenizer(model.path)
    ids_NT = _windows(section, calibration, tokenizer)
    count = min(section.windows, ids_NT.shape[0])
    _check_fits_model(config, tokenizer, ids_NT)
    skeleton, _ = dense_skeleton(config)
    blocks = find_blocks(skeleton)
    job = Job.plan(section, skeleton, blocks)
    needs = estimate(job, skeleton, blocks, windows=count, device="cpu")
    in_files = needs.activations(section.max_memory, unfinished(output)).run_again
    memory_bytes = needs.fixed_bytes if in_files else needs.in_memory_bytes
    disk_bytes = needs.checkpoint_bytes + (needs.hidden_bytes if in_files else 0)
    return {
        "model": str(model.path),
        "calibration": calibration.source,
        "windows": count,
        "seqlen": section.seqlen,
        "output": str(output),
        "format": job.format,
        "linear_layers": sum(len(block.layers) for block in blocks),
        "blocks": len(blocks),
        "whole_models_in_memory": 2 if section.tune_windows else 0,
        "hidden_states": "in files" if in_files else "in memory",
        "checkpoint_bytes": round(needs.checkpoint_bytes),
        "memory_bytes": round(memory_bytes),
        "disk_bytes": round(disk_bytes),
        "seconds": needs.seconds(in_files=in_files, dtype=skeleton.dtype),
    }


def _config_of_original(model: ResolvedModel) -> Any:
    config = load_config(model.path)
    if getattr(config, "quantization_config", None) is not None:
        raise InputError(f"{model.path}: already quantized", hint="compress the original model")
    return config


def _windows(section: CompressSection, calibration: Text, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Windows for calibration, then those for tuning; a short text serves both with what it has."""
    most = section.windows + section.tune_windows
    seqlen = section.seqlen - 1 if section.bos else section.seqlen
    ids_T = token_ids(calibration, tokenizer, most=most * seqlen)
    ids_NT = windows(ids_T, seqlen, most=most, text=calibration)
    return functional.pad(ids_NT, (1, 0), value=bos_of(tokenizer)) if section.bos else ids_NT


def _too_little(section: CompressSection, ids_NT: Tensor) -> str | None:
    count, asked = ids_NT.shape[0], section.windows + section.tune_windows
    if count >= asked:
        return None
    shared = max(0, min(count, section.windows) + min(count, section.tune_windows) - count)
    again = f"; tuning sees {shared} of those that calibrate again" if shared else ""
    return f"the text gives {count} windows of the {asked} that were asked for{again}"


def _check_fits_model(config: Any, tokenizer: PreTrainedTokenizerBase, ids_NT: Tensor) -> None:
    """Windows longer than the model's positions, or ids beyond its table, would index out of range midway."""
    text_config = config.get_text_config()
    positions = getattr(text_config, "max_position_embeddings", None)
    if positions is not None and ids_NT.shape[1] > positions:
        raise InputError(
            f"compress.seqlen {ids_NT.shape[1]} is more than the model's {positions} positions",
            hint=f"use --seqlen {positions} or less",
        )
    if int(ids_NT.max()) >= text_config.vocab_size:
        raise InputError(
            f"the tokenizer gives id {int(ids_NT.max())}, the model has {text_config.vocab_size} embeddings",
            hint="is the tokenizer that of this model?",
        )


def _sizes(job: Job, space: Workspace, network: PreTrainedModel, blocks: Sequence[Block]) -> dict[str, Any]:
    shards = {path.name: path.stat().st_size for path in space.path.glob("*.safetensors")}
    parameters = writer.parameter_count(network)
    linear = sum(layer.weight_OI.numel() for block in blocks for layer in block.layers)
    unlinear = sum(p.numel() for block in blocks for p in block.module.parameters()) - linear
    bits = writer.dtype_bits(network.dtype)
    names = writer.ShardNames(len(blocks), job.settings)
    in_blocks = sum(size for name, size in shards.items() if name != names.outside())
    return {
        "checkpoint_bytes": sum(shards.values()),
        "original_bytes": parameters * bits // 8,
        "bits_per_weight": sum(shards.values()) * 8 / parameters,
        "linear_bits_per_weight": (in_blocks * 8 - unlinear * bits) / linear,
    }


def _notes(job: Job, sizes: dict[str, Any]) -> tuple[str, ...]:
    notes = []
    if job.section.sparsity is not None and job.format != "ctp":
        what = f"a dense {job.section.bits}-bit one" if job.settings else "the original"
        notes.append(
            f"format {job.format} stores pruned weights like any other: this checkpoint is no smaller than {what}"
            + ("; --format ctp is" if job.settings else "")
        )
    if job.format == "ctp":
        notes.append(
            "format ctp is read by ctp, and by transformers after `import ctp_cli.integration`; other engines read "
            "--format gptq"
        )
    if job.settings is None and job.section.bits is not None:
        notes.append(f"format dense stores the rounded weights in {sizes['bits_per_weight']:.0f} bits each")
    return tuple(notes)
