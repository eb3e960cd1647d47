"""Rows of integer codes of which only some are stored: a bitmap says which, a bit stream holds them.

A row's kept codes follow each other as one little-endian bit stream, and every row begins on a byte of its own. How
many a row keeps is what the bitmap says, so nothing else is stored.

O=rows (outputs) I=columns (inputs), a multiple of 8
"""

import torch
from torch import Tensor

_ROWS = 1 << 20
"""Places looked at in one go: positions are 64-bit integers, which should not outgrow the layer."""
_BITS = torch.arange(256, dtype=torch.uint8)[:, None] >> torch.arange(8, dtype=torch.uint8) & 1
"""(256, 8): every byte's bits, least significant first."""


def pack_bits(keep_OI: Tensor) -> Tensor:
    """Bools (O, I) as uint8 (O, I / 8), least significant bit first.

    Raises: ValueError if I is no multiple of 8.
    """
    if keep_OI.shape[1] % 8:
        raise ValueError(f"{keep_OI.shape[1]} columns do not fill whole bytes")
    return (_words(keep_OI) * 0x0102040810204080 >> 56).to(torch.uint8)


def unpack_bits(bytes_OB: Tensor) -> Tensor:
    """The inverse of `pack_bits`."""
    bits_N8 = _BITS.to(bytes_OB.device).index_select(0, bytes_OB.flatten().int())
    return bits_N8.view(torch.bool).view(len(bytes_OB), -1)


def row_starts(mask_OB: Tensor, bits: int) -> Tensor:
    """(O + 1,) int64: the byte at which each row's stream begins, and the length of all of them.

    Shapes: mask_OB (O, I / 8) uint8, as `pack_bits` makes it.
    """
    return _starts(bits_set(mask_OB).sum(1), bits)


def bits_set(mask_OB: Tensor) -> Tensor:
    """How many bits of each byte are set, uint8."""
    ones = mask_OB - (mask_OB >> 1 & 0x55)  # of every two bits, then four, then eight: without a bool for each bit
    ones = (ones & 0x33) + (ones >> 2 & 0x33)
    return ones + (ones >> 4) & 15


def pack_kept(codes_OI: Tensor, keep_OI: Tensor, bits: int) -> Tensor:
    """The kept codes of all rows, uint8 (bytes,).

    Shapes: codes_OI (O, I) uint8, each below 2^bits; keep_OI (O, I) bool.
    """
    kept_O = _kept(keep_OI)
    starts = _starts(kept_O, bits)
    # a code may reach into the next byte; the last one has a spare byte to reach into
    stream = torch.zeros(int(starts[-1]) + 1, dtype=torch.int32, device=codes_OI.device)
    for rows in _chunks(keep_OI):
        byte, shift = _places(kept_O[rows], starts[rows], bits)
        value = codes_OI[rows].masked_select(keep_OI[rows]).to(torch.int32) << shift
        stream.index_add_(0, byte, value & 255)
        stream.index_add_(0, byte + 1, value >> 8)
    return stream[:-1].to(torch.uint8)


def unpack_kept(stream: Tensor, keep_OI: Tensor, bits: int) -> Tensor:
    """The inverse of `pack_kept`: (O, I) uint8, 0 where nothing is kept.

    Raises: ValueError if the stream is not as long as the bitmap says.
    """
    kept_O = _kept(keep_OI)
    starts = _starts(kept_O, bits)
    if stream.shape != (int(starts[-1]),):
        raise ValueError(f"{stream.numel()} bytes of codes where the bitmap asks for {int(starts[-1])}")
    padded = torch.cat([stream, stream.new_zeros(1)]).to(torch.int32)
    codes_OI = torch.zeros(keep_OI.shape, dtype=torch.uint8, device=stream.device)
    for rows in _chunks(keep_OI):
        byte, shift = _places(kept_O[rows], starts[rows], bits)
        value = (padded[byte] | padded[byte + 1] << 8) >> shift & (1 << bits) - 1
        codes_OI[rows].masked_scatter_(keep_OI[rows], value.to(torch.uint8))
    return codes_OI


def _kept(keep_OI: Tensor) -> Tensor:
    """(O,) int64: how many each row keeps."""
    return (_words(keep_OI) * 0x0101010101010101 >> 56).sum(1)


def _words(keep_OI: Tensor) -> Tensor:
    """(O, I / 8) int64 of eight bytes, each 0 or 1: one product gathers them in its highest byte, which takes a
    twentieth of the time of sums over bools."""
    return keep_OI.contiguous().view(torch.int64)


def _starts(kept_O: Tensor, bits: int) -> Tensor:
    lengths_O = (kept_O * bits + 7) // 8
    return torch.cat([lengths_O.new_zeros(1), lengths_O.cumsum(0)])


def _chunks(keep_OI: Tensor) -> list[slice]:
    rows = max(1, _ROWS // max(1, keep_OI.shape[1]))
    return [slice(first, first + rows) for first in range(0, keep_OI.shape[0], rows)]


def _places(kept_O: Tensor, starts_O: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The byte and the bit in it at which each kept code of these rows begins in the stream, rows one after another."""
    before_O = kept_O.cumsum(0) - kept_O
    first_O = starts_O[: len(kept_O)] * 8 - before_O * bits
    count = int(kept_O.sum())
    bit = torch.arange(count, device=kept_O.device) * bits
    bit += first_O.repeat_interleave(kept_O, output_size=count)
    return bit >> 3, (bit & 7).to(torch.int32)
