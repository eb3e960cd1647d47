"""Pruned layers with a code for every weight, and back: the same products, decoded faster, in more memory."""

from dataclasses import replace

import torch
from torch import Tensor

from ctp_kernels import packed
from ctp_kernels.ragged import pack_kept, unpack_bits, unpack_kept
from ctp_kernels.reference import PackedParts


def described(parts: PackedParts) -> PackedParts:
    """What `without_mask` makes, with codes on the meta device."""
    bytes_each = (parts.inputs * parts.bits + 7) // 8
    return replace(parts, codes=torch.empty(parts.outputs * bytes_each, dtype=torch.uint8, device="meta"), mask=None)


def without_mask(parts: PackedParts) -> PackedParts:
    """The same weights without a mask: what it leaves out gets its zero point as code, which is a weight of 0."""
    assert parts.mask is not None
    if parts.g_idx is None and parts.codes.device.type == "cpu" and packed.available() and not packed.refusal(parts):
        return replace(parts, codes=packed.dense_codes(packed.PackedLayer.of(parts)), mask=None)
    keep_NK = unpack_bits(parts.mask)
    codes_NK = unpack_kept(parts.codes.flatten(), keep_NK, parts.bits)
    if parts.zeros is None:
        zeros_NK = codes_NK.new_full((), 2 ** (parts.bits - 1))
    elif parts.g_idx is None:
        zeros_NK = parts.zeros.repeat_interleave(parts.inputs // parts.zeros.shape[1], 1)
    else:
        zeros_NK = parts.zeros[:, parts.g_idx.long()]
    codes_NK = torch.where(keep_NK, codes_NK, zeros_NK)
    return replace(parts, codes=pack_kept(codes_NK, torch.ones_like(keep_NK), parts.bits), mask=None)


def with_mask(parts: PackedParts, mask_NB: Tensor, shape: torch.Size) -> PackedParts:
    """The inverse of `without_mask`."""
    keep_NK = unpack_bits(mask_NB)
    codes_NK = unpack_kept(parts.codes.flatten(), torch.ones_like(keep_NK), parts.bits)
    return replace(parts, codes=pack_kept(codes_NK, keep_NK, parts.bits).view(shape), mask=mask_NB)
