"""Give back the checkpoint that a prompt was stitched onto."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ctp_cli.artifact import MANIFEST, all_or_nothing, file_fingerprint, manifest_of, refuse_existing, workspace
from ctp_cli.errors import InputError
from ctp_cli.models.loading import check_weight_files
from ctp_cli.prompts.stitching import ORIGINAL, unstitch_vocabulary
from ctp_cli.stages.compress import KIND
from ctp_cli.stages.stitch import KINDS

_OF_BASE = ("recipe", "format", "base_model", "results")


@dataclass(frozen=True)
class UnstitchReport:
    """What was made. Bytes are those of weight files: linked ones take no new space."""

    path: Path
    linked_bytes: int
    written_bytes: int


def unstitch(*, model_path: Path, output: Path, force: bool = False) -> UnstitchReport:
    """Raises InputError for a checkpoint that no prompt was stitched onto by `stitch`; then nothing is kept."""
    refuse_existing(output, model_path, force=force)
    made = manifest_of(model_path, kind=KINDS["vocab"])
    if made is None:
        raise InputError(f"{model_path}: no checkpoint that `ctp stitch` made", hint="give one it made")
    base_rows, base_dtypes = _base_tables(model_path, made.get("results"))
    check_weight_files(model_path)
    base = manifest_of(model_path / ORIGINAL) or {}
    inputs = {"model": {"name": model_path.resolve().name, "manifest_sha256": file_fingerprint(model_path / MANIFEST)}}
    kind = str(base.get("kind", KIND))
    with workspace(output, kind=kind, identity={"unstitch": inputs}, force=force) as space, all_or_nothing(space):
        files = unstitch_vocabulary(model_path, space.path, base_rows, base_dtypes)
        of_base: dict[str, Any] = {key: base[key] for key in _OF_BASE if key in base}
        space.finish({"base_model": made.get("base_model"), **of_base, "inputs": inputs})
    return UnstitchReport(output, files.linked, files.written)


def _base_tables(model_path: Path, results: object) -> tuple[dict[str, int | None], dict[str, torch.dtype]]:
    """Rows and dtypes of the base's tables; the dtypes are missing where they did not change."""
    found = results if isinstance(results, dict) else {}
    rows, names = found.get("base_rows"), found.get("base_dtypes", {})
    known = {name: getattr(torch, name) for name in ("float32", "float16", "bfloat16", "float64")}
    if (
        not isinstance(rows, dict)
        or not all(count is None or type(count) is int for count in rows.values())
        or not isinstance(names, dict)
        or not all(isinstance(name, str) and name in known for name in names.values())
    ):
        raise InputError(f"{model_path / MANIFEST}: does not say what the base was", hint="stitch again with this ctp")
    if not (model_path / ORIGINAL).is_dir():
        raise InputError(f"{model_path}: its folder {ORIGINAL} is missing", hint="is the checkpoint complete?")
    return rows, {tensor: known[name] for tensor, name in names.items()}
