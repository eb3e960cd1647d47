"""Read a quantized checkpoint with foreign readers; compare with the dense twin (same weights, unpacked by us).

Runs inside the environment of a reader and imports nothing of ctp: no mistake of ours can cancel out.

    python read_checkpoint.py gptq FOLDER DENSE_FOLDER --tokens 64                  # environment gptqmodel
    python read_checkpoint.py compressed-tensors FOLDER DENSE_FOLDER --tokens 64    # environment llmcompressor

Two checks for every reader, on the CPU:

- weights: each quantized layer, decoded by the reader's own module, against the twin's tensor. The reader
  multiplies a float16 scale by an integer in float16, and the twin was rounded when it was stored, so every
  weight may be off by those two roundings and no more. A code, zero point or group index off by one is far
  outside.
- logits: the whole model on the same token ids, against the twin in float32. This covers what the first check
  does not: biases, embeddings, head, and the kernel that multiplies.

stdout carries one JSON object per reader, stderr the same as a sentence; exit code 1 if any reader failed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # decode eagerly: compiling takes longer than running once
os.environ.setdefault("HF_HUB_OFFLINE", "1")
RESULTS = os.fdopen(os.dup(1), "w")  # GPTQModel prints a banner on stdout, which belongs to the results
os.dup2(2, 1)

import torch  # noqa: E402
from safetensors import safe_open  # noqa: E402
from torch import nn  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

# Largest relative error of rounding to a type once: half a unit in the last place.
ROUNDING = {"F16": 2.0**-11, "BF16": 2.0**-8, "F32": 2.0**-24}
SMALLEST = 2.0**-24  # float16 has no finer steps near zero, whatever the relative error
# Roundings that may pile up on the way to the logits, as a share of the largest logit. Sound checkpoints
# measure up to 6 (30 layers, float16), the mildest format mistake known (8-bit zero point off by one) 19.
LOGIT_ROUNDINGS = 10


class WrongReading(Exception):
    """The reader loaded something else than the checkpoint holds."""


@dataclass(frozen=True)
class Reader:
    """A way to load a folder as a torch module, to find the layers that were packed, and to decode one (O, I)."""

    name: str
    dtype: torch.dtype
    load: Callable[[Path, torch.dtype], nn.Module]
    layers: Callable[[nn.Module], dict[str, Any]]
    decode: Callable[[Any], torch.Tensor]


@dataclass(kw_only=True)
class Reading:
    """What one reader made of one checkpoint. weight_ratio: 1 is the largest error that rounding explains."""

    reader: str
    dtype: str
    kernels: dict[str, int] = field(default_factory=dict)
    weight_ratio: float | None = None
    worst_layer: str | None = None
    zero_share: float | None = None
    max_abs_diff: float | None = None
    max_abs_logit: float | None = None
    relative: float | None = None
    tolerance: float | None = None
    argmax_agreement: float | None = None
    error: str | None = None

    def passed(self) -> bool:
        """Both checks were made and hold; written so that nan does not pass."""
        if self.weight_ratio is None or self.relative is None or self.tolerance is None:
            return False
        return self.error is None and self.weight_ratio <= 1 and self.relative <= self.tolerance


@dataclass(frozen=True)
class Twin:
    """The dense checkpoint as transformers reads it in float32, with its logits on the token ids."""

    model: nn.Module
    stored_types: dict[str, str]
    ids: torch.Tensor
    logits: torch.Tensor

    def rounding(self, layer: str) -> float:
        """Relative error of a layer's weights: a rounding in the reader, one in the file, and 1%."""
        # 1%: more than the second-order terms
        return 1.01 * (ROUNDING["F16"] + ROUNDING[self.stored_types[f"{layer}.weight"]])


def load_gptqmodel(backend: str) -> Callable[[Path, torch.dtype], nn.Module]:
    """A loader through GPTQModel with one of its kernels, or with the one it picks for this CPU ("auto")."""

    def load(folder: Path, dtype: torch.dtype) -> nn.Module:
        from gptqmodel import BACKEND, GPTQModel

        return GPTQModel.load(str(folder), device="cpu", backend=BACKEND(backend), dtype=dtype).model

    return load


def load_transformers(folder: Path, dtype: torch.dtype) -> nn.Module:
    """What any user of transformers calls; it finds the settings in config.json."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def gptqmodel_layers(model: nn.Module) -> dict[str, Any]:
    """The layers that GPTQModel keeps packed."""
    from gptqmodel.nn_modules.qlinear import BaseQuantLinear

    return {name: module for name, module in model.named_modules() if isinstance(module, BaseQuantLinear)}


def decompressed_layers(model: nn.Module) -> dict[str, Any]:
    """compressed-tensors makes layers dense at the first forward pass, and leaves its scheme on them."""
    model(torch.zeros(1, 2, dtype=torch.long))
    return {name: module for name, module in model.named_modules() if getattr(module, "quantization_scheme", None)}


def _decoded(module: Any) -> torch.Tensor:
    return module.dequantize_weight().T.float()


def _weight(module: Any) -> torch.Tensor:
    return module.weight.float()


PACKED = {"gptq": ".qweight", "compressed-tensors": ".weight_packed"}
READERS = {
    "gptq": [
        # GPTQModel's reference kernel refuses float32
        Reader("gptqmodel-torch", torch.float16, load_gptqmodel("gptq_torch"), gptqmodel_layers, _decoded),
        Reader("gptqmodel-auto", torch.float16, load_gptqmodel("auto"), gptqmodel_layers, _decoded),
        Reader("transformers", torch.float32, load_transformers, gptqmodel_layers, _decoded),
    ],
    "compressed-tensors": [
        Reader("compressed-tensors", torch.float16, load_transformers, decompressed_layers, _weight)
    ],
}


def stored_types(folder: Path) -> dict[str, str]:
    """Type of every tensor in the folder's safetensors files, by name; no data is read."""
    types: dict[str, str] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as handle:
            types |= {name: handle.get_slice(name).get_dtype() for name in handle.keys()}  # noqa: SIM118
    return types


