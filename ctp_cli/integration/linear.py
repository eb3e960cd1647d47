"""A linear layer that keeps its weights packed; they are made dense for each product and forgotten.

T=tokens O=out_features I=in_features
"""

from typing import Any

import torch
from ctp_kernels.arithmetic import wide
from ctp_kernels.ragged import row_starts, unpack_bits
from ctp_kernels.unpack import dense_rows
from torch import Tensor, nn
from torch.nn import functional

from ctp_cli.checkpoints.packed import PackedSettings


class PackedLinear(nn.Module):
    """Buffers are the parts of a layer as format ctp stores them (`ctp_cli.checkpoints.packed`)."""

    codes: Tensor
    mask: Tensor | None
    scales: Tensor
    zeros: Tensor | None
    g_idx: Tensor | None

    def __init__(
        self, settings: PackedSettings, in_features: int, out_features: int, parts: dict[str, Tensor], *, bias: bool
    ) -> None:
        """`parts` may be on the meta device, to be filled by loading; then call `prepare`."""
        super().__init__()
        self.in_features, self.out_features, self.bits = in_features, out_features, settings.bits
        for part in settings.parts:
            self.register_buffer(part, parts.get(part))
        self.register_buffer("starts", None, persistent=False)
        self.bias = nn.Parameter(torch.empty(out_features, device="meta"), requires_grad=False) if bias else None

    def prepare(self) -> None:
        """Find where rows begin. Raises ValueError if the parts do not go together."""
        stored = self.codes
        groups = self.scales.shape[1] if self.scales.dim() == 2 else 0
        if self.mask is None:
            per_row = self.in_features * self.bits // 8
            self.starts = torch.arange(self.out_features + 1, device=stored.device) * per_row
        else:
            self.starts = row_starts(unpack_bits(self.mask), self.bits)
        fits = (
            self.scales.shape == (self.out_features, groups)
            and groups > 0
            and self.in_features % groups == 0
            and int(self.starts[-1]) == stored.numel()
            and (self.mask is None or self.mask.shape == (self.out_features, self.in_features // 8))
            and (self.zeros is None or self.zeros.shape == self.scales.shape)
            and (self.g_idx is None or self._in_groups(self.g_idx, groups))
        )
        if not fits:
            raise ValueError("codes, mask, scales and zeros of this layer do not go together")

    def _in_groups(self, g_idx_I: Tensor, groups: int) -> bool:
        return len(g_idx_I) == self.in_features and 0 <= int(g_idx_I.min()) <= int(g_idx_I.max()) < groups

    def dense(self, dtype: torch.dtype) -> Tensor:
        """(O, I): the weights that the codes stand for."""
        assert isinstance(self.starts, Tensor), "prepare() comes first"
        zeros_OG = self.zeros
        if zeros_OG is None:
            zeros_OG = torch.full_like(self.scales, 2 ** (self.bits - 1))
        return dense_rows(
            self.codes, self.mask, self.starts, self.scales, zeros_OG, bits=self.bits, dtype=dtype, g_idx_I=self.g_idx
        )

    def forward(self, x_TI: Tensor) -> Tensor:
        y_TO: Tensor = _Product.apply(x_TI, self)
        return y_TO if self.bias is None else y_TO + self.bias

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}"


class _Product(torch.autograd.Function):
    """x W^T whose backward pass makes W dense once more, instead of keeping it for every layer at once."""

    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, layer: PackedLinear) -> Tensor:
        ctx.layer = layer
        return functional.linear(wide(x_TI), layer.dense(wide(x_TI).dtype)).to(x_TI.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        outer_TO = wide(gradients[0])
        return (outer_TO @ ctx.layer.dense(outer_TO.dtype)).to(gradients[0].dtype), None
