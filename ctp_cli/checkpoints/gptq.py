"""GPTQ checkpoints, v1 and v2: packed codes per layer, settings in two places.

Symmetric ones are written as v1, which every reader knows. Asymmetric ones are written as v2: GPTQModel refuses an
asymmetric v1 file that it did not make itself, because others have disagreed about its zero points.

O=out_features I=in_features G=groups
"""

import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from ctp_kernels.packing import pack_rows, unpack_rows
from torch import Tensor

from ctp_cli.checkpoints.parts import (
    check_there,
    check_whole_words,
    float16_scales,
    groups_fit,
    known_bits,
    misfit,
    runs_of_inputs,
    whole_number,
)
from ctp_cli.compression.solver import Codes
from ctp_cli.errors import InputError


@dataclass(frozen=True)
class GPTQSettings:
    """The settings a reader needs. group_size -1: one group per output row."""

    name: ClassVar[str] = "gptq"
    weights_prefix: ClassVar[str] = "model"
    parts: ClassVar[tuple[str, ...]] = ("qweight", "qzeros", "scales", "g_idx")

    bits: int
    group_size: int
    symmetric: bool
    desc_act: bool
    zero_offset: int = 1
    """v1 stores zero - 1, v2 stores zero."""
    dense: tuple[str, ...] = ()
    """Linear layers that are not quantized, beside lm_head."""
    # how the codes were found, which no reader needs; None is not known, and not said
    dampening: float | None = None
    true_sequential: bool | None = None
    static_groups: bool | None = None

    def to_config(self) -> dict[str, Any]:
        """As it stands in config.json and in quantize_config.json."""
        known: dict[str, Any] = {
            "quant_method": "gptq",
            "checkpoint_format": "gptq" if self.zero_offset else "gptq_v2",
            "bits": self.bits,
            "group_size": self.group_size,
            "desc_act": self.desc_act,
            "sym": self.symmetric,
            "damp_percent": self.dampening,
            "static_groups": self.static_groups,
            "true_sequential": self.true_sequential,
            "lm_head": False,
            "dynamic": {f"-:^{re.escape(name)}$": {} for name in self.dense} or None,  # GPTQModel's word for left out
        }
        return {key: value for key, value in known.items() if value is not None}

    @classmethod
    def from_config(cls, config: dict[str, Any], path: Path) -> "GPTQSettings":
        """Raises InputError for settings that are missing or make no sense."""
        bits, group = config.get("bits"), config.get("group_size", -1)
        form = config.get("checkpoint_format") or config.get("format") or "gptq"
        if not known_bits(bits) or not whole_number(group, least=-1) or form not in ("gptq", "gptq_v2"):
            raise InputError(
                f"{path}: gptq settings bits={bits!r}, group_size={group!r}, checkpoint_format={form!r} are not known"
            )
        if config.get("lm_head"):
            raise InputError(f"{path}: its lm_head is quantized, which ctp cannot read")
        return cls(
            bits=bits,
            group_size=group,
            symmetric=bool(config.get("sym", True)),
            desc_act=bool(config.get("desc_act", False)),
            zero_offset=1 if form == "gptq" else 0,
        )

    def check_layer(self, name: str, *, out_features: int, in_features: int) -> None:
        check_whole_words(name, self.name, out_features=out_features, in_features=in_features, bits=self.bits)

    def scattered(self, names: Collection[str]) -> bool:
        return self.desc_act  # every layer has a g_idx, which may well be in order

    def pack(self, name: str, codes: Codes) -> dict[str, Tensor]:
        stored_zeros_OG = codes.zeros_OG.to(torch.int64) - self.zero_offset
        return {
            f"{name}.qweight": pack_rows(codes.codes_OI.T, self.bits),
            f"{name}.qzeros": pack_rows(stored_zeros_OG & (2**self.bits - 1), self.bits).T.contiguous(),
            f"{name}.scales": float16_scales(name, codes.scales_OG).T.contiguous(),
            f"{name}.g_idx": codes.g_idx_I.to(torch.int32),
        }

    def unpack(self, name: str, parts: dict[str, Tensor]) -> Codes:
        bits = self.bits
        check_there(name, self.name, parts, self.parts[:3])
        qweight, qzeros, scales = (parts[part] for part in self.parts[:3])
        in_features = qweight.shape[0] * 32 // bits if qweight.dim() else 0
        g_idx_I = parts.get("g_idx", runs_of_inputs(in_features, self.group_size))
        groups, outputs = scales.shape if scales.dim() == 2 else (0, 0)
        fits = (
            qweight.dim() == 2
            and qweight.dtype == qzeros.dtype == torch.int32
            and scales.is_floating_point()
            and qweight.shape[0] % (bits if bits == 3 else 1) == 0
            and qweight.shape[1] == outputs
            and qzeros.shape == (groups, outputs * bits // 32)
            and groups_fit(g_idx_I, in_features, groups)
        )
        if not fits:
            raise misfit(name, self.name, parts, bits)
        zeros_OG = unpack_rows(qzeros.T.contiguous(), bits) + self.zero_offset  # uint8: 255 + 1 wraps as v1 means it
        return Codes(
            codes_OI=unpack_rows(qweight, bits).T.contiguous(),
            scales_OG=scales.T.float().contiguous(),
            zeros_OG=zeros_OG & (2**bits - 1) if self.zero_offset else zeros_OG,
            g_idx_I=g_idx_I,
        )

    def scaled(self, parts: dict[str, Tensor], factors_OG: Tensor) -> dict[str, Tensor]:
        return {**parts, "scales": (parts["scales"].float() * factors_OG.T).half()}
