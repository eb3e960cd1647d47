"""Read quantized checkpoints with foreign readers; compare with the dense twin (same weights, unpacked by us).

Runs inside the environment of a reader and imports nothing of ctp: no mistake of ours can cancel out.

    python read_checkpoint.py CASE/gptq CASE/compressed-tensors ...      # which readers: by what is installed here

Beside a checkpoint lie its twin `dense` and `reference.safetensors`: token ids and the twin's logits as transformers
computes them in ctp's own environment, so that a reader that misreads config.json does not misread both. Two checks,
on the CPU:

- weights: each quantized layer, decoded by the reader's own module, against the twin's tensor. The reader
  multiplies a float16 scale by an integer in float16, and the twin was rounded when it was stored, so every
  weight may be off by those two roundings and no more. A code, zero point or group index off by one is far
  outside. vLLM keeps no module to decode: there only logits are compared.
- logits: the whole model on the same token ids, against the twin in float32. This covers what the first check
  does not: biases, embeddings, head, rotary settings, and the kernel that multiplies.

stdout carries one JSON object per checkpoint and reader, stderr the same as a sentence; exit code 1 if any failed.
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
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # decode eagerly: compiling takes longer than running once
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # one process, and its errors are ours
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # the cores may be shared
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
RESULTS = os.fdopen(os.dup(1), "w")  # GPTQModel and vLLM print on stdout, which belongs to the results
os.dup2(2, 1)

import torch  # noqa: E402
from safetensors import safe_open  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from torch import nn  # noqa: E402

# Largest relative error of rounding to a type once: half a unit in the last place.
ROUNDING = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}
SMALLEST = 2.0**-24  # float16 has no finer steps near zero, whatever the relative error
# Roundings that may pile up on the way to the logits, as a share of the largest logit. Sound checkpoints
# measure up to 6 (30 layers, float16), the mildest format mistake known (8-bit zero point off by one) 19.
LOGIT_ROUNDINGS = 10


class WrongReading(Exception):
    """The reader loaded something else than the checkpoint holds."""


@dataclass(frozen=True)
class Reader:
    """A way to load a folder as a model, to find the layers that were packed, and to decode one (O, I).

    layers and decode None: the model is out of reach, its logits are all there is.
    """

    name: str
    dtype: torch.dtype
    load: Callable[[Path, torch.dtype], Any]
    layers: Callable[[nn.Module], dict[str, Any]] | None = None
    decode: Callable[[Any], torch.Tensor] | None = None


@dataclass(kw_only=True)
class Reading:
    """What one reader made of one checkpoint. weight_ratio: 1 is the largest error that rounding explains."""

    checkpoint: str
    reader: str
    dtype: str
    kernels: dict[str, int] = field(default_factory=dict)
    decodes: bool = True
    """Whether the reader's weights are there to be compared."""
    weight_ratio: float | None = None
    worst_layer: str | None = None
    zero_share: float | None = None
    max_abs_diff: float | None = None
    max_abs_logit: float | None = None
    relative: float | None = None
    tolerance: float | None = None
    argmax_agreement: float | None = None
    note: str | None = None
    """What was not the reader's own."""
    error: str | None = None

    def passed(self) -> bool:
        """The checks were made and hold; written so that nan does not pass."""
        if self.error is not None or self.relative is None or self.tolerance is None:
            return False
        decoded = not self.decodes or (self.weight_ratio is not None and self.weight_ratio <= 1)
        return decoded and self.relative <= self.tolerance


@dataclass(frozen=True)
class Twin:
    """The dense checkpoint, and its logits (1, tokens, vocabulary) in float32 on the token ids (1, tokens)."""

    weights: dict[str, torch.Tensor]
    ids: torch.Tensor
    logits: torch.Tensor

    def rounding(self, layer: str) -> float:
        """Relative error of a layer's weights: a rounding in the reader, one in the file, and 1%."""
        # 1%: more than the second-order terms
        return 1.01 * (ROUNDING[torch.float16] + ROUNDING[self.weights[f"{layer}.weight"].dtype])


