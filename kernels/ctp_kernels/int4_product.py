"""PyTorch's product with 4-bit weights on the CPU, for layers in format ctp.

M=rows N=outputs K=inputs G=groups
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ctp_kernels.reference import PackedParts


@dataclass(frozen=True)
class Int4Layer:
    """A dense layer of 4-bit codes as PyTorch's product wants it.

    packed (N, K / 2) uint8, in an order that depends on the processor: blocks of `width` outputs, whose two halves, or
    whose neighbours, share bytes. scales_and_shifts_GN2 bfloat16: w = (code - 8) * scale + shift. rest: the stored
    parts; their codes are on the meta device.
    """

    packed: Tensor
    scales_and_shifts_GN2: Tensor
    width: int
    neighbours: bool
    rest: PackedParts

    @classmethod
    def of(cls, parts: PackedParts) -> "Int4Layer":
        """Raises: ValueError if this processor's order is not known, in which codes could not be given back."""
        codes_NB = parts.codes.view(parts.outputs, -1)
        codes_NK = torch.stack([codes_NB & 15, codes_NB >> 4], 2).flatten(1).int()
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes_NK, 1)
        scales_NG = parts.scales.float()
        shifts_NG = torch.zeros_like(scales_NG) if parts.zeros is None else (8 - parts.zeros.float()) * scales_NG
        grid_GN2 = torch.stack([scales_NG.T, shifts_NG.T], 2).bfloat16().contiguous()
        rest = replace(parts, codes=parts.codes.to("meta"))
        for width, neighbours in ((64, False), (32, False), (32, True)):
            made = cls(packed, grid_GN2, width, neighbours, rest)
            if torch.equal(made.codes(), codes_NB):
                return made
        raise ValueError("the order in which PyTorch packs codes is not known on this processor")

    def codes(self) -> Tensor:
        """(N, K / 2) uint8 as they are stored."""
        outputs, per_row = self.packed.shape
        blocks = self.packed.view(outputs // self.width, per_row * 2, self.width // 2)
        halves = [(x[:, 0::2] | x[:, 1::2] << 4).transpose(1, 2) for x in (blocks & 15, blocks >> 4)]
        joined = torch.stack(halves, 2) if self.neighbours else torch.cat(halves, 1)
        return joined.reshape(outputs, per_row)

    def stored(self) -> PackedParts:
        return replace(self.rest, codes=self.codes().view(self.rest.codes.shape))

    def tensors(self) -> dict[str, Tensor]:
        return {"packed": self.packed, "grid": self.scales_and_shifts_GN2}

    def matmul(self, x_MK: Tensor) -> Tensor:
        group_size = self.packed.shape[1] * 2 // self.scales_and_shifts_GN2.shape[0]
        y_MN: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
            x_MK.contiguous(), self.packed, group_size, self.scales_and_shifts_GN2
        )
        return y_MN
