"""What the checkpoint tests share: a text, one compression run, one that stops, and tensors read back plainly."""

from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ctp_cli.models.resolve import resolve_model
from ctp_cli.progress import SILENT, Progress, SilentProgress
from ctp_cli.recipe import CompressSection
from ctp_cli.stages.compress import CompressReport, compress

SETTINGS: dict[str, Any] = {
    "sparsity": 0.5, "bits": 4, "group_size": 32, "windows": 4, "seqlen": 32, "format": "gptq",
}  # fmt: skip


class Stopped(Exception):
    """Stands for whatever ends a process."""


class StopAfter(SilentProgress):
    """Raises once `blocks` blocks are done and on disk."""

    def __init__(self, blocks: int) -> None:
        self.left = blocks
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)

    def start(self, description: str, total: int) -> None:
        if self.left == 0:
            raise Stopped

    def advance(self, units: int = 1, note: str = "") -> None:
        self.left -= units
        if self.left == 0:
            raise Stopped


def calibration_text(folder: Path) -> Path:
    """A local file, so that no test needs a network."""
    path = folder / "calibration.txt"
    path.write_text(str(topics["assert"]) + str(topics["while"]), encoding="utf-8")
    return path


def run(
    model: Path, output: Path, text: Path, *, progress: Progress = SILENT, force: bool = False, **settings: Any
) -> CompressReport:
    section = CompressSection(**{**SETTINGS, "calibration": str(text), **settings})
    return compress(section, model=resolve_model(str(model)), output=output, progress=progress, force=force)


def stored_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of every file, by safetensors itself."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as handle:
            tensors |= {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 - not a dict
    return tensors


def files_of(folder: Path) -> dict[str, bytes]:
    """All bytes but those of the manifest, which holds times."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "ctp.json")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def block_linears(model: PreTrainedModel) -> set[str]:
    """Linear layers inside of the decoder: a number follows the name of the list they are in."""
    return {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and any(part.isdigit() for part in name.split("."))
    }
