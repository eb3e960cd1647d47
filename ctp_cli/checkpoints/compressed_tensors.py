"""Checkpoints in compressed-tensors' format pack-quantized, which vLLM and llm-compressor share.

Per layer `weight_packed` int32 (O, I * bits / 32), codes as one little-endian bit stream per output; `weight_scale`
(O, G); `weight_shape` int64 (2,); asymmetric grids have `weight_zero_point` int32 (O * bits / 32, G). Read in the
sources of compressed-tensors 0.19, which packs 3 bits so too. Groups that are no runs of inputs were stored with
`weight_g_idx` int32 (I,) by earlier versions: such files are read here, and no longer written.

O=out_features I=in_features G=groups
"""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from ctp_kernels.packing import pack_rows, unpack_rows
from torch import Tensor

from ctp_cli.checkpoints.parts import (
    check_symmetric,
    check_there,
    check_whole_words,
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

_PACKED = "pack-quantized"


@dataclass(frozen=True)
class CompressedTensorsSettings:
    """The settings a reader needs. group_size -1: one group per output row."""

    name: ClassVar[str] = "compressed-tensors"
    weights_prefix: ClassVar[str] = "model"
    parts: ClassVar[tuple[str, ...]] = (
        "weight_packed",
        "weight_scale",
        "weight_shape",
        "weight_zero_point",
        "weight_g_idx",
    )

    bits: int
    group_size: int
    symmetric: bool
    scale_dtype: torch.dtype = torch.float16
    """Readers turn scales into the model's dtype: those of a bfloat16 model should be bfloat16 from the start."""
    dense: tuple[str, ...] = ()
    """Linear layers that are not quantized, beside lm_head."""

    def to_config(self) -> dict[str, Any]:
        grouped = self.group_size > 0
        weights = {
            "num_bits": self.bits,
            "type": "int",
            "symmetric": self.symmetric,
            "strategy": "group" if grouped else "channel",
            "group_size": self.group_size if grouped else None,
            "actorder": None,
            "dynamic": False,
        }
        return {
            "quant_method": self.name,
            "format": _PACKED,
            "quantization_status": "compressed",
            "ignore": ["lm_head", *self.dense],
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], path: Path) -> "CompressedTensorsSettings":
        """Raises InputError for settings that are missing, make no sense or differ from layer to layer."""
        groups = config.get("config_groups")
        schemes = list(groups.values()) if isinstance(groups, dict) else []
        weights = [scheme.get("weights") for scheme in schemes if isinstance(scheme, dict)]
        form = config.get("format")
        if form != _PACKED:
            raise InputError(
                f"{path}: compressed-tensors of format {form!r}", hint=f"ctp reads format {_PACKED}: integers, packed"
            )
        if not weights or any(w != weights[0] for w in weights) or not isinstance(weights[0], dict):
            raise InputError(f"{path}: its config_groups are missing, or not the same for all layers")
        bits, group, strategy = (weights[0].get(key) for key in ("num_bits", "group_size", "strategy"))
        if not known_bits(bits) or weights[0].get("type") != "int" or strategy not in ("group", "channel"):
            raise InputError(f"{path}: weights num_bits={bits!r}, strategy={strategy!r} are not known")
        if strategy == "group" and not whole_number(group, least=1):
            raise InputError(f"{path}: weights group_size={group!r}")
        return cls(
            bits,
            int(group or 0) if strategy == "group" else -1,
            bool(weights[0].get("symmetric", True)),
        )

    def check_layer(self, name: str, *, out_features: int, in_features: int) -> None:
        check_whole_words(name, self.name, out_features=out_features, in_features=in_features, bits=self.bits)

    def scattered(self, names: Collection[str]) -> bool:
        return any(name.endswith(".weight_g_idx") for name in names)

    def pack(self, name: str, codes: Codes) -> dict[str, Tensor]:
        outputs, inputs = codes.codes_OI.shape
        if not torch.equal(codes.g_idx_I.int(), runs_of_inputs(inputs, self.group_size)):
            raise InputError(
                f"{name}: its groups are no runs of inputs, which {self.name} no longer stores",
                hint="use --format gptq",
            )
        scales_OG = codes.scales_OG.to(self.scale_dtype)
        if self.scale_dtype == torch.float16:
            scales_OG = float16_scales(name, codes.scales_OG)
        tensors = {
            f"{name}.weight_packed": pack_rows(codes.codes_OI.T, self.bits).T.contiguous(),
            f"{name}.weight_scale": scales_OG,
            f"{name}.weight_shape": torch.tensor([outputs, inputs]),
        }
        if self.symmetric:
            check_symmetric(name, codes.zeros_OG, self.bits)
        else:
            tensors[f"{name}.weight_zero_point"] = pack_rows(codes.zeros_OG, self.bits)
        return tensors

    def unpack(self, name: str, parts: dict[str, Tensor]) -> Codes:
        check_there(name, self.name, parts, self.parts[:2])
        packed, scales_OG, zeros = parts["weight_packed"], parts["weight_scale"], parts.get("weight_zero_point")
        wrong = misfit(name, self.name, parts, self.bits)
        if packed.dim() != 2 or scales_OG.dim() != 2 or packed.dtype != torch.int32 or packed.shape[1] % self.bits:
            raise wrong
        outputs, groups = scales_OG.shape
        inputs = packed.shape[1] * 32 // self.bits
        g_idx_I = parts.get("weight_g_idx", runs_of_inputs(inputs, self.group_size))
        stated = parts.get("weight_shape", torch.tensor([outputs, inputs])).flatten().tolist()
        if packed.shape[0] != outputs or stated != [outputs, inputs] or not groups_fit(g_idx_I, inputs, groups):
            raise wrong
        if self.symmetric:
            zeros_OG = middle_zeros(outputs, groups, self.bits)
        elif zeros is None or zeros.shape != (outputs * self.bits // 32, groups) or zeros.dtype != torch.int32:
            raise wrong
        else:
            zeros_OG = unpack_rows(zeros, self.bits)
        codes_OI = unpack_rows(packed.T.contiguous(), self.bits).T.contiguous()
        return Codes(codes_OI, scales_OG.float(), zeros_OG, g_idx_I.int())

    def scaled(self, parts: dict[str, Tensor], factors_OG: Tensor) -> dict[str, Tensor]:
        scales_OG = parts["weight_scale"]
        return {**parts, "weight_scale": (scales_OG.float() * factors_OG).to(scales_OG.dtype)}
