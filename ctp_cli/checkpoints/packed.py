"""Checkpoints of format `ctp`: pruned weights take one bit each.

Per layer (O outputs, I inputs, G groups), whichever layout is smallest:

- dense: `codes` uint8 (O, I * bits / 8), a little-endian bit stream per output;
- bitmap: `mask` uint8 (O, I / 8), bit i % 8 of byte i / 8 set where weight i is stored, and `codes` uint8 (bytes,),
  the stored codes of every output as a bit stream that begins on a byte of its own;
- n:m: the same with exactly n of every m weights stored, and so `codes` (O, bytes).

Beside them `scales` float16 (O, G), `zeros` uint8 (O, G) where the grid is asymmetric, and `g_idx` int32 (I,) where
groups are no runs of inputs. A weight that is not stored has its group's zero point as code. Weight files are called
ctp-*.safetensors: a reader that does not know the format finds no weights instead of reading wrong ones.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from ctp_kernels.ragged import pack_bits, pack_kept, row_starts, unpack_bits, unpack_kept
from torch import Tensor

from ctp_cli.checkpoints.parts import (
    check_symmetric,
    check_there,
    float16_scales,
    groups_fit,
    known_bits,
    middle_zeros,
    misfit,
    runs_of_inputs,
    whole_number,
)
from ctp_cli.compression.solver import Codes
from ctp_cli.errors import InputError

_VERSION = 1


@dataclass(frozen=True)
class PackedSettings:
    """The settings a reader needs. group_size -1: one group per output row."""

    name: ClassVar[str] = "ctp"
    weights_prefix: ClassVar[str] = "ctp"
    parts: ClassVar[tuple[str, ...]] = ("codes", "mask", "scales", "zeros", "g_idx")

    bits: int
    group_size: int
    symmetric: bool
    run: tuple[int, int] | None = None
    """(n, m) where the model is n:m sparse."""

    def to_config(self) -> dict[str, Any]:
        return {
            "quant_method": self.name,
            "version": _VERSION,
            "bits": self.bits,
            "group_size": self.group_size,
            "sym": self.symmetric,
            "sparsity": None if self.run is None else f"{self.run[0]}:{self.run[1]}",
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], path: Path) -> "PackedSettings":
        """Raises InputError for a later version, or for settings that are missing or make no sense."""
        bits, group, sparsity = config.get("bits"), config.get("group_size"), config.get("sparsity")
        run = re.fullmatch(r"([1-9]\d?):([1-9]\d?)", sparsity) if isinstance(sparsity, str) else None
        if config.get("version") != _VERSION:
            raise InputError(
                f"{path}: version {config.get('version')!r} of format ctp, this is {_VERSION}",
                hint="use the ctp that made it, or a later one",
            )
        if not known_bits(bits) or not whole_number(group, least=-1) or (sparsity is not None and run is None):
            raise InputError(f"{path}: ctp settings bits={bits!r}, group_size={group!r}, sparsity={sparsity!r}")
        return cls(bits, group, bool(config.get("sym", True)), (int(run[1]), int(run[2])) if run else None)

    def check_layer(self, name: str, *, out_features: int, in_features: int) -> None:
        if in_features % 8:
            raise InputError(
                f"{name}: {in_features} inputs are no multiple of 8, which format ctp needs",
                hint="use --format dense",
            )

    def scattered(self, names: Collection[str]) -> bool:
        return any(name.endswith(".g_idx") for name in names)

    def pack(self, name: str, codes: Codes) -> dict[str, Tensor]:
        outputs, inputs = codes.codes_OI.shape
        index = codes.g_idx_I.long()
        keep_OI = codes.codes_OI != codes.zeros_OG[:, index]
        runs = self.run if self.run is not None and _fits(keep_OI, self.run) else None
        if runs is not None:
            keep_OI = _filled(keep_OI, runs)
        sparse_bytes = outputs * inputs // 8 + int(((keep_OI.sum(1) * self.bits + 7) // 8).sum())
        parts = {f"{name}.scales": float16_scales(name, codes.scales_OG)}
        if sparse_bytes < outputs * inputs * self.bits // 8:
            parts[f"{name}.mask"] = pack_bits(keep_OI)
            stream = pack_kept(codes.codes_OI, keep_OI, self.bits)
            parts[f"{name}.codes"] = stream if runs is None else stream.view(outputs, -1)
        else:
            every_OI = torch.ones_like(keep_OI)
            parts[f"{name}.codes"] = pack_kept(codes.codes_OI, every_OI, self.bits).view(outputs, -1)
        if self.symmetric:
            check_symmetric(name, codes.zeros_OG, self.bits)
        else:
            parts[f"{name}.zeros"] = codes.zeros_OG
        in_runs = torch.equal(codes.g_idx_I.int(), runs_of_inputs(inputs, self.group_size))
        if not in_runs or not self._of_one_size(inputs, codes.scales_OG.shape[1]):
            parts[f"{name}.g_idx"] = codes.g_idx_I.int()
        return parts

    def unpack(self, name: str, parts: dict[str, Tensor]) -> Codes:
        zeros_OG, g_idx_I = self.check_parts(name, parts)
        every_OI = torch.ones(len(zeros_OG), len(g_idx_I), dtype=torch.bool)
        keep_OI = unpack_bits(parts["mask"]) if "mask" in parts else every_OI
        codes_OI = unpack_kept(parts["codes"].flatten(), keep_OI, self.bits)
        zero_codes_OI = zeros_OG[:, g_idx_I.long()]
        return Codes(torch.where(keep_OI, codes_OI, zero_codes_OI), parts["scales"].float(), zeros_OG, g_idx_I.int())

    def check_parts(self, name: str, parts: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Zero points (O, G) and groups (I,) of a layer, nothing unpacked. Raises InputError as `unpack` does."""
        check_there(name, self.name, parts, ("codes", "scales"))
        stored, scales_OG, mask_OB = parts["codes"], parts["scales"], parts.get("mask")
        wrong = misfit(name, self.name, parts, self.bits)
        if scales_OG.dim() != 2 or stored.dim() not in (1, 2) or stored.dtype != torch.uint8:
            raise wrong
        outputs, groups = scales_OG.shape
        if mask_OB is None:
            if stored.dim() != 2 or stored.shape[0] != outputs or stored.shape[1] * 8 % self.bits:
                raise wrong
            inputs = stored.shape[1] * 8 // self.bits
        else:
            if mask_OB.dim() != 2 or mask_OB.shape[0] != outputs or mask_OB.dtype != torch.uint8:
                raise wrong
            inputs = mask_OB.shape[1] * 8
        if not outputs * groups * inputs or inputs % 8:  # before anything of these sizes is made
            raise wrong
        if mask_OB is not None and int(row_starts(mask_OB, self.bits)[-1]) != stored.numel():
            raise wrong
        g_idx_I = parts.get("g_idx", runs_of_inputs(inputs, self.group_size))
        middle_OG = middle_zeros(outputs, groups, self.bits)
        zeros_OG = middle_OG if self.symmetric else parts.get("zeros", torch.empty(0))
        if zeros_OG.shape != middle_OG.shape or zeros_OG.dtype != torch.uint8 or int(zeros_OG.max()) >= 2**self.bits:
            raise wrong
        if self.symmetric and "zeros" in parts:
            raise wrong
        if not groups_fit(g_idx_I, inputs, groups):
            raise wrong
        if "g_idx" not in parts and not self._of_one_size(inputs, groups):
            raise wrong
        return zeros_OG, g_idx_I

    def _of_one_size(self, inputs: int, groups: int) -> bool:
        """As groups are where none are stored."""
        return groups == 1 if self.group_size <= 0 or inputs <= self.group_size else inputs == groups * self.group_size

    def scaled(self, parts: dict[str, Tensor], factors_OG: Tensor) -> dict[str, Tensor]:
        return {**parts, "scales": (parts["scales"].float() * factors_OG).half()}


def _fits(keep_OI: Tensor, run: tuple[int, int]) -> bool:
    n, m = run
    return keep_OI.shape[1] % m == 0 and bool((keep_OI.view(keep_OI.shape[0], -1, m).sum(2) <= n).all())


def _filled(keep_OI: Tensor, run: tuple[int, int]) -> Tensor:
    """Exactly n in every run of m: kept weights may have been rounded to zero, and their places are stored still."""
    n, m = run
    runs = keep_OI.view(keep_OI.shape[0], -1, m)
    lacking = n - runs.sum(2, keepdim=True)
    return (runs | ((~runs).cumsum(2) <= lacking) & ~runs).view(keep_OI.shape)