def load_gptqmodel(backend: str) -> Callable[[Path, torch.dtype], nn.Module]:
    """A loader through GPTQModel with one of its kernels, or with the one it picks for this CPU ("auto")."""

    def load(folder: Path, dtype: torch.dtype) -> nn.Module:
        from gptqmodel import BACKEND, GPTQModel

        return GPTQModel.load(str(folder), device="cpu", backend=BACKEND(backend), dtype=dtype).model

    return load


def load_transformers(folder: Path, dtype: torch.dtype) -> nn.Module:
    """What any user of transformers calls; it finds the settings in config.json."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def load_autogptq(folder: Path, dtype: torch.dtype) -> nn.Module:
    """auto-gptq as its own documentation has it; on a CPU only its plain kernel is left."""
    from auto_gptq import AutoGPTQForCausalLM

    model = AutoGPTQForCausalLM.from_quantized(
        str(folder), device="cpu", torch_dtype=dtype, use_safetensors=True, disable_exllama=True, disable_exllamav2=True
    ).model
    if model.config.tie_word_embeddings:
        put_back_table(model, folder)
    return model


def put_back_table(model: Any, folder: Path) -> None:
    """Where a tied model's embedding table was lost, read it again, and say so in the model's `note`.

    accelerate's load_checkpoint_in_model, which auto-gptq calls, makes tied parameters the one that comes first by
    name: lm_head.weight, which was never loaded because a tied model's file has none.
    """
    table = model.get_input_embeddings().weight
    name = next(name for name, parameter in model.named_parameters() if parameter is table)
    [file] = [file for file in folder.glob("*.safetensors") if name in tensor_names(file)]
    stored = load_file(file)[name].to(table.dtype)
    if not torch.equal(table, stored):
        table.data.copy_(stored)
        model.note = "its loader loses the embedding table of a tied model: put back from the file"


def vllm_product(
    input: torch.Tensor,
    q_weight: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bias: torch.Tensor | None,
    pack_factor: int,
    isa_hint: str,
) -> torch.Tensor:
    """In place of vLLM's 4-bit kernel, which its build for AVX2 lacks: all else, from file to packed layer, is vLLM's.

    Shapes: input (T, I); q_weight (O / 16, I * 2) int32, 16 outputs after one another for every input, 8 a word;
    scales (G, O); zeros (G, O / 8) int32, or None for 8.
    """

    def unpacked(words: torch.Tensor) -> torch.Tensor:
        return (words[..., None] >> torch.arange(0, 32, 32 // pack_factor)) & 15

    groups, outputs = scales.shape
    inputs = input.shape[-1]
    codes_IO = unpacked(q_weight.view(outputs // 16, inputs, 2)).permute(1, 0, 2, 3).reshape(inputs, outputs)
    middle = torch.full((1, outputs), 8)
    zeros_GO = middle if zeros is None else unpacked(zeros).view(groups, outputs)
    steps_GIO = codes_IO.view(groups, -1, outputs) - zeros_GO[:, None]
    weight_IO = (steps_GIO * scales[:, None].float()).view(inputs, outputs)
    product = input.float() @ weight_IO + (0 if bias is None else bias.float())
    return product.to(input.dtype)


class VllmModel:
    """vLLM's engine, called like a model of transformers; it gives no logits for what follows the last token."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        from vllm import LLM, _custom_ops
        from vllm.platforms import current_platform

        current_platform.import_kernels()
        self.note = None
        if not hasattr(torch.ops._C, "cpu_gemm_wna16"):
            _custom_ops.cpu_gemm_wna16 = vllm_product
            self.note = "its 4-bit product replaced by torch's: vLLM has none without AVX-512"
        self.engine = LLM(
            str(folder),
            dtype=str(dtype).removeprefix("torch."),
            enforce_eager=True,  # compiling takes longer than running once
            max_model_len=256,
            max_num_seqs=1,
            kv_cache_memory_bytes=256 << 20,
            logprobs_mode="raw_logits",
            max_logprobs=-1,
        )

    def eval(self) -> VllmModel:
        return self

    def __call__(self, ids: torch.Tensor) -> SimpleNamespace:
        from vllm import SamplingParams, TokensPrompt

        [sequence] = ids.tolist()
        settings = SamplingParams(max_tokens=1, prompt_logprobs=-1, flat_logprobs=True, detokenize=False)
        [output] = self.engine.generate(TokensPrompt(prompt_token_ids=sequence), settings, use_tqdm=False)
        found = output.prompt_logprobs  # none at the first position, then the token's own and all, highest first
        tokens, values = (torch.tensor(flat).view(len(sequence) - 1, -1) for flat in (found.token_ids, found.logprobs))
        return SimpleNamespace(logits=torch.zeros(len(tokens), int(tokens.max()) + 1).scatter_(1, tokens, values)[None])


