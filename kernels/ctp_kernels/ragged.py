"""Rows of integer codes of which only some are stored: a bitmap says which, a bit stream holds them.

A row's kept codes follow each other as one little-endian bit stream, and every row begins on a byte of its own. How
many a row keeps is what the bitmap says, so nothing else is stored.

O=rows (outputs) I=columns (inputs), a multiple of 8
"""

import torch
from torch import Tensor

_ROWS = 1 << 22
"""Places looked at in one go: positions are 64-bit integers, which should not outgrow the layer."""


def pack_bits(keep_OI: Tensor) -> Tensor:
    """Bools (O, I) as uint8 (O, I / 8), least significant bit first.

    Raises: ValueError if I is no multiple of 8.
    """
    if keep_OI.shape[1] % 8:
        raise ValueError(f"{keep_OI.shape[1]} columns do not fill whole bytes")
    weights = 1 << torch.arange(8, device=keep_OI.device)
    return (keep_OI.view(keep_OI.shape[0], -1, 8) * weights).sum(2).to(torch.uint8)


def unpack_bits(bytes_OB: Tensor) -> Tensor:
    """The inverse of `pack_bits`."""
    shifts = torch.arange(8, device=bytes_OB.device, dtype=torch.uint8)
    return (bytes_OB[:, :, None] >> shifts & 1).bool().flatten(1)


def row_starts(keep_OI: Tensor, bits: int) -> Tensor:
    """(O + 1,) int64: the byte at which each row's stream begins, and the length of all of them."""
    lengths_O = (keep_OI.sum(1) * bits + 7) // 8
    return torch.cat([lengths_O.new_zeros(1), lengths_O.cumsum(0)])


def pack_kept(codes_OI: Tensor, keep_OI: Tensor, bits: int) -> Tensor:
    """The kept codes of all rows, uint8 (bytes,).

    Shapes: codes_OI (O, I) uint8, each below 2^bits; keep_OI (O, I) bool.
    """
    starts = row_starts(keep_OI, bits)
    # a code may reach into the next byte; the last one has a spare byte to reach into
    stream = torch.zeros(int(starts[-1]) + 1, dtype=torch.int32, device=codes_OI.device)
    for rows in _chunks(keep_OI):
        places, byte, shift = _places(keep_OI[rows], starts[rows], bits)
        value = codes_OI[rows][places].to(torch.int32) << shift
        stream.index_add_(0, byte, value & 255)
        stream.index_add_(0, byte + 1, value >> 8)
    return stream[:-1].to(torch.uint8)


def unpack_kept(stream: Tensor, keep_OI: Tensor, bits: int) -> Tensor:
    """The inverse of `pack_kept`: (O, I) uint8, 0 where nothing is kept.

    Raises: ValueError if the stream is not as long as the bitmap says.
    """
    starts = row_starts(keep_OI, bits)
    if stream.shape != (int(starts[-1]),):
        raise ValueError(f"{stream.numel()} bytes of codes where the bitmap asks for {int(starts[-1])}")
    padded = torch.cat([stream, stream.new_zeros(1)]).to(torch.int32)
    codes_OI = torch.zeros(keep_OI.shape, dtype=torch.uint8, device=stream.device)
    for rows in _chunks(keep_OI):
        places, byte, shift = _places(keep_OI[rows], starts[rows], bits)
        value = (padded[byte] | padded[byte + 1] << 8) >> shift & (1 << bits) - 1
        codes_OI[rows][places] = value.to(torch.uint8)
    return codes_OI


def _chunks(keep_OI: Tensor) -> list[slice]:
    rows = max(1, _ROWS // max(1, keep_OI.shape[1]))
    return [slice(first, first + rows) for first in range(0, keep_OI.shape[0], rows)]


def _places(keep_OI: Tensor, starts_O: Tensor, bits: int) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor]:
    """Where the kept codes are in the rows, and the byte and the bit in it at which each begins in the stream."""
    o, i = keep_OI.nonzero(as_tuple=True)
    rank = keep_OI.cumsum(1)[o, i] - 1
    bit = rank * bits
    return (o, i), starts_O[: keep_OI.shape[0]][o] + bit // 8, (bit % 8).to(torch.int32)
