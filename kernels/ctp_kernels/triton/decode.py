"""Tiles of weights as kernels read them, without their scales: planes of dense blocks, units of masked ones.

Shared by the functions below: `grid` is (scales, zeros); `tile` is (block, row, rows_N): the block of inputs, where the
tile begins among all (block, output), and its outputs; U=places of a plane N=outputs
PTX: fields are decoded two at once by instructions of NVIDIA GPUs (see `ptx`); else one by one, by what Triton has.
"""

import triton
import triton.language as tl

from ctp_kernels.triton.ptx import dense_planes, eight_planes, eight_sixteen_planes
from ctp_kernels.triton.values import bias, centered, centered_by, half_unit, popcount16, window


@triton.jit
def weight_of(field_NU, zeros_NU, BITS: tl.constexpr, SYMMETRIC: tl.constexpr, PTX: tl.constexpr, DTYPE: tl.constexpr):
    """code - zero (N, U) of what the functions below give: fields, or with PTX fields that have their bias.

    To be asked for just before its product: numbers go through shared memory then, integers stay in registers.
    """
    if PTX:
        w_NU = centered_by(field_NU, bias(zeros_NU, BITS, SYMMETRIC, DTYPE), BITS, SYMMETRIC, DTYPE)
    else:
        w_NU = centered(field_NU, zeros_NU, BITS, SYMMETRIC, DTYPE)
    return w_NU


@triton.jit
def dense_words(codes, high, tile, half, BITS: tl.constexpr, U: tl.constexpr, BN: tl.constexpr):
    """int16 (N, U): fields of the planes of a half block (3 bits) or block; and the high ones, where there are any."""
    HALVES: tl.constexpr = 2 if BITS == 3 else 1
    places_U = tl.arange(0, U)
    within_N1 = tl.arange(0, BN)[:, None]
    row = tile[1]
    q_NU = tl.load(codes + row * (U * HALVES) + (within_N1 * (U * HALVES) + half * U + places_U[None, :])).to(tl.int16)
    high_NU = q_NU  # triton returns no None
    if BITS == 3:
        high_NU = tl.load(high + row * U + (within_N1 * U + places_U[None, :])).to(tl.int16)
    return q_NU, high_NU


@triton.jit
def dense_biased(q_NU, zeros_NU, BITS: tl.constexpr, SYMMETRIC: tl.constexpr, PTX: tl.constexpr, DTYPE: tl.constexpr):
    """All planes' fields with their bias, for `dense_plane`; nothing it looks at where not PTX."""
    return dense_planes(q_NU, bias(zeros_NU, BITS, SYMMETRIC, DTYPE)) if PTX else (q_NU,)


@triton.jit
def dense_plane(words, biased, half, plane: tl.constexpr, BITS: tl.constexpr, PTX: tl.constexpr):
    """One plane, for `weight_of`. `words` are those of `dense_words`, `biased` those of `dense_biased`."""
    if PTX:
        field_NU = biased[plane]
    else:
        LOW: tl.constexpr = 2 if BITS == 3 else BITS
        field_NU = (words[0] >> (plane * LOW)) & ((1 << LOW) - 1)
        if BITS == 3:
            field_NU = field_NU | (((words[1] >> (half * 4 + plane)) & 1) << 2)
    return field_NU


@triton.jit
def masks(mask, tile, U: tl.constexpr, BN: tl.constexpr):
    """int16 (N, U): 8 bits of a unit of either half block."""
    both_NU = tl.load(mask + tile[1] * U + (tl.arange(0, BN)[:, None] * U + tl.arange(0, U)[None, :]))
    return both_NU


@triton.jit
def eight_sixteen(
    stored, both_NU, zeros_NU, tile, half: tl.constexpr,
    BITS: tl.constexpr, SYMMETRIC: tl.constexpr, PTX: tl.constexpr, U: tl.constexpr, BN: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """The 8 places of the units of a half block, each (N, U), for `weight_of`: two neighbours share 8 codes."""
    codes, high, mask = stored
    row = tile[1]
    within_N1, places_U = tl.arange(0, BN)[:, None], tl.arange(0, U)
    if PTX:
        halves = codes.to(tl.pointer_type(tl.int16)) + row * (2 * U)
        word_NU = tl.load(halves + (within_N1 * (2 * U) + half * U + places_U[None, :]))
        fields = eight_sixteen_planes(word_NU, both_NU, bias(zeros_NU, BITS, SYMMETRIC, DTYPE), half)
    else:
        word_NU = half_unit(codes, high, mask, row * U + within_N1 * U, places_U[None, :], half, U, BITS)
        kept_NU = (both_NU.to(tl.int32) >> (8 * half)) & 255
        fields = _shifted_out(word_NU, kept_NU, BITS)
    return fields


@triton.jit
def bitmap(
    stored, both_NU, zeros_NU, tile, half: tl.constexpr,
    BITS: tl.constexpr, SYMMETRIC: tl.constexpr, PTX: tl.constexpr, BN: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """As `eight_sixteen`, of any mask: where a unit's codes begin is counted from the start of its half block.

    `stored` is (the outputs' first words (N, 1), starts).
    """
    words_N1, starts = stored
    within_N1 = tl.arange(0, BN)[:, None]
    kept_NU = (both_NU.to(tl.int32) >> (8 * half)) & 255
    counts_NU = popcount16(kept_NU)
    first_N1 = tl.load(starts + tile[1] * 2 + (within_N1 * 2 + half)).to(tl.int32) & 0xFFFF
    before_NU = first_N1 + tl.cumsum(counts_NU, 1) - counts_NU
    word_NU = window(words_N1, before_NU * BITS, BITS)
    if PTX:
        bias_NU = bias(zeros_NU, BITS, SYMMETRIC, DTYPE)
        fields = eight_planes(word_NU.to(tl.int32, bitcast=True), kept_NU.to(tl.int16), bias_NU)
    else:
        fields = _shifted_out(word_NU, kept_NU, BITS)
    return fields


@triton.jit
def _shifted_out(word_NU, kept_NU, BITS: tl.constexpr):
    """Units whose kept codes follow one another in a word: each kept weight shifts its code out."""
    f0, word_NU = _next(word_NU, kept_NU, 0, BITS)
    f1, word_NU = _next(word_NU, kept_NU, 1, BITS)
    f2, word_NU = _next(word_NU, kept_NU, 2, BITS)
    f3, word_NU = _next(word_NU, kept_NU, 3, BITS)
    f4, word_NU = _next(word_NU, kept_NU, 4, BITS)
    f5, word_NU = _next(word_NU, kept_NU, 5, BITS)
    f6, word_NU = _next(word_NU, kept_NU, 6, BITS)
    f7, word_NU = _next(word_NU, kept_NU, 7, BITS)
    return f0, f1, f2, f3, f4, f5, f6, f7


@triton.jit
def _next(word_NU, kept_NU, place: tl.constexpr, BITS: tl.constexpr):
    is_kept_NU = ((kept_NU >> place) & 1) != 0
    field_NU = tl.where(is_kept_NU, word_NU & ((1 << BITS) - 1), 0)
    return field_NU, tl.where(is_kept_NU, word_NU >> BITS, word_NU)