def autogptq_layers(model: nn.Module) -> dict[str, Any]:
    """The layers that auto-gptq keeps packed."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "qweight")}


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


def _decoded_by_multiplying(module: Any) -> torch.Tensor:
    """(O, I) of a module that offers nothing but its product."""
    bias = 0 if module.bias is None else module.bias
    return (module(torch.eye(module.infeatures, dtype=module.scales.dtype)) - bias).T.float()


def _weight(module: Any) -> torch.Tensor:
    return module.weight.float()


PACKED = {"gptq": ".qweight", "compressed-tensors": ".weight_packed"}
# by the package that tells the environments apart, and by format
READERS = {
    "gptqmodel": {
        "gptq": [
            # GPTQModel's reference kernel refuses float32
            Reader("gptqmodel-torch", torch.float16, load_gptqmodel("gptq_torch"), gptqmodel_layers, _decoded),
            Reader("gptqmodel-auto", torch.float16, load_gptqmodel("auto"), gptqmodel_layers, _decoded),
            Reader("transformers", torch.float32, load_transformers, gptqmodel_layers, _decoded),
        ]
    },
    "auto_gptq": {
        "gptq": [Reader("auto-gptq", torch.float32, load_autogptq, autogptq_layers, _decoded_by_multiplying)],
    },
    "llmcompressor": {
        "compressed-tensors": [
            Reader("compressed-tensors", torch.float16, load_transformers, decompressed_layers, _weight)
        ]
    },
    "vllm": {
        "gptq": [Reader("vllm", torch.float16, VllmModel)],
        "compressed-tensors": [Reader("vllm", torch.float16, VllmModel)],
    },
}


def tensor_names(path: Path) -> set[str]:
    """Of every tensor in a safetensors file, or in all of a folder; no data is read."""
    names: set[str] = set()
    for file in path.glob("*.safetensors") if path.is_dir() else [path]:
        with safe_open(file, "pt") as handle:
            names |= set(handle.keys())
    return names


def quantized_layers(layers: dict[str, Any], packed: set[str]) -> dict[str, Any]:
    """The layers the reader unpacked, by name. Raises WrongReading if others are packed on disk."""
    if not packed or layers.keys() != packed:
        odd = sorted(layers.keys() ^ packed)[:4]
        raise WrongReading(f"{len(packed)} layers packed on disk, {len(layers)} in the model; only in one: {odd}")
    return layers


def compare_weights(
    reading: Reading, layers: dict[str, Any], decode: Callable[[Any], torch.Tensor], twin: Twin
) -> None:
    """Fill in weight_ratio, worst_layer and zero_share. Before the first forward: kernels repack then."""
    ratios, zeros, total = {}, 0, 0
    for name, module in layers.items():
        decoded = decode(module)
        truth = twin.weights[f"{name}.weight"].float()
        ratio = (decoded - truth).abs() / (twin.rounding(name) * truth.abs() + SMALLEST)
        ratios[name] = ratio.nan_to_num(nan=torch.inf).max().item()
        zeros += int((decoded == 0).sum())
        total += decoded.numel()
    reading.worst_layer = max(ratios, key=ratios.__getitem__)
    reading.weight_ratio = ratios[reading.worst_layer]
    reading.zero_share = zeros / total


def compare_logits(reading: Reading, logits: torch.Tensor, truth: torch.Tensor) -> None:
    """Fill in the largest difference between two sets of logits (1, tokens, vocabulary); the first may end earlier."""
    truth = truth[:, : logits.shape[1]]
    reading.max_abs_diff = (logits - truth).abs().max().item()
    reading.max_abs_logit = truth.abs().max().item()
    reading.relative = reading.max_abs_diff / reading.max_abs_logit
    reading.argmax_agreement = (logits.argmax(-1) == truth.argmax(-1)).float().mean().item()


def read(reader: Reader, folder: Path, form: str, twin: Twin) -> Reading:
    """Load with one reader and compare; what it raises becomes the reading's error: the others still run."""
    reading = Reading(checkpoint=str(folder), reader=reader.name, dtype=str(reader.dtype).removeprefix("torch."))
    suffix = PACKED[form]
    packed = {name.removesuffix(suffix) for name in tensor_names(folder) if name.endswith(suffix)}
    try:
        reading.tolerance = LOGIT_ROUNDINGS * max(twin.rounding(name) for name in packed)
        model = reader.load(folder, reader.dtype).eval()
        reading.note = getattr(model, "note", None)
        if reader.layers is None or reader.decode is None:
            reading.decodes = False
        else:
            layers = quantized_layers(reader.layers(model), packed)
            reading.kernels = dict(Counter(type(module).__name__ for module in layers.values()))
            compare_weights(reading, layers, reader.decode, twin)
        compare_logits(reading, model(twin.ids).logits.float(), twin.logits)
    except Exception as error:
        reading.error = f"{type(error).__name__}: {error}"
    return reading


