"""Bring a quantized checkpoint into another format, its codes untouched."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from ctp_cli.artifact import MANIFEST, all_or_nothing, folder_fingerprint, manifest_of, refuse_existing, workspace
from ctp_cli.checkpoints import writer
from ctp_cli.checkpoints.conversion import converted_files
from ctp_cli.checkpoints.formats import format_of, same_in
from ctp_cli.errors import InputError
from ctp_cli.files import read_json, write_json
from ctp_cli.models.loading import check_weight_files, load_config, weight_files
from ctp_cli.models.resolve import ResolvedModel
from ctp_cli.progress import SILENT, Progress
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
    refuse_existing(output, force=force, reads=model.path)
    config = load_config(model.path)
    quantization = getattr(config, "quantization_config", None)
    if quantization is None:
        raise InputError(f"{model.path}: not quantized", hint="ctp compress makes a quantized checkpoint of it")
    check_weight_files(model.path)
    source = format_of(quantization if isinstance(quantization, dict) else quantization.to_dict(), model.path)
    files = weight_files(model.path)
    # of a gptq checkpoint every layer has a g_idx, which may well be in order
    marks = {"gptq": getattr(source, "desc_act", False), "compressed-tensors": getattr(source, "scattered", False)}
    scattered = bool(marks.get(source.name, any(name.endswith(".g_idx") for name in files)))
    target = same_in(form, source, scattered=scattered)
    del config.quantization_config
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    transposed = {name for name, module in skeleton.named_modules() if type(module).__name__ == "Conv1D"}
    made = manifest_of(model.path) or {}
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
        content = {k: v for k, v in read_json(model.path / "config.json").items() if k != "quantization_config"}
        if target is not None:
            content["quantization_config"] = target.to_config()
            if target.name == "gptq":
                write_json(space.path / "quantize_config.json", target.to_config())
        write_json(space.path / "config.json", content)
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
