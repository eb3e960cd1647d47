"""Read a GPTQ checkpoint with foreign readers and compare each with the dense twin: the same weights, unpacked by us.

Runs inside the environment of gptqmodel.txt and imports nothing of ctp, so that no mistake of ours can cancel itself out.

    python read_gptq.py GPTQ_FOLDER DENSE_FOLDER --tokens 64

Two checks for every reader, on the CPU:

- weights: each quantized layer, decoded by the reader's own module, against the twin's tensor. The reader multiplies a
  float16 scale by an integer in float16, and the twin was rounded when it was stored, so every single weight may be off by
  those two roundings and no more. A code, zero point or group index that is off by one is far outside.
- logits: the whole model on the same token ids, against the twin in float32. This covers what the first check does not:
  biases, embeddings, head, and the kernel that multiplies.

stdout carries one JSON object per reader, stderr the same as a sentence; exit code 1 if any reader failed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "4")  # its default on two cores is too few for it to start
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # decode eagerly: compiling every layer takes longer than running it
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
# Roundings that may pile up on the way to the logits, as a share of the largest logit. Sound checkpoints measure up to
# 6 (30 layers, float16 arithmetic); the mildest format mistake known, an 8-bit zero point off by one, measures 19 or more.
LOGIT_ROUNDINGS = 10


class WrongReading(Exception):
    """The reader loaded something else than the checkpoint holds."""


@dataclass(frozen=True)
class Reader:
    """A way to load a GPTQ folder as a torch module."""

    name: str
    dtype: torch.dtype
    load: Callable[[Path, torch.dtype], nn.Module]


@dataclass(kw_only=True)
class Reading:
    """What one reader made of one checkpoint. `*_ratio`: 1.0 is the largest error that rounding explains."""

    reader: str
    dtype: str
    kernels: dict[str, int] | None = None
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
        # written so that nan fails
        return self.error is None and self.weight_ratio <= 1 and self.relative <= self.tolerance  # type: ignore[operator]


def load_gptqmodel(backend: str) -> Callable[[Path, torch.dtype], nn.Module]:
    """A loader through GPTQModel with one of its kernels, or with the one it picks for this CPU ("auto")."""

    def load(folder: Path, dtype: torch.dtype) -> nn.Module:
        from gptqmodel import BACKEND, GPTQModel

        return GPTQModel.load(str(folder), device="cpu", backend=BACKEND(backend), dtype=dtype).model

    return load


def load_transformers(folder: Path, dtype: torch.dtype) -> nn.Module:
    """What any user of transformers calls; it finds the settings in config.json."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


READERS = [
    # GPTQModel's reference kernel refuses float32
    Reader("gptqmodel-torch", torch.float16, load_gptqmodel("gptq_torch")),
    Reader("gptqmodel-auto", torch.float16, load_gptqmodel("auto")),
    Reader("transformers", torch.float32, load_transformers),
]


def stored_types(folder: Path) -> dict[str, str]:
    """Type of every tensor in the folder's safetensors files, by name; no data is read."""
    types = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as handle:
            types |= {name: handle.get_slice(name).get_dtype() for name in handle.keys()}  # noqa: SIM118
    return types


def quantized_layers(model: nn.Module, expected: set[str]) -> Iterator[tuple[str, nn.Module]]:
    """Name and module of each layer the reader keeps quantized; WrongReading if these are not the ones on disk."""
    from gptqmodel.nn_modules.qlinear import BaseQuantLinear

    found = {name: module for name, module in model.named_modules() if isinstance(module, BaseQuantLinear)}
    if found.keys() != expected or not expected:
        odd = sorted(found.keys() ^ expected)
        raise WrongReading(f"{len(expected)} layers are packed on disk, {len(found)} in the model; differ: {odd[:4]}")
    yield from found.items()


