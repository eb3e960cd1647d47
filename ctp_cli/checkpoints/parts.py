"""What the formats of quantized layers share: files, groups, zero points, and how parts that do not fit are refused.

O=out_features I=in_features G=groups
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeGuard

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ctp_cli.errors import InputError

_HALF_ROUNDING = 2.0**-11 * 1.001
"""Of a number that float16 holds with all of its bits."""


@contextlib.contextmanager
def reading(file: Path, *, hint: str = "copy, download or make it again") -> Iterator[Any]:
    """The open file. Raises InputError where it is damaged, or lacks a tensor that is asked of it."""
    try:
        with safe_open(file, "pt") as handle:
            yield handle
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file}: damaged or cut off ({error})", hint=hint) from None


def runs_of_inputs(inputs: int, group_size: int) -> Tensor:
    """(I,) int32: the group of each input where groups are runs; group_size -1 is one group."""
    return torch.arange(inputs, dtype=torch.int32) // (group_size if group_size > 0 else max(inputs, 1))


def groups_fit(g_idx_I: Tensor, inputs: int, groups: int) -> bool:
    """Whether every input has a group, and one that exists."""
    return (
        inputs > 0
        and g_idx_I.shape == (inputs,)
        and g_idx_I.dtype in (torch.int32, torch.int64, torch.int16, torch.uint8, torch.int8)
        and 0 <= int(g_idx_I.min()) <= int(g_idx_I.max()) < groups
    )


def middle_zeros(outputs: int, groups: int, bits: int) -> Tensor:
    """(O, G) uint8: the zero points of a symmetric grid, which are not stored."""
    return torch.full((outputs, groups), 2 ** (bits - 1), dtype=torch.uint8)


def check_symmetric(layer: str, zeros_OG: Tensor, bits: int) -> None:
    """Raises InputError for zero points that a symmetric grid has not: not storing them would change weights."""
    if bool((zeros_OG != 2 ** (bits - 1)).any()):
        raise InputError(f"{layer}: said to be symmetric, but its zero points are not {2 ** (bits - 1)}")


def float16_scales(layer: str, scales_OG: Tensor) -> Tensor:
    """Raises InputError for scales that float16 does not reach with all its bits, as others' bfloat16 ones may be."""
    half_OG = scales_OG.half()
    off_OG = (half_OG.float() - scales_OG.float()).abs()
    if not bool((off_OG <= scales_OG.float().abs() * _HALF_ROUNDING).all()):
        raise InputError(f"{layer}: its scales are beyond float16, which this format stores", hint="use --format dense")
    return half_OG


def known_bits(value: object) -> TypeGuard[int]:
    """Whether a setting is a width that ctp has: not 4.0."""
    return type(value) is int and value in (2, 3, 4, 8)


def whole_number(value: object, *, least: int, most: int = 2**31) -> TypeGuard[int]:
    """Whether a setting is an integer of that range: not 4.0, and not true."""
    return type(value) is int and least <= value <= most


def check_whole_words(layer: str, form: str, *, out_features: int, in_features: int, bits: int) -> None:
    """Raises InputError for a layer whose sizes do not fill whole 32-bit words."""
    for what, size in (("inputs", in_features), ("outputs", out_features)):
        if size * bits % 32 or size % 32:
            raise InputError(
                f"{layer}: {size} {what} are no multiple of 32, which format {form} needs", hint="use --format dense"
            )


def check_there(layer: str, form: str, parts: dict[str, Tensor], needed: tuple[str, ...]) -> None:
    """Raises InputError naming the parts that are missing."""
    if missing := [part for part in needed if part not in parts]:
        raise InputError(f"{layer}: {', '.join(missing)} missing from the {form} checkpoint")


def misfit(layer: str, form: str, parts: dict[str, Tensor], bits: int) -> InputError:
    """The error for parts that do not go together."""
    shapes = ", ".join(f"{part} {tuple(tensor.shape)}" for part, tensor in parts.items())
    return InputError(
        f"{layer}: the shapes or contents of the {form} parts of this layer do not go together ({shapes}, {bits} bits)",
        hint="copy, download or make the checkpoint again",
    )
