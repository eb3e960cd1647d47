"""What every format of quantized layers offers, and which one a checkpoint is in.

O=out_features G=groups
"""

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from safetensors import safe_open
from torch import Tensor

from ctp_cli.checkpoints.compressed_tensors import CompressedTensorsSettings
from ctp_cli.checkpoints.gptq import GPTQSettings
from ctp_cli.checkpoints.packed import PackedSettings
from ctp_cli.compression.solver import Codes
from ctp_cli.errors import InputError


class LayerFormat(Protocol):
    """The settings of one checkpoint; a layer's parts are tensors under its name."""

    name: ClassVar[str]
    weights_prefix: ClassVar[str]
    """Of the names of weight files and of their index."""
    parts: ClassVar[tuple[str, ...]]
    """All that a layer may have; the first is what it must have."""

    @property
    def bits(self) -> int: ...

    @property
    def group_size(self) -> int: ...

    @property
    def symmetric(self) -> bool: ...

    def check_layer(self, name: str, *, out_features: int, in_features: int) -> None:
        """Raises InputError for a layer whose sizes the format cannot hold."""

    def scattered(self, names: Collection[str]) -> bool:
        """Whether some layer's groups are no runs of inputs; `names` are those of the checkpoint's tensors."""

    def pack(self, name: str, codes: Codes) -> dict[str, Tensor]:
        """A layer's tensors under their names on disk."""

    def unpack(self, name: str, parts: dict[str, Tensor]) -> Codes:
        """The codes of one layer from its parts. Raises InputError if they do not go together."""

    def scaled(self, parts: dict[str, Tensor], factors_OG: Tensor) -> dict[str, Tensor]:
        """The same layer with scales times these factors."""

    def to_config(self) -> dict[str, Any]:
        """As it stands in config.json."""


FORMATS: dict[str, type[GPTQSettings] | type[PackedSettings] | type[CompressedTensorsSettings]] = {
    format.name: format for format in (GPTQSettings, PackedSettings, CompressedTensorsSettings)
}


def format_of(config: dict[str, Any], path: Path) -> LayerFormat:
    """The format that a quantization_config names. Raises InputError for another method, or for senseless settings."""
    method = config.get("quant_method")
    known = FORMATS.get(str(method))
    if known is None:
        raise InputError(
            f"{path}: quantized by {method!r}, which ctp cannot read",
            hint=f"readable are dense, {', '.join(FORMATS)} checkpoints",
        )
    return known.from_config(config, path)


def same_in(name: str, source: LayerFormat, *, scattered: bool) -> LayerFormat | None:
    """The settings of the same codes in the format called `name`, None for dense weights.

    `scattered`: some layer's groups are no runs of inputs.
    """
    if name == "dense":
        return None
    if name == source.name:
        return source
    if name == PackedSettings.name:
        return PackedSettings(source.bits, source.group_size, source.symmetric)
    if name == CompressedTensorsSettings.name:
        return CompressedTensorsSettings(source.bits, source.group_size, source.symmetric)
    return GPTQSettings(
        bits=source.bits,
        group_size=source.group_size,
        symmetric=source.symmetric,
        desc_act=scattered,
        zero_offset=1 if source.symmetric else 0,
    )


def read_dense_state(
    files: Mapping[str, Path], form: LayerFormat, *, dtype: torch.dtype, transposed: set[str]
) -> dict[str, Tensor]:
    """All tensors of a checkpoint, packed layers dequantized to `dtype`; layers in `transposed` as (in, out).

    `files`: tensor name -> file.
    """
    state: dict[str, Tensor] = {}
    for name, read in _layers_and_rest(files, form):
        if isinstance(read, dict):
            state[f"{name}.weight"] = _dense(name, read, form, dtype, name in transposed)
        else:
            state[name] = read.to(dtype) if read.is_floating_point() else read
    return state


def read_packed_state(
    files: Mapping[str, Path], form: LayerFormat, *, dtype: torch.dtype
) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]], PackedSettings]:
    """All other tensors of a checkpoint in `dtype`, and each packed layer's parts as format ctp has them.

    `files`: tensor name -> file.
    Raises: InputError if a layer is not whole, or format ctp cannot hold it.
    """
    target = same_in(PackedSettings.name, form, scattered=False)
    assert isinstance(target, PackedSettings)
    rest: dict[str, Tensor] = {}
    layers: dict[str, dict[str, Tensor]] = {}
    for name, read in _layers_and_rest(files, form):
        if not isinstance(read, dict):
            rest[name] = read.to(dtype) if read.is_floating_point() else read
            continue
        if form is target:
            target.check_parts(name, read)
            parts = read
        else:
            codes = form.unpack(name, read)
            outputs, inputs = codes.codes_OI.shape
            target.check_layer(name, out_features=outputs, in_features=inputs)
            parts = target.pack(name, codes)
        layers[name] = {part.rpartition(".")[2]: tensor for part, tensor in parts.items()}
    return rest, layers, target


def _layers_and_rest(files: Mapping[str, Path], form: LayerFormat) -> Iterator[tuple[str, Tensor | dict[str, Tensor]]]:
    """Name and tensor, or name and parts of a packed layer as soon as all of them are read."""
    packed: dict[str, dict[str, Tensor]] = {}
    for name, tensor in _tensors(files):
        layer, _, part = name.rpartition(".")
        if part not in form.parts:
            yield name, tensor
            continue
        packed.setdefault(layer, {})[part] = tensor
        if len(packed[layer]) == len(form.parts):
            yield layer, packed.pop(layer)
    yield from packed.items()  # parts that a format leaves out where they say nothing


def _dense(layer: str, parts: dict[str, Tensor], form: LayerFormat, dtype: torch.dtype, transposed: bool) -> Tensor:
    values_OI = form.unpack(layer, parts).values().to(dtype)
    return (values_OI.T if transposed else values_OI).contiguous()


def _tensors(files: Mapping[str, Path]) -> Iterator[tuple[str, Tensor]]:
    """Those that the index names, where it says they are: other files may lie beside."""
    for file in sorted(set(files.values())):
        with safe_open(file, "pt") as handle:
            for name in handle.keys():  # noqa: SIM118 - not a dict
                if files.get(name) == file:
                    yield name, handle.get_tensor(name)