def compare_weights(reading: Reading, model: nn.Module, twin: nn.Module, gptq: set[str], twin_types: dict) -> None:
    """Fill in kernels, weight_ratio, worst_layer and zero_share. Before the first forward: kernels repack then."""
    reading.kernels, reading.weight_ratio, zeros, total = {}, 0.0, 0, 0
    for name, module in quantized_layers(model, gptq):
        kernel = type(module).__name__
        reading.kernels[kernel] = reading.kernels.get(kernel, 0) + 1
        decoded = module.dequantize_weight().T.float()
        truth = twin.get_submodule(name).weight
        rounding = ROUNDING["F16"] + ROUNDING[twin_types[f"{name}.weight"]]
        ratio = ((decoded - truth).abs() / (rounding * truth.abs() + SMALLEST)).max().item()
        if not ratio <= reading.weight_ratio:  # so that nan counts as worst
            reading.weight_ratio, reading.worst_layer = ratio, name
        zeros += int((decoded == 0).sum())
        total += decoded.numel()
    reading.zero_share = zeros / total


def compare_logits(reading: Reading, logits: torch.Tensor, truth: torch.Tensor, rounding: float) -> None:
    """Fill in the largest difference between logits (1, tokens, vocabulary) and what it is measured against."""
    reading.max_abs_diff = (logits - truth).abs().max().item()
    reading.max_abs_logit = truth.abs().max().item()
    reading.relative = reading.max_abs_diff / reading.max_abs_logit
    reading.tolerance = LOGIT_ROUNDINGS * rounding
    reading.argmax_agreement = (logits.argmax(-1) == truth.argmax(-1)).float().mean().item()


def read(reader: Reader, gptq_folder: Path, twin_folder: Path, twin: nn.Module, ids: torch.Tensor) -> Reading:
    """Load with one reader and compare; whatever it raises becomes the reading's error, so that the others still run."""
    reading = Reading(reader=reader.name, dtype=str(reader.dtype).removeprefix("torch."))
    packed = {name.removesuffix(".qweight") for name in stored_types(gptq_folder) if name.endswith(".qweight")}
    twin_types = stored_types(twin_folder)
    try:
        model = reader.load(gptq_folder, reader.dtype).eval()
        compare_weights(reading, model, twin, packed, twin_types)
        coarsest = max(ROUNDING[twin_types[f"{name}.weight"]] for name in packed)
        compare_logits(reading, model(ids).logits.float(), twin(ids).logits, ROUNDING["F16"] + coarsest)
    except Exception as error:
        reading.error = f"{type(error).__name__}: {error}"
    return reading


def report(reading: Reading) -> None:
    """One JSON line on stdout, one sentence on stderr."""
    packages = ("gptqmodel", "optimum", "transformers", "torch")
    record = {"schema": 1, "passed": reading.passed(), **asdict(reading)}
    record["versions"] = {name: version(name) for name in packages}
    print(json.dumps(record), file=RESULTS, flush=True)
    verdict = "ok" if reading.passed() else "FAILED"
    if reading.error:
        print(f"{verdict}: {reading.reader}: {reading.error}", file=sys.stderr)
        return
    kernels = ", ".join(f"{count} {name}" for name, count in (reading.kernels or {}).items())
    print(
        f"{verdict}: {reading.reader} ({reading.dtype}; {kernels}): logits differ by {reading.max_abs_diff:.3g} of "
        f"{reading.max_abs_logit:.3g} = {reading.relative:.2g} (at most {reading.tolerance:.2g}), argmax agrees on "
        f"{reading.argmax_agreement:.1%}; worst weight {reading.weight_ratio:.2f} x rounding in {reading.worst_layer}; "
        f"{reading.zero_share:.1%} zeros",
        file=sys.stderr,
    )


@torch.inference_mode()
def main() -> int:
    """Compare every reader with the dense twin; 0 if all agree."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gptq", type=Path, help="folder of the GPTQ checkpoint")
    parser.add_argument("dense", type=Path, help="folder of its dense twin: the same weights, not packed")
    parser.add_argument("--tokens", type=int, default=64, help="length of the input (default: %(default)s)")
    arguments = parser.parse_args()
    twin = AutoModelForCausalLM.from_pretrained(arguments.dense, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(twin.config.vocab_size, (1, arguments.tokens), generator=generator)
    failed = 0
    for reader in READERS:
        reading = read(reader, arguments.gptq, arguments.dense, twin, ids)
        report(reading)
        failed += not reading.passed()
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
