"""What every packed layer means, in plain torch: the oracle of all kernels, slow and in float64 where asked.

It reads tensors as format `ctp` stores them (docs/format-ctp.md) bit by bit, on purpose without the code that writes
them. One decoder is enough for dense codes, 2:4, 8:16 and free bitmaps: they differ in how many weights a mask keeps.

M=batch x tokens N=outputs K=inputs G=groups
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PackedParts:
    """A layer as it is stored.

    codes uint8, every output's little-endian bit stream, each beginning on a byte of its own; scales float16 (N, G);
    mask uint8 (N, K / 8), bit k % 8 of byte k / 8 set where weight k is stored, None where all are; zeros uint8 (N, G),
    None for 2^(bits - 1); g_idx int (K,), the group of each input, None for equal runs of inputs.
    """

    codes: Tensor
    scales: Tensor
    bits: int
    mask: Tensor | None = None
    zeros: Tensor | None = None
    g_idx: Tensor | None = None

    @property
    def outputs(self) -> int:
        return self.scales.shape[0]

    @property
    def inputs(self) -> int:
        if self.mask is not None:
            return self.mask.shape[1] * 8
        return self.codes.numel() // self.outputs * 8 // self.bits


def kept(parts: PackedParts) -> Tensor:
    """(N, K) bool: which weights are stored."""
    if parts.mask is None:
        return torch.ones(parts.outputs, parts.inputs, dtype=torch.bool, device=parts.codes.device)
    return _bits_of(parts.mask.flatten()).view(parts.outputs, -1).bool()


def codes(parts: PackedParts) -> Tensor:
    """(N, K) int64: the code of each weight; of one that is not stored, its zero point.

    Raises: ValueError if there are more or fewer bytes of codes than the mask asks for.
    """
    keep_NK = kept(parts)
    codes_NK = zero_points(parts).clone()
    stream = parts.codes.flatten()
    lengths = [(int(count) * parts.bits + 7) // 8 for count in keep_NK.sum(1)]
    if stream.numel() != sum(lengths):
        raise ValueError(f"{stream.numel()} bytes of codes where the mask asks for {sum(lengths)}")
    weights = 2 ** torch.arange(parts.bits, device=stream.device)
    for n, row in enumerate(stream.split(lengths)):
        count = int(keep_NK[n].sum())
        codes_NK[n, keep_NK[n]] = (_bits_of(row)[: count * parts.bits].view(count, parts.bits) * weights).sum(1)
    return codes_NK


def zero_points(parts: PackedParts) -> Tensor:
    """(N, K) int64."""
    group_K = _group_of_input(parts)
    if parts.zeros is None:
        return torch.full((parts.outputs, parts.inputs), 2 ** (parts.bits - 1), device=parts.codes.device)
    return parts.zeros.long()[:, group_K]


def decode(parts: PackedParts, *, dtype: torch.dtype = torch.float64) -> Tensor:
    """(N, K) weights, scale * (code - zero) where one is stored and 0 elsewhere; exact in float32 and float64.

    Raises: ValueError as `codes`.
    """
    scale_NK = parts.scales.to(dtype)[:, _group_of_input(parts)]
    return (codes(parts) - zero_points(parts)).to(dtype) * scale_NK


def matmul(x_MK: Tensor, parts: PackedParts) -> Tensor:
    """y (M, N) = x (M, K) W^T, in x's dtype."""
    return x_MK @ decode(parts, dtype=x_MK.dtype).T


def input_gradient(gy_MN: Tensor, parts: PackedParts) -> Tensor:
    """The gradient of a loss with respect to x (M, K), gy W, from that with respect to y (M, N); in gy's dtype."""
    return gy_MN @ decode(parts, dtype=gy_MN.dtype)


def keeps_exactly(parts: PackedParts, n: int, m: int) -> bool:
    """Whether n of every m weights in a row are stored: what 2:4 and 8:16 kernels need."""
    keep_NK = kept(parts)
    return keep_NK.shape[1] % m == 0 and bool((keep_NK.view(len(keep_NK), -1, m).sum(2) == n).all())


def _group_of_input(parts: PackedParts) -> Tensor:
    if parts.g_idx is not None:
        return parts.g_idx.long()
    group_size = parts.inputs // parts.scales.shape[1]
    return torch.arange(parts.inputs, device=parts.codes.device) // group_size


def _bits_of(bytes_B: Tensor) -> Tensor:
    """(B,) uint8 to (8 B,) int64 zeros and ones, least significant first."""
    return (bytes_B.long()[:, None] // 2 ** torch.arange(8, device=bytes_B.device) % 2).flatten()
