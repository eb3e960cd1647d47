"""A model of which only what is in turn is in memory: decoder blocks are read from the checkpoint one by one."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from ctp_cli.errors import InputError, UnsupportedModelError
from ctp_cli.models.blocks import Block, find_blocks
from ctp_cli.models.loading import (
    Promise,
    check_size,
    check_weight_files,
    damaged,
    dense_skeleton,
    load_config,
    load_model,
    packed_format,
    quiet_transformers,
    refuse_missing,
    unusable_weights_are_said,
    weight_files,
)

_MOST_PACKED = 16
"""Weights that one stored number holds: 2 bits each in 32."""


@dataclass(frozen=True)
class _Stored:
    """A tensor of the checkpoint."""

    name: str
    file: Path
    shape: tuple[int, ...]


class BlockStream:
    """The decoder blocks of a model, of which at most one has its weights in memory."""

    def __init__(self, network: PreTrainedModel, stored: list[_Stored], device: str) -> None:
        self.network, self.blocks = network, find_blocks(network)
        self._device = device
        self._open: Block | None = None
        self._sources = {name: _source(name, tensor, stored) for name, tensor in _tensors(network) if tensor.is_meta}
        in_blocks = tuple(f"{block.name}." for block in self.blocks)
        rest = {name: source for name, source in self._sources.items() if not name.startswith(in_blocks)}
        _exchange(network, dict(self._read(network, rest)))
        _exchange(network, {name: tensor.to(device) for name, tensor in _tensors(network) if not tensor.is_meta})

    def open(self, block: Block) -> None:
        """Read a block's weights, unless they are in memory, and forget those of the block before it."""
        if self._open is not None and self._open.index == block.index:
            return
        self.close()
        self._open = block
        _exchange(block.module, dict(self._read(block.module, self._of(block))))

    def take(self, block: Block) -> nn.Module:
        """A block with its weights, which are the caller's from then on; they take no memory from here."""
        _exchange(block.module, dict(self._read(block.module, self._of(block))))
        return block.module

    def close(self) -> None:
        """Forget the weights of the block that is in memory, and what was done to them."""
        if self._open is not None:
            _forget(self._open.module, self._of(self._open))
            self._open = None

    def forget_the_rest(self) -> None:
        """Forget embeddings, head and whatever else belongs to no block; only blocks can be run from then on."""
        prefixes = tuple(f"{block.name}." for block in self.blocks)
        names = {name for name, x in _tensors(self.network) if isinstance(x, nn.Parameter)}
        _forget(self.network, {name for name in names if not name.startswith(prefixes)})

    def _of(self, block: Block) -> dict[str, _Stored]:
        prefix = f"{block.name}."
        return {name.removeprefix(prefix): s for name, s in self._sources.items() if name.startswith(prefix)}

    def _read(self, module: nn.Module, sources: Mapping[str, _Stored]) -> Iterator[tuple[str, Tensor]]:
        """Tensors as they are in the files, in the dtypes and on the device they are to have here.

        On the CPU they are views of the mapped file, private to this process. It is opened for each block anew: what is
        written into such a view takes memory until no tensor is left of the mapping.
        """
        wanted = dict(_tensors(module))
        for file in sorted({source.file for source in sources.values()}):
            try:
                with safe_open(file, "pt") as handle:
                    for name, source in sources.items():
                        if source.file == file:
                            tensor = handle.get_tensor(source.name).to(self._device, wanted[name].dtype)
                            # a copy of the block copies the storages of its buffers whole
                            yield name, tensor if isinstance(wanted[name], nn.Parameter) else tensor.clone()
            except (SafetensorError, OSError) as error:
                raise damaged(file, error) from None


def stream_model(path: Path, *, dtype: torch.dtype | None = None, device: str = "cpu") -> BlockStream:
    """What `load_model` gives, with the weights of all blocks on the meta device until their turn.

    `dtype` None keeps the checkpoint's. Buffers that no checkpoint holds are made by transformers, as ever.
    Raises InputError for a missing, damaged or unsupported checkpoint; UnsupportedModelError for a family whose weights
    are merged or split as they are loaded.
    """
    config = load_config(path)
    values = check_weight_files(path)
    with unusable_weights_are_said(path):
        skeleton, _ = dense_skeleton(config)
        check_size(path, skeleton, values)
        stored = list(_stored_tensors(path))
        names = [one for one, _ in stored]
        return BlockStream(_with_promises(path, skeleton, stored, dtype or _dtype(config, names)), names, device)


