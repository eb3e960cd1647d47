"""Write a compressed checkpoint shard by shard: a file per decoder block, embeddings and head in a file of their own.

Each shard is whole on disk before the next is begun, so that interrupted work goes on at the next block, and a
prompt can later be stitched in by replacing the one file that holds embeddings and head.
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.core_model_loading import revert_weight_conversion

from ctp_cli.checkpoints.formats import LayerFormat
from ctp_cli.checkpoints.older_readers import rotary_keys
from ctp_cli.checkpoints.parts import reading
from ctp_cli.compression.blockwise import LayerResult
from ctp_cli.files import read_json, whole_file, write_json
from ctp_cli.models.blocks import Block


@dataclass(frozen=True)
class ShardNames:
    """Shard 1 holds embeddings, head and everything outside of the blocks; shard i + 2 holds block i."""

    blocks: int
    settings: LayerFormat | None

    def outside(self) -> str:
        return self.block(-1)

    def block(self, index: int) -> str:
        return f"{_prefix(self.settings)}-{index + 2:05d}-of-{self.blocks + 1:05d}.safetensors"


def _prefix(settings: LayerFormat | None) -> str:
    return "model" if settings is None else settings.weights_prefix


def block_tensors(block: Block, results: Iterable[LayerResult], *, settings: LayerFormat | None) -> dict[str, Tensor]:
    """A block's tensors by name on disk; quantized layers as codes if `settings` are given, else as dense weights."""
    tensors = {f"{block.name}.{name}": tensor for name, tensor in block.module.state_dict().items()}
    if settings is not None:
        for result in results:
            assert result.solution.codes is not None
            del tensors[f"{result.layer.name}.weight"]
            tensors |= settings.pack(result.layer.name, result.solution.codes)
    return tensors


def restore_block(block: Block, path: Path, *, settings: LayerFormat | None) -> None:
    """Load a block's compressed weights back into the model, as `block_tensors` wrote them."""
    with _reading(path) as handle:
        for layer in block.layers:
            if settings is None:
                layer.parameter.data.copy_(handle.get_tensor(f"{layer.name}.weight"))
            else:
                layer.set_weight(settings.unpack(layer.name, _parts(handle, layer.name, settings)).values())


def _parts(handle: Any, layer: str, settings: LayerFormat) -> dict[str, Tensor]:
    held = set(handle.keys())
    return {part: handle.get_tensor(f"{layer}.{part}") for part in settings.parts if f"{layer}.{part}" in held}


def tuned_shards(
    folder: Path,
    model: PreTrainedModel,
    blocks: list[Block],
    factors_OG: Mapping[str, Tensor],
    *,
    settings: LayerFormat | None,
) -> Iterator[tuple[Path, dict[str, Tensor]]]:
    """Every shard of a tuned model and its tensors: codes from the shards in `folder`, all else from the model."""
    names = ShardNames(len(blocks), settings)
    yield folder / names.outside(), outside_tensors(model, blocks)
    for block in blocks:
        path = folder / names.block(block.index)
        tensors = {f"{block.name}.{name}": tensor for name, tensor in block.module.state_dict().items()}
        if settings is not None:
            with _reading(path) as handle:
                for layer in block.layers:
                    del tensors[f"{layer.name}.weight"]
                    packed = settings.scaled(_parts(handle, layer.name, settings), factors_OG[layer.name].cpu())
                    tensors |= {f"{layer.name}.{part}": tensor for part, tensor in packed.items()}
        yield path, tensors


def restore_parameters(model: PreTrainedModel, path: Path) -> None:
    """Load what `write_shard` made of the model's named parameters."""
    with _reading(path) as handle:
        for name, parameter in model.named_parameters():
            parameter.data.copy_(handle.get_tensor(name))


def outside_tensors(model: PreTrainedModel, blocks: list[Block]) -> dict[str, Tensor]:
    """Everything that belongs to no block; a tied head is left out, as save_pretrained does."""
    prefixes = tuple(f"{block.name}." for block in blocks)
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict().items():
        if not name.startswith(prefixes) and tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            tensors[name] = tensor
    names = _names_on_disk(model, list(tensors))
    return {names[name]: tensor for name, tensor in tensors.items()}


def _names_on_disk(model: PreTrainedModel, names: list[str]) -> dict[str, str]:
    """transformers 5 renamed modules (GPT-NeoX's embed_out is lm_head now); files keep the names all readers know."""
    with torch.device("meta"):
        # not the model itself, which would also restore peculiarities of the file it came from, such as no prefix
        fresh: Any = type(model)(model.config)
    return {name: next(iter(revert_weight_conversion(fresh, {name: torch.empty(0)}))) for name in names}


def _reading(shard: Path) -> contextlib.AbstractContextManager[Any]:
    return reading(shard, hint="remove this file and repeat the command: it is made again")


def write_shard(path: Path, tensors: Mapping[str, Tensor]) -> None:
    with whole_file(path) as beside:
        save_file(
            {name: t.detach().cpu().contiguous() for name, t in tensors.items()},
            beside,
            metadata={"format": "pt"},
        )


def write_index(folder: Path, *, settings: LayerFormat | None) -> int:
    """The index over all shards in `folder`, from their headers. Returns the bytes of all shard files."""
    prefix = _prefix(settings)
    weight_map: dict[str, str] = {}
    total = 0
    for file in sorted(folder.glob(f"{prefix}-*.safetensors")):
        with _reading(file) as handle:
            for name in handle.keys():  # noqa: SIM118 - not a dict
                weight_map[name] = file.name
        total += file.stat().st_size
    write_json(
        folder / f"{prefix}.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
    )
    return total


def write_configuration(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    settings: LayerFormat | None,
) -> None:
    """config.json, generation_config.json, tokenizer files, and quantize_config.json for format gptq."""
    model.config.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    _write_tokenizer(folder, tokenizer)
    keys = {"torch_dtype": str(model.dtype).removeprefix("torch."), **rotary_keys(model.config)}
    write_quantization(folder, {**read_json(folder / "config.json"), **keys}, settings)


def _write_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    config = read_json(file)
    # transformers 4 does not know the new names, transformers 5 knows both
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    write_json(file, config)


def write_quantization(folder: Path, config: dict[str, Any], settings: LayerFormat | None) -> None:
    """config.json with these settings and no others, and quantize_config.json, which older readers of gptq want."""
    config = {key: value for key, value in config.items() if key != "quantization_config"}
    if settings is not None:
        config["quantization_config"] = settings.to_config()
        if settings.name == "gptq":
            write_json(folder / "quantize_config.json", settings.to_config())
    write_json(folder / "config.json", config)


def parameter_count(model: PreTrainedModel) -> int:
    """Parameters, tied ones once."""
    return sum(parameter.numel() for parameter in {id(p): p for p in model.parameters()}.values())


def dtype_bits(dtype: torch.dtype) -> int:
    return torch.finfo(dtype).bits
