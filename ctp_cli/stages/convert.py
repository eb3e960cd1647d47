"""Bring a quantized checkpoint into another format, its codes untouched."""

import contextlib
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from ctp_cli.artifact import MANIFEST, all_or_nothing, folder_fingerprint, manifest_of, refuse_existing, workspace
from ctp_cli.checkpoints import writer
from ctp_cli.checkpoints.compressed_tensors import CompressedTensorsSettings
from ctp_cli.checkpoints.conversion import converted_files
from ctp_cli.checkpoints.formats import same_in
from ctp_cli.checkpoints.gptq import GPTQSettings
from ctp_cli.checkpoints.hidden_states import FILE as HIDDEN_STATES
from ctp_cli.checkpoints.parts import reading
from ctp_cli.errors import InputError
from ctp_cli.files import read_json
from ctp_cli.models.blocks import other_linears
from ctp_cli.models.loading import check_weight_files, dense_skeleton, load_config, packed_format, weight_files
from ctp_cli.models.resolve import ResolvedModel
from ctp_cli.progress import SILENT, Progress
from ctp_cli.recipe import CompressSection
from ctp_cli.stages.compress import KIND

_COPIED = ("*.json", "*.jinja", "*.model", "*.txt", "LICENSE*", "NOTICE*")
_MADE_ANEW = ("config.json", "quantize_config.json", MANIFEST)


@dataclass(frozen=True)
class ConvertReport:
    """What was made. Bytes are those of weight files."""

    path: Path
    source_format: str
    format: str
    source_bytes: int
    checkpoint_bytes: int


def convert(
    form: str, *, model: ResolvedModel, output: Path, force: bool = False, progress: Progress = SILENT
) -> ConvertReport:
    """Raises InputError for a checkpoint that is not quantized, is damaged, or does not fit the format."""
    refuse_existing(output, model.path, force=force)
    config = load_config(model.path)
    source = packed_format(config, model.path)
    if source is None:
        raise InputError(f"{model.path}: not quantized", hint="ctp compress makes a quantized checkpoint of it")
    check_weight_files(model.path)
    files = weight_files(model.path)
    made = manifest_of(model.path) or {}
    target = same_in(form, source, scattered=source.scattered(files))
    if isinstance(target, GPTQSettings):
        target = replace(target, **_how_found(made, target))
    skeleton, transposed = dense_skeleton(config)
    if isinstance(target, GPTQSettings | CompressedTensorsSettings):
        packed = {name.rpartition(".")[0] for name in files if name.endswith(f".{source.parts[0]}")}
        dense = other_linears(skeleton, packed)
        if isinstance(target, GPTQSettings):  # readers of it look for codes inside of blocks only
            dense = tuple(name for name in dense if any(map(str.isdecimal, name.split("."))))
        target = replace(target, dense=dense)
    if isinstance(target, CompressedTensorsSettings) and isinstance(source, CompressedTensorsSettings):
        target = replace(target, scale_dtype=_scale_dtype(files))
    identity = {"convert": form, "model": {"name": model.name, "sha256": folder_fingerprint(model.path)}}
    kind = str(made.get("kind", KIND))
    with workspace(output, kind=kind, identity=identity, force=force) as space, all_or_nothing(space):
        progress.start("convert", len(set(files.values())))
        dtype = config.dtype or torch.float16
        for name, tensors in converted_files(files, source, target, dtype=dtype, transposed=transposed):
            writer.write_shard(space.path / name, tensors)
            progress.advance()
        progress.finish()
        checkpoint_bytes = writer.write_index(space.path, settings=target)
        for path in {path for pattern in _COPIED for path in model.path.glob(pattern)}:
            if path.name not in _MADE_ANEW and not path.name.endswith(".index.json"):
                shutil.copyfile(path, space.path / path.name)
        if (model.path / HIDDEN_STATES).is_file():
            (space.path / HIDDEN_STATES).parent.mkdir()
            shutil.copyfile(model.path / HIDDEN_STATES, space.path / HIDDEN_STATES)
        writer.write_quantization(space.path, read_json(model.path / "config.json"), target)
        space.finish(
            {
                "recipe": {"convert": {"format": form}},
                "inputs": identity,
                "format": form,
                "base_model": made.get("base_model"),
                "results": {"checkpoint_bytes": checkpoint_bytes, "source_manifest": made},
            }
        )
    return ConvertReport(
        path=output,
        source_format=source.name,
        format=form,
        source_bytes=sum(path.stat().st_size for path in set(files.values())),
        checkpoint_bytes=checkpoint_bytes,
    )


def _scale_dtype(files: Mapping[str, Path]) -> torch.dtype:
    """Of the checkpoint's layers."""
    name = next((name for name in files if name.endswith(".weight_scale")), None)
    if name is None:
        return torch.float16
    with reading(files[name]) as handle:
        return torch.bfloat16 if handle.get_slice(name).get_dtype() == "BF16" else torch.float16


def _how_found(made: Mapping[str, Any], settings: GPTQSettings) -> dict[str, Any]:
    """What `ctp compress` was told, from the manifest of its checkpoint or of a conversion of it."""
    recipe, results = made.get("recipe"), made.get("results")
    if isinstance(recipe, dict) and isinstance(recipe.get("compress"), dict):
        with contextlib.suppress(ValidationError):
            section = CompressSection.model_validate(recipe["compress"])
            static = section.act_order == "static" and section.quantizer == "gptq" and settings.group_size > 0
            return {
                "dampening": section.dampening,
                "true_sequential": section.true_sequential,
                "static_groups": static,
            }
    before = results.get("source_manifest") if isinstance(results, dict) else None
    return _how_found(before, settings) if isinstance(before, dict) else {}
