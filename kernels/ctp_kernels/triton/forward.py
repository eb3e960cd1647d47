"""y = x W^T, fused with decoding: y^T = W x^T, so that the decoded weights are the operand that tensor cores take from
registers, and a batch is padded to their narrow side.

A block of inputs is decoded plane by plane. A plane is what one shift of the loaded integers gives, a tile of weights
(N, U) that goes straight into a product with the inputs that belong to it: nothing is ever shuffled between threads.
Layouts are described in `layouts`. For interleaved planes x comes as (M, planes, inputs / planes).

M=batch x tokens N=outputs U=places of a plane

Shared by the functions below: `inputs` is (x_1M, seen_1M), pointers and mask of x; `grid` is (scales, zeros); `tile` is
(block, row, rows_N): the block of inputs, where the tile begins among all (block, output), and its outputs; `sizes` is
(padded_outputs, padded_inputs).
SCALE_AFTER: groups consist of whole segments, whose sums are scaled; else weights are, before they are added.
PTX: see `decode`.
"""

import triton
import triton.language as tl

from ctp_kernels.triton.decode import bitmap, dense_biased, dense_plane, dense_words, eight_sixteen, masks, weight_of
from ctp_kernels.triton.values import scale_tile, scaled, zero_tile


@triton.jit(do_not_specialize=["batch", "splits"])
def forward(
    x,
    y,
    sums,
    arrived,
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
    splits,
    LAYOUT: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    SCALE_AFTER: tl.constexpr,
    PTX: tl.constexpr,
    BLOCK: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """One tile of y (batch, outputs). sums None: one program sums up a tile.

    Else `splits` programs share its inputs. Each leaves its part in sums (splits, batch, outputs) float32; the one that
    arrives last, by the tile's count in `arrived`, adds them up in their order and leaves the count at 0 again.
    """
    DTYPE: tl.constexpr = x.dtype.element_ty
    first_row = tl.program_id(0) * BN
    tokens_M = tl.program_id(1) * BM + tl.arange(0, BM)
    split = tl.program_id(2)
    blocks = padded_inputs // BLOCK
    # 64 bits only where they are needed: one number per tile or row, not one per element
    x_1M = x + (tokens_M.to(tl.int64) * padded_inputs)[None, :]
    seen_1M = (tokens_M < batch)[None, :]
    rows_N = first_row + tl.arange(0, BN)
    inputs, grid, sizes = (x_1M, seen_1M), (scales, zeros), (padded_outputs, padded_inputs)
    sum_NM = tl.zeros((BN, BM), tl.float32)
    for block in tl.range(split * blocks // splits, (split + 1) * blocks // splits):
        tile = (block, padded_outputs.to(tl.int64) * block + first_row, rows_N)
        if LAYOUT == "dense":
            sum_NM = _dense(
                sum_NM, inputs, (codes, high), grid, tile, sizes, BITS, GROUP, SCALE_AFTER, PTX, BLOCK, BN, DTYPE
            )
        else:
            sum_NM = _masked(
                sum_NM, inputs, (codes, high, mask, starts, rows), grid, tile, sizes, LAYOUT, BITS, GROUP, SCALE_AFTER,
                PTX, BLOCK, BN, DTYPE,
            )  # fmt: skip
    at_NM = (tokens_M.to(tl.int64) * outputs)[None, :] + rows_N[:, None]
    there_NM = seen_1M & (rows_N < outputs)[:, None]
    if sums is None:
        tl.store(y + at_NM, sum_NM.to(DTYPE), mask=there_NM)
    else:
        of_split = batch.to(tl.int64) * outputs
        tl.store(sums + split * of_split + at_NM, sum_NM, mask=there_NM)
        tl.debug_barrier()  # one thread tells the others' programs of what all threads have stored
        count = arrived + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        if tl.atomic_add(count, 1, sem="acq_rel") == splits - 1:
            total_NM = tl.zeros((BN, BM), tl.float32)
            for other in range(splits):
                # .cg: from the cache that all programs share
                total_NM += tl.load(sums + other * of_split + at_NM, mask=there_NM, other=0.0, cache_modifier=".cg")
            tl.store(y + at_NM, total_NM.to(DTYPE), mask=there_NM)
            tl.store(count, 0)


@triton.jit
def _add(sum_NM, w_NU, scale_NU, inputs, at_U, DTYPE: tl.constexpr):
    """sum + plane x^T, at_U being where the plane's inputs are in x; scale_NU None where sums are scaled."""
    x_1M, seen_1M = inputs
    if scale_NU is not None:
        w_NU = scaled(w_NU, scale_NU, DTYPE)
    x_UM = tl.load(x_1M + at_U[:, None], mask=seen_1M, other=0.0)
    return tl.dot(w_NU, x_UM, sum_NM, input_precision="ieee")


@triton.jit
def _dense(
    sum_NM, inputs, stored, grid, tile, sizes, BITS: tl.constexpr, GROUP: tl.constexpr, SCALE_AFTER: tl.constexpr,
    PTX: tl.constexpr, BLOCK: tl.constexpr, BN: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Planes: plane p, field p of every integer, is a run of consecutive inputs."""
    block, _row, rows_N = tile
    SYMMETRIC: tl.constexpr = grid[1] is None
    PLANES: tl.constexpr = 4 if BITS == 3 else 16 // BITS
    HALVES: tl.constexpr = 2 if BITS == 3 else 1
    U: tl.constexpr = BLOCK // (PLANES * HALVES)
    A_SEGMENT: tl.constexpr = not SCALE_AFTER and GROUP % U == 0  # is a plane
    places_U = tl.arange(0, U)
    for half in tl.static_range(HALVES):
        one = block * BLOCK + half * (BLOCK // HALVES) + tl.arange(0, 1)
        zeros_NU = zero_tile(grid, rows_N, one, sizes[0], BITS, GROUP)
        if SCALE_AFTER:
            scale_N1 = scale_tile(grid, rows_N, one, sizes[0], GROUP)
            part_NM = tl.zeros_like(sum_NM)
        else:
            part_NM = sum_NM
        words = dense_words(stored[0], stored[1], tile, half, BITS, U, BN)
        biased = dense_biased(words[0], zeros_NU, BITS, SYMMETRIC, PTX, DTYPE)
        for plane in tl.static_range(PLANES):
            first = block * BLOCK + (half * PLANES + plane) * U
            at_U = first + places_U
            if A_SEGMENT:
                one = first + tl.arange(0, 1)
                scale_N1 = scale_tile(grid, rows_N, one, sizes[0], GROUP)
                zeros_NU = zero_tile(grid, rows_N, one, sizes[0], BITS, GROUP)
            elif not SCALE_AFTER:
                scale_NU = scale_tile(grid, rows_N, at_U, sizes[0], GROUP)
                zeros_NU = zero_tile(grid, rows_N, at_U, sizes[0], BITS, GROUP)
            field_NU = dense_plane(words, biased, half, plane, BITS, PTX)
            w_NU = weight_of(field_NU, zeros_NU, BITS, SYMMETRIC, PTX, DTYPE)
            if SCALE_AFTER:
                part_NM = _add(part_NM, w_NU, None, inputs, at_U, DTYPE)
            elif A_SEGMENT:
                plane_NM = _add(tl.zeros_like(sum_NM), w_NU, None, inputs, at_U, DTYPE)
                part_NM = part_NM + plane_NM * scale_N1.to(tl.float32)
            else:
                part_NM = _add(part_NM, w_NU, scale_NU, inputs, at_U, DTYPE)
        sum_NM = sum_NM + part_NM * scale_N1.to(tl.float32) if SCALE_AFTER else part_NM
    return sum_NM


@triton.jit
def _masked(
    sum_NM, inputs, stored, grid, tile, sizes, LAYOUT: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    SCALE_AFTER: tl.constexpr, PTX: tl.constexpr, BLOCK: tl.constexpr, BN: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Half blocks of units of 8 weights; a plane is every eighth input."""
    codes, high, mask, starts, rows = stored
    block, _row, rows_N = tile
    SYMMETRIC: tl.constexpr = grid[1] is None
    U: tl.constexpr = BLOCK // 16
    if LAYOUT == "bitmap":
        words_N1 = codes + tl.load(rows + rows_N)[:, None]
    both_NU = masks(mask, tile, U, BN)
    for half in tl.static_range(2):
        at_U = block * (2 * U) + half * U + tl.arange(0, U)
        at_scale = block * BLOCK + half * (BLOCK // 2) + tl.arange(0, 1) if SCALE_AFTER else at_U * 8
        zeros_NU = zero_tile(grid, rows_N, at_scale, sizes[0], BITS, GROUP)
        if LAYOUT == "8:16":
            fields = eight_sixteen(
                (codes, high, mask), both_NU, zeros_NU, tile, half, BITS, SYMMETRIC, PTX, U, BN, DTYPE
            )
        else:
            fields = bitmap((words_N1, starts), both_NU, zeros_NU, tile, half, BITS, SYMMETRIC, PTX, BN, DTYPE)
        scale_NU = scale_tile(grid, rows_N, at_scale, sizes[0], GROUP)
        part_NM = tl.zeros_like(sum_NM) if SCALE_AFTER else sum_NM
        for place in tl.static_range(8):
            at_x_U = place * (sizes[1] // 8) + at_U
            w_NU = weight_of(fields[place], zeros_NU, BITS, SYMMETRIC, PTX, DTYPE)
            part_NM = _add(part_NM, w_NU, None if SCALE_AFTER else scale_NU, inputs, at_x_U, DTYPE)
        sum_NM = sum_NM + part_NM * scale_NU.to(tl.float32) if SCALE_AFTER else part_NM
    return sum_NM
