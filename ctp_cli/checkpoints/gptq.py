"""GPTQ checkpoints, v1 and v2: packed codes per layer, settings in two places.

Symmetric ones are written as v1, which every reader knows. Asymmetric ones are written as v2: GPTQModel refuses an
asymmetric v1 file that it did not make itself, because others have disagreed about its zero points.

O=out_features I=in_features G=groups
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from ctp_kernels.packing import pack_rows, unpack_rows
from safetensors import safe_open
from torch import Tensor

from ctp_cli.compression.solver import Codes
from ctp_cli.errors import InputError

PARTS = ("qweight", "qzeros", "scales", "g_idx")


@dataclass(frozen=True)
class GPTQSettings:
    """The settings a reader needs. group_size -1: one group per output row."""

    bits: int
    group_size: int
    symmetric: bool
    desc_act: bool
    dampening: float = 0.01
    true_sequential: bool = True
    static_groups: bool = False
    zero_offset: int = 1
    """v1 stores zero - 1, v2 stores zero."""

    def to_config(self) -> dict[str, Any]:
        """As it stands in config.json and in quantize_config.json."""
        return {
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
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], path: Path) -> "GPTQSettings":
        """Raises InputError for another method, or for settings that are missing or make no sense."""
        method = config.get("quant_method")
        if method != "gptq":
            raise InputError(
                f"{path}: quantized by {method!r}, which ctp cannot read",
                hint="readable are dense and gptq checkpoints",
            )
        bits, group = config.get("bits"), config.get("group_size", -1)
        form = config.get("checkpoint_format") or config.get("format") or "gptq"
        if bits not in (2, 3, 4, 8) or not isinstance(group, int) or form not in ("gptq", "gptq_v2"):
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


def check_packable(name: str, *, out_features: int, in_features: int, bits: int) -> None:
    """Raises InputError for a layer whose sizes do not fill whole 32-bit words."""
    for what, size in (("inputs", in_features), ("outputs", out_features)):
        if size * bits % 32 or size % 32:
            raise InputError(
                f"{name}: {size} {what} are no multiple of 32, which format gptq needs",
                hint="use --format dense",
            )


def pack_layer(name: str, codes: Codes, settings: GPTQSettings) -> dict[str, Tensor]:
    """A layer's four tensors under their names on disk."""
    bits = settings.bits
    stored_zeros_OG = codes.zeros_OG.to(torch.int64) - settings.zero_offset
    return {
        f"{name}.qweight": pack_rows(codes.codes_OI.T, bits),
        f"{name}.qzeros": pack_rows(stored_zeros_OG, bits).T.contiguous(),
        f"{name}.scales": codes.scales_OG.T.contiguous().half(),
        f"{name}.g_idx": codes.g_idx_I.to(torch.int32),
    }


def unpack_layer(name: str, parts: dict[str, Tensor], settings: GPTQSettings) -> Codes:
    """The codes of one layer. Raises InputError if the parts do not go together."""
    bits = settings.bits
    if missing := [part for part in PARTS[:3] if part not in parts]:
        raise InputError(f"{name}: {', '.join(missing)} missing from the gptq checkpoint")
    qweight, qzeros, scales = (parts[part] for part in PARTS[:3])
    in_features = qweight.shape[0] * 32 // bits if qweight.dim() else 0
    g_idx_I = parts.get("g_idx")
    if g_idx_I is None:
        group = settings.group_size if settings.group_size > 0 else in_features
        g_idx_I = torch.arange(in_features, dtype=torch.int32) // group
    groups, outputs = scales.shape if scales.dim() == 2 else (0, 0)
    fits = (
        qweight.dim() == 2
        and in_features > 0
        and g_idx_I.shape == (in_features,)
        and qweight.shape[1] == outputs
        and qzeros.shape == (groups, outputs * bits // 32)
        and int(g_idx_I.min()) >= 0
        and int(g_idx_I.max()) < groups
    )
    if not fits:
        raise InputError(
            f"{name}: shapes of the gptq parts do not go together (qweight {tuple(qweight.shape)}, qzeros "
            f"{tuple(qzeros.shape)}, scales {tuple(scales.shape)}, g_idx {tuple(g_idx_I.shape)}, {bits} bits)"
        )
    zeros_OG = unpack_rows(qzeros.T.contiguous(), bits) + settings.zero_offset  # uint8: 255 + 1 wraps as v1 means it
    return Codes(
        codes_OI=unpack_rows(qweight, bits).T.contiguous(),
        scales_OG=scales.T.float().contiguous(),
        zeros_OG=zeros_OG & (2**bits - 1) if settings.zero_offset else zeros_OG,
        g_idx_I=g_idx_I,
    )


def read_dense_state(
    path: Path, settings: GPTQSettings, *, dtype: torch.dtype, transposed: set[str]
) -> dict[str, Tensor]:
    """All tensors of a checkpoint, packed layers dequantized to `dtype`; layers in `transposed` as (in, out)."""
    state: dict[str, Tensor] = {}
    packed: dict[str, dict[str, Tensor]] = {}
    for name, tensor in _tensors(path):
        layer, _, part = name.rpartition(".")
        if part in PARTS:
            packed.setdefault(layer, {})[part] = tensor
            if len(packed[layer]) == len(PARTS):
                state[f"{layer}.weight"] = _dense(layer, packed.pop(layer), settings, dtype, layer in transposed)
        else:
            state[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
    for layer, parts in packed.items():
        state[f"{layer}.weight"] = _dense(layer, parts, settings, dtype, layer in transposed)
    return state


def _dense(
    layer: str, parts: dict[str, Tensor], settings: GPTQSettings, dtype: torch.dtype, transposed: bool
) -> Tensor:
    values_OI = unpack_layer(layer, parts, settings).values().to(dtype)
    return (values_OI.T if transposed else values_OI).contiguous()


def _tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, "pt") as handle:
            for name in handle.keys():  # noqa: SIM118 - not a dict
                yield name, handle.get_tensor(name)
