"""A quantized checkpoint in another format: the same codes, laid out anew, file by file."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ctp_cli.checkpoints.formats import LayerFormat
from ctp_cli.checkpoints.parts import reading


def converted_files(
    files: dict[str, Path], source: LayerFormat, target: LayerFormat | None, *, dtype: torch.dtype, transposed: set[str]
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Name and tensors of every weight file of the checkpoint in its new format; dense layers in `dtype`.

    `files`: tensor name -> file. Layers in `transposed` are stored (in, out) where they are dense.
    Raises: InputError if a layer is not whole, or the new format cannot hold it.
    """
    layers: dict[str, dict[str, Path]] = {}
    for name, file in files.items():
        layer, _, part = name.rpartition(".")
        if part in source.parts:
            layers.setdefault(layer, {})[part] = file
    packed = {f"{layer}.{part}" for layer, parts in layers.items() for part in parts}
    prefix, count = "model" if target is None else target.weights_prefix, len(set(files.values()))
    for number, file in enumerate(sorted(set(files.values())), start=1):
        with reading(file) as handle:
            tensors = {name: handle.get_tensor(name) for name in handle.keys() if name not in packed}  # noqa: SIM118
        for layer, parts in layers.items():
            if max(parts.values()) == file:  # a layer goes where the last of its parts was
                tensors |= _converted(layer, _read(layer, parts), source, target, dtype, layer in transposed)
        if tensors:
            yield f"{prefix}-{number:05}-of-{count:05}.safetensors", tensors


def _read(layer: str, parts: dict[str, Path]) -> dict[str, Tensor]:
    read = {}
    for part, file in parts.items():
        with reading(file) as handle:
            read[part] = handle.get_tensor(f"{layer}.{part}")
    return read


def _converted(
    layer: str, parts: dict[str, Tensor], source: LayerFormat, target: LayerFormat | None, dtype: Any, transposed: bool
) -> dict[str, Tensor]:
    codes = source.unpack(layer, parts)
    if target is None:
        weight_OI = codes.values().to(dtype)
        return {f"{layer}.weight": weight_OI.T.contiguous() if transposed else weight_OI}
    outputs, inputs = codes.codes_OI.shape
    target.check_layer(layer, out_features=outputs, in_features=inputs)
    return target.pack(layer, codes)
