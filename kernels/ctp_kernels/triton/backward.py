"""gx = gy W, and W itself: tiles of decoded weights, one plane of inputs at a time.

Unlike in `forward` a program keeps to one plane, whose number is not known when it is compiled: what its sums belong to
then fits into registers, and bytes that planes share come from the cache. Where a code is follows from counting the
kept weights before it.

M=batch x tokens N=outputs U=places of a plane, over as many blocks as they take
"""

import triton
import triton.language as tl

from ctp_kernels.triton.values import centered, half_unit, popcount, popcount16, scale_tile, scaled, window, zero_tile


@triton.jit(do_not_specialize=["batch"])
def input_gradient(
    gy,
    gx,
    codes,
    high,
    mask,
    starts,
    rows,
    scales,
    zeros,
    batch,
    outputs,
    padded_outputs,
    padded_inputs,
    LAYOUT: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    PLANES: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BU: tl.constexpr,
):
    """One tile of gx (batch, planes, padded_inputs / planes), planes being 1 for dense layouts.

    Grid: (PLANES x tiles of a plane's places, tiles of tokens).
    """
    DTYPE: tl.constexpr = gy.dtype.element_ty
    places = padded_inputs // PLANES
    plane = tl.program_id(0) % PLANES
    places_U = tl.program_id(0) // PLANES * BU + tl.arange(0, BU)
    tokens_M = tl.program_id(1) * BM + tl.arange(0, BM)
    seen_M1 = (tokens_M < batch)[:, None]
    stored, sizes = (codes, high, mask, starts, rows), (padded_outputs, padded_inputs)
    gy_M1 = gy + (tokens_M.to(tl.int64) * outputs)[:, None]
    sum_MU = tl.zeros((BM, BU), tl.float32)
    for first in tl.range(0, padded_outputs, BN):
        rows_N = first + tl.arange(0, BN)
        gy_MN = tl.load(gy_M1 + rows_N[None, :], mask=seen_M1 & (rows_N < outputs)[None, :], other=0.0)
        w_NU, _at_U = plane_tile(
            stored, (scales, zeros), rows_N, places_U, plane, sizes, LAYOUT, BITS, GROUP, BLOCK, PLANES, DTYPE
        )
        sum_MU = tl.dot(gy_MN, w_NU, sum_MU, input_precision="ieee")
    if LAYOUT == "dense":
        to_U = input_of(places_U, plane, LAYOUT, BLOCK, PLANES)
    else:
        # next to one another in memory, as x is in `forward`
        to_U = plane_position(places_U, plane, padded_inputs, LAYOUT, BLOCK, PLANES)
    gx_MU = gx + (tokens_M.to(tl.int64) * padded_inputs)[:, None] + to_U[None, :]
    tl.store(gx_MU, sum_MU.to(gx.dtype.element_ty), mask=seen_M1 & (places_U < places)[None, :])


@triton.jit
def dequantize(
    dense,
    codes,
    high,
    mask,
    starts,
    rows,
    scales,
    zeros,
    outputs,
    inputs,
    padded_outputs,
    padded_inputs,
    LAYOUT: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    PLANES: tl.constexpr,
    BN: tl.constexpr,
    BU: tl.constexpr,
):
    """One tile of the weights (outputs, inputs). Grid: (PLANES x tiles of a plane's places, padded_outputs / BN)."""
    DTYPE: tl.constexpr = dense.dtype.element_ty
    plane = tl.program_id(0) % PLANES
    places_U = tl.program_id(0) // PLANES * BU + tl.arange(0, BU)
    rows_N = tl.program_id(1) * BN + tl.arange(0, BN)
    stored, sizes = (codes, high, mask, starts, rows), (padded_outputs, padded_inputs)
    w_NU, at_U = plane_tile(
        stored, (scales, zeros), rows_N, places_U, plane, sizes, LAYOUT, BITS, GROUP, BLOCK, PLANES, DTYPE
    )
    to_NU = dense + (rows_N.to(tl.int64) * inputs)[:, None] + at_U[None, :]
    tl.store(to_NU, w_NU, mask=(rows_N < outputs)[:, None] & (at_U < inputs)[None, :])


@triton.jit
def input_of(places_U, plane, LAYOUT: tl.constexpr, BLOCK: tl.constexpr, PLANES: tl.constexpr):
    """The inputs that places of a plane stand for."""
    PER_BLOCK: tl.constexpr = BLOCK // PLANES
    block_U, within_U = places_U // PER_BLOCK, places_U % PER_BLOCK
    if LAYOUT == "dense":
        at_U = block_U * BLOCK + plane * PER_BLOCK + within_U
    else:
        # the first half of the planes is the first half of a block
        STRIDE: tl.constexpr = PLANES // 2
        at_U = block_U * BLOCK + plane // STRIDE * (BLOCK // 2) + within_U * STRIDE + plane % STRIDE
    return at_U


