"""Checkpoints of Llama's architecture with random weights, dense or quantized, written block by block.

Arithmetic takes as long on random numbers as on learned ones; quality means nothing. The embedded model gives the
tokenizer.
"""

import contextlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig

from ctp_cli.checkpoints.formats import LayerFormat
from ctp_cli.compression.solver import Codes
from ctp_cli.models.resolve import resolve_model


def llama_config(*, layers: int, hidden: int, wide: int, vocabulary: int, head: int = 128) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=wide,
        num_hidden_layers=layers,
        num_attention_heads=hidden // head,
        vocab_size=vocabulary,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )


def like_llama_7b(folder: Path, *, layers: int, hidden: int) -> LlamaConfig:
    """LLaMA-7B's proportions, with the vocabulary of the tokenizer that is written into `folder`."""
    return llama_config(layers=layers, hidden=hidden, wide=hidden * 43 // 16, vocabulary=write_tokenizer(folder))


@contextlib.contextmanager
def kept_or_temporary(folder: Path | None) -> Iterator[Path]:
    """The folder that was asked for, or one that is removed."""
    with contextlib.nullcontext(str(folder)) if folder else tempfile.TemporaryDirectory() as path:
        yield Path(path)


def write_tokenizer(folder: Path) -> int:
    """The embedded model's, into `folder`. Returns the number of its tokens."""
    tokenizer = AutoTokenizer.from_pretrained(resolve_model("smollm2-135m").path)
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


def write_checkpoint(folder: Path, config: LlamaConfig, form: LayerFormat | None = None, *, pruned: float = 0.0) -> int:
    """A shard per block, and one for embeddings and head; linear layers in `form`, or dense. Returns the bytes written.

    The same seed gives the same codes in every format; `pruned` is the share of codes that stand for zero.
    """
    generator = torch.Generator().manual_seed(0)
    width, wide = config.hidden_size, config.intermediate_size

    def weight(outputs: int, inputs: int) -> Tensor:
        return torch.randn(outputs, inputs, dtype=torch.bfloat16, generator=generator).mul_(inputs**-0.5)

    def linear(name: str, outputs: int, inputs: int) -> dict[str, Tensor]:
        if form is None:
            return {f"{name}.weight": weight(outputs, inputs)}
        return form.pack(name, random_codes(form, outputs, inputs, pruned, generator))

    def block(index: int) -> dict[str, Tensor]:
        shapes = {f"self_attn.{name}_proj": (width, width) for name in "qkvo"}
        shapes |= {"mlp.gate_proj": (wide, width), "mlp.up_proj": (wide, width), "mlp.down_proj": (width, wide)}
        tensors: dict[str, Tensor] = {}
        for name, shape in shapes.items():
            tensors |= linear(f"model.layers.{index}.{name}", *shape)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{index}.{norm}.weight"] = torch.ones(width, dtype=torch.bfloat16)
        return tensors

    def rest() -> dict[str, Tensor]:
        tables = {f"{name}.weight": weight(config.vocab_size, width) for name in ("model.embed_tokens", "lm_head")}
        return tables | {"model.norm.weight": torch.ones(width, dtype=torch.bfloat16)}

    prefix = "model" if form is None else form.weights_prefix
    index: dict[str, str] = {}
    count = config.num_hidden_layers + 1
    for number in range(count):
        tensors = block(number) if number < config.num_hidden_layers else rest()
        file = f"{prefix}-{number + 1:05d}-of-{count:05d}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, file)
    (folder / f"{prefix}.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    if form is not None:
        config.quantization_config = form.to_config()
    config.save_pretrained(folder)
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def random_codes(form: LayerFormat, outputs: int, inputs: int, pruned: float, generator: torch.Generator) -> Codes:
    """Symmetric codes whose values have about the variance that keeps activations as large as they were."""
    middle, groups = 2 ** (form.bits - 1), max(inputs // form.group_size, 1) if form.group_size > 0 else 1
    codes_OI = torch.randint(0, 2 * middle, (outputs, inputs), dtype=torch.uint8, generator=generator)
    if pruned:
        codes_OI[torch.rand(outputs, inputs, generator=generator) < pruned] = middle
    return Codes(
        codes_OI,
        torch.full((outputs, groups), 1.7 / middle * inputs**-0.5).half().float(),
        torch.full((outputs, groups), middle, dtype=torch.uint8),
        (torch.arange(inputs) // (inputs // groups)).int(),
    )