def versions() -> dict[str, str]:
    """Of the packages that matter here, as far as they are installed."""
    found = {}
    for package in (
        "gptqmodel",
        "optimum",
        "auto-gptq",
        "vllm-cpu",
        "compressed-tensors",
        "transformers",
        "torch",
    ):
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
    kernels = "".join(f"; {count} {name}" for name, count in reading.kernels.items())
    weights = (
        f"worst weight off by {reading.weight_ratio:.3g} roundings, in {reading.worst_layer}; "
        f"{reading.zero_share:.1%} zeros"
        if reading.decodes
        else "weights not compared"
    )
    print(
        f"{verdict}: {reading.reader} ({reading.dtype}{kernels}): "
        f"logits differ by {reading.max_abs_diff:.3g} of {reading.max_abs_logit:.3g}, "
        f"relative {reading.relative:.2g} (at most {reading.tolerance:.2g}), "
        f"argmax agrees on {reading.argmax_agreement:.1%}; {weights}",
        file=sys.stderr,
    )


def load_twin(folder: Path) -> Twin:
    """What lies beside a checkpoint."""
    reference = load_file(folder.parent / "reference.safetensors")
    weights: dict[str, torch.Tensor] = {}
    for file in sorted((folder.parent / "dense").glob("*.safetensors")):
        weights |= load_file(file)
    return Twin(weights, reference["ids"], reference["logits"])


@torch.inference_mode()
def main() -> int:
    """Compare every reader with the dense twins; 0 if all agree."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoints", type=Path, nargs="+", help="folders of quantized checkpoints")
    arguments = parser.parse_args()
    [readers] = [forms for package, forms in READERS.items() if find_spec(package)]
    all_passed = True
    for folder in arguments.checkpoints:
        settings = json.loads((folder / "config.json").read_text())["quantization_config"]
        form, twin = settings["quant_method"], load_twin(folder)
        for reader in readers[form]:
            if reader.name == "transformers" and settings.get("dynamic"):
                print(f"{folder}: transformers takes layers that are left out for quantized", file=sys.stderr)
                continue
            reading = read(reader, folder, form, twin)
            report(reading)
            all_passed = all_passed and reading.passed()
    return 0 if all_passed else 1


if __name__ == "__main__":
    raise SystemExit(main())