@triton.jit
def plane_position(places_U, plane, padded_inputs, LAYOUT: tl.constexpr, BLOCK: tl.constexpr, PLANES: tl.constexpr):
    """Where `input_of` is in a row of (stride, padded_inputs / stride)."""
    STRIDE: tl.constexpr = PLANES // 2
    at_U = input_of(places_U, plane, LAYOUT, BLOCK, PLANES)
    return at_U % STRIDE * (padded_inputs // STRIDE) + at_U // STRIDE


@triton.jit
def plane_tile(
    stored, grid, rows_N, places_U, plane, sizes, LAYOUT: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    BLOCK: tl.constexpr, PLANES: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Weights (N, U), scaled, and the inputs (U,) they belong to. Places past the last block repeat the last place."""
    codes, high, mask, starts, rows = stored
    U: tl.constexpr = BLOCK // PLANES
    places_U = tl.minimum(places_U, sizes[1] // PLANES - 1)
    at_U = input_of(places_U, plane, LAYOUT, BLOCK, PLANES)
    block_1U, u_1U = (places_U // U)[None, :], (places_U % U)[None, :]
    row_NU = block_1U.to(tl.int64) * sizes[0] + rows_N[:, None]
    if LAYOUT == "dense":
        # 3 bits: the low two in bytes
        LOW: tl.constexpr = 2 if BITS == 3 else BITS
        EACH: tl.constexpr = 4 if BITS == 3 else PLANES
        q_NU = tl.load(codes + row_NU * (BLOCK // EACH) + plane // EACH * U + u_1U).to(tl.int32)
        flipped_NU = (q_NU >> (plane % EACH * LOW)) & ((1 << LOW) - 1)
        if BITS == 3:
            high_NU = tl.load(high + row_NU * U + u_1U).to(tl.int32)
            flipped_NU = flipped_NU | (((high_NU >> plane) & 1) << 2)
    elif LAYOUT == "8:16":
        half, place = plane // 8, plane % 8
        kept_NU = (tl.load(mask + row_NU * U + u_1U).to(tl.int32) >> (8 * half)) & 255
        word_NU = half_unit(codes, high, mask, row_NU * U, u_1U, half, U, BITS)
        rank_NU = popcount16(kept_NU & ((1 << place) - 1))
        word_NU = (word_NU >> (rank_NU * BITS).to(word_NU.dtype)) & ((1 << BITS) - 1)
        flipped_NU = tl.where(((kept_NU >> place) & 1) != 0, word_NU, 0)
    else:
        half, place = plane // 8, plane % 8
        rank_NU, kept_NU = _rank(mask, starts, row_NU, u_1U, half, place, U)
        word_NU = window(codes + tl.load(rows + rows_N)[:, None], rank_NU * BITS, BITS) & ((1 << BITS) - 1)
        flipped_NU = tl.where(kept_NU, word_NU, 0)
    zeros = grid[1]
    scale_NU = scale_tile(grid, rows_N, at_U, sizes[0], GROUP)
    zeros_NU = zero_tile(grid, rows_N, at_U, sizes[0], BITS, GROUP)
    return scaled(centered(flipped_NU, zeros_NU, BITS, zeros is None, DTYPE), scale_NU, DTYPE), at_U


@triton.jit
def _rank(mask, starts, row_NU, u_1U, half, place, U: tl.constexpr):
    """How many codes of its output come before each weight of a bitmap's plane, and whether it is kept.

    mask holds both halves of a block's bits in the bytes of 16-bit integers; here it is read as 64-bit ones.
    """
    WORDS: tl.constexpr = U // 4
    wide = mask.to(tl.pointer_type(tl.int64)) + row_NU * WORDS
    rank_NU = tl.load(starts + row_NU * 2 + half).to(tl.int32) & 0xFFFF
    for pair in tl.static_range(WORDS // 2):
        # every other byte of a word belongs to this half, so two words make one
        even_NU = _earlier(tl.load(wide + 2 * pair), u_1U - 8 * pair, half, place)
        odd_NU = _earlier(tl.load(wide + 2 * pair + 1), u_1U - 8 * pair - 4, half, place)
        rank_NU += popcount(even_NU | (odd_NU << 8))
    own_NU = tl.load(mask + row_NU * U + u_1U).to(tl.int32)
    return rank_NU, ((own_NU >> (8 * half + place)) & 1) != 0


@triton.jit
def _earlier(word_NU, unit_1U, half, place):
    """Of the bits of four units, in every other byte of a word, those before a place of unit_1U, counted from them."""
    units_1U = tl.minimum(tl.maximum(unit_1U, 0), 4)
    shift_1U = (units_1U % 4 * 16).to(tl.uint64)
    # bytes of earlier units count whole, and of one's own the bits below its place; shifting by 64 is undefined
    whole_1U = tl.where(units_1U == 4, 0xFFFFFFFFFFFFFFFF, (1 << shift_1U) - 1)
    own_1U = tl.where((unit_1U >= 0) & (unit_1U < 4), (1 << place) - 1, 0).to(tl.uint64) << shift_1U
    bits_NU = word_NU.to(tl.uint64, bitcast=True) >> (8 * half)
    return bits_NU & (whole_1U | own_1U) & 0x00FF00FF00FF00FF