def quantized_layers(reader: Reader, model: nn.Module, packed: set[str]) -> dict[str, Any]:
    """The layers the reader unpacked, by name. Raises WrongReading if others are packed on disk."""
    layers = reader.layers(model)
    if not packed or layers.keys() != packed:
        odd = sorted(layers.keys() ^ packed)[:4]
        raise WrongReading(f"{len(packed)} layers packed on disk, {len(layers)} in the model; only in one: {odd}")
    return layers


def compare_weights(reading: Reading, reader: Reader, layers: dict[str, Any], twin: Twin) -> None:
    """Fill in weight_ratio, worst_layer and zero_share. Before the first forward: kernels repack then."""
    ratios, zeros, total = {}, 0, 0
    for name, module in layers.items():
        decoded = reader.decode(module)
        truth = twin.model.get_parameter(f"{name}.weight")
        ratio = (decoded - truth).abs() / (twin.rounding(name) * truth.abs() + SMALLEST)
        ratios[name] = ratio.nan_to_num(nan=torch.inf).max().item()
        zeros += int((decoded == 0).sum())
        total += decoded.numel()
    reading.worst_layer = max(ratios, key=ratios.__getitem__)
    reading.weight_ratio = ratios[reading.worst_layer]
    reading.zero_share = zeros / total


def compare_logits(reading: Reading, logits: torch.Tensor, truth: torch.Tensor) -> None:
    """Fill in the largest difference between two sets of logits (1, tokens, vocabulary)."""
    reading.max_abs_diff = (logits - truth).abs().max().item()
    reading.max_abs_logit = truth.abs().max().item()
    reading.relative = reading.max_abs_diff / reading.max_abs_logit
    reading.argmax_agreement = (logits.argmax(-1) == truth.argmax(-1)).float().mean().item()


def read(reader: Reader, folder: Path, twin: Twin, suffix: str) -> Reading:
    """Load with one reader and compare; what it raises becomes the reading's error: the others still run."""
    reading = Reading(reader=reader.name, dtype=str(reader.dtype).removeprefix("torch."))
    packed = {name.removesuffix(suffix) for name in stored_types(folder) if name.endswith(suffix)}
    try:
        model = reader.load(folder, reader.dtype).eval()
        layers = quantized_layers(reader, model, packed)
        reading.kernels = dict(Counter(type(module).__name__ for module in layers.values()))
        reading.tolerance = LOGIT_ROUNDINGS * max(twin.rounding(name) for name in layers)
        compare_weights(reading, reader, layers, twin)
        compare_logits(reading, model(twin.ids).logits.float(), twin.logits)
    except Exception as error:
        reading.error = f"{type(error).__name__}: {error}"
    return reading


def versions() -> dict[str, str]:
    """Of the packages that matter here, as far as they are installed."""
    found = {}
    for package in ("gptqmodel", "optimum", "compressed-tensors", "transformers", "torch"):
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def report(reading: Reading) -> None:
    """One JSON line on stdout, one sentence on stderr."""
    record = {"schema": 1, "passed": reading.passed(), **asdict(reading)}
    record["versions"] = versions()
    print(json.dumps(record), file=RESULTS, flush=True)
    verdict = "ok" if reading.passed() else "FAILED"
    if reading.error:
        print(f"{verdict}: {reading.reader}: {reading.error}", file=sys.stderr)
        return
    kernels = ", ".join(f"{count} {name}" for name, count in reading.kernels.items())
    print(
        f"{verdict}: {reading.reader} ({reading.dtype}; {kernels}): "
        f"logits differ by {reading.max_abs_diff:.3g} of {reading.max_abs_logit:.3g}, "
        f"relative {reading.relative:.2g} (at most {reading.tolerance:.2g}), "
        f"argmax agrees on {reading.argmax_agreement:.1%}; "
        f"worst weight off by {reading.weight_ratio:.3g} roundings, in {reading.worst_layer}; "
        f"{reading.zero_share:.1%} zeros",
        file=sys.stderr,
    )


def load_twin(folder: Path, tokens: int) -> Twin:
    """The dense checkpoint and its logits on the same random token ids for every reader."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (1, tokens), generator=generator)
    return Twin(model, stored_types(folder), ids, model(ids).logits)


@torch.inference_mode()
def main() -> int:
    """Compare every reader with the dense twin; 0 if all agree."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("format", choices=READERS)
    parser.add_argument("packed", type=Path, help="folder of the quantized checkpoint")
    parser.add_argument("dense", type=Path, help="folder of its dense twin: the same weights, not packed")
    parser.add_argument("--tokens", type=int, default=64, help="length of the input (default: %(default)s)")
    arguments = parser.parse_args()
    twin = load_twin(arguments.dense, arguments.tokens)
    form = arguments.format
    readings = [read(reader, arguments.packed, twin, PACKED[form]) for reader in READERS[form]]
    for reading in readings:
        report(reading)
    return 0 if all(reading.passed() for reading in readings) else 1


if __name__ == "__main__":
    raise SystemExit(main())