def load_without_blocks(path: Path) -> PreTrainedModel:
    """What `load_model` gives, but the blocks' weights are on the meta device for good: nothing of them is read.

    Quantized checkpoints are welcome. Raises InputError for a missing, damaged or unsupported checkpoint.
    """
    config = load_config(path)
    form = packed_format(config, path)
    values = check_weight_files(path)
    with unusable_weights_are_said(path):
        skeleton, _ = dense_skeleton(config)
        check_size(path, skeleton, values * (1 if form is None else _MOST_PACKED))
        stored = list(_stored_tensors(path))
        if form is None:
            return _with_promises(path, skeleton, stored, _dtype(config, [one for one, _ in stored]))
        shapes = {name: tuple(tensor.shape) for name, tensor in _tensors(skeleton)}
        layers = {layer for layer, _, part in (one.name.rpartition(".") for one, _ in stored) if part == form.parts[0]}
        if unknown := sorted(layer for layer in layers if f"{layer}.weight" not in shapes):
            raise InputError(f"{path}: {unknown[0]} is no layer of the model", hint="does config.json belong to it?")
        parts = {f"{layer}.{part}" for layer in layers for part in form.parts}
        stored = [(one, tensor) for one, tensor in stored if one.name not in parts]
        stored += [
            (_Stored(name, path, shapes[name]), None) for name in (f"{layer}.weight" for layer in sorted(layers))
        ]
        return _with_promises(path, skeleton, stored, config.dtype or torch.float16)


def _with_promises(
    path: Path, skeleton: PreTrainedModel, stored: list[tuple[_Stored, Tensor | None]], dtype: torch.dtype
) -> PreTrainedModel:
    """Load the tensors that are there; those that are None are promised."""
    state: dict[str, Any] = {
        one.name: Promise(number, one.shape) if tensor is None else tensor
        for number, (one, tensor) in enumerate(stored, 1)
    }
    with quiet_transformers():
        factory: Any = type(skeleton)  # the Auto class insists on a path
        network, info = factory.from_pretrained(
            None, config=skeleton.config, state_dict=state, dtype=dtype, output_loading_info=True
        )
    refuse_missing(path, info["missing_keys"])
    if network.can_generate():
        network.generation_config = _generation_config(path)
    loaded: PreTrainedModel = network.eval().requires_grad_(False)
    return loaded


def _stored_tensors(path: Path) -> Iterator[tuple[_Stored, Tensor | None]]:
    """Whatever lies in a list, as decoder blocks do, is promised; of the rest, tied weights have to be compared."""
    for file in sorted(set(weight_files(path).values())):
        with safe_open(file, "pt") as handle:
            for name in handle.keys():  # noqa: SIM118 - not a dict
                in_list = any(part.isdigit() for part in name.split("."))
                stored = _Stored(name, file, tuple(handle.get_slice(name).get_shape()))
                yield stored, None if in_list else handle.get_tensor(name)


def _read_one(stored: _Stored) -> Tensor:
    with safe_open(stored.file, "pt") as handle:
        tensor: Tensor = handle.get_tensor(stored.name)
    return tensor


def _dtype(config: Any, stored: list[_Stored]) -> torch.dtype:
    """The configuration's, or that of the first weights stored."""
    if config.dtype is not None:
        named: torch.dtype = config.dtype
        return named
    floating = (tensor.dtype for tensor in map(_read_one, stored) if tensor.is_floating_point())
    return next(floating, torch.float32)


def _generation_config(path: Path) -> GenerationConfig:
    """As `from_pretrained` with a path has it, which sees to this file itself."""
    try:
        return GenerationConfig.from_pretrained(path)
    except OSError:
        return GenerationConfig.from_pretrained(path, config_file_name="config.json", _from_model_config=True)


def _source(name: str, tensor: Tensor, stored: list[_Stored]) -> _Stored:
    number = tensor.storage_offset() - 1
    if 0 <= number < len(stored) and stored[number].shape == tuple(tensor.shape):
        return stored[number]
    raise UnsupportedModelError(
        f"{name}: no tensor of the checkpoint as it stands, but made of others as they are loaded",
        hint="save the model with tensors named and shaped as transformers has them in memory",
    )


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and buffer under all of its names; tied ones have several."""
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _exchange(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put tensors in place of those named so; what was one parameter under several names stays one."""
    exchanged: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}
    for name, tensor in tensors.items():
        owner, _, last = name.rpartition(".")
        place = module.get_submodule(owner)
        before = place._parameters.get(last)
        if before is None:
            place._buffers[last] = tensor
        else:  # kept beside the new one, lest its id be taken anew
            pair = exchanged.setdefault(id(before), (before, nn.Parameter(tensor, requires_grad=False)))
            place._parameters[last] = pair[1]


def _forget(module: nn.Module, names: Collection[str]) -> None:
    _exchange(module, {name: torch.empty_like(x, device="meta") for name, x in _tensors(module) if name in names})


class WholeModel:
    """What `BlockStream` offers, of a model that is loaded whole: for what needs all of it at once."""

    def __init__(self, path: Path, *, device: str) -> None:
        self.network = load_model(path, device=device)
        self.blocks = find_blocks(self.network)

    def open(self, block: Block) -> None: ...

    def close(self) -> None: ...

    def forget_the_rest(self) -> None: ...
