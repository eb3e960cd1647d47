"""The weights themselves, in a type that PyTorch multiplies: for gradients and large batches."""

import triton
import triton.language as tl

from ctp_kernels.triton.decode import bitmap, dense_biased, dense_plane, dense_words, eight_sixteen, masks, weight_of
from ctp_kernels.triton.values import scale_tile, scaled, zero_tile


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
    LAYOUT: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    PTX: tl.constexpr,
    BLOCK: tl.constexpr,
    BN: tl.constexpr,
):
    """One block of BN of the weights (outputs, inputs). Grid: (padded_outputs / BN, blocks)."""
    DTYPE: tl.constexpr = dense.dtype.element_ty
    SYMMETRIC: tl.constexpr = zeros is None
    grid, block = (scales, zeros), tl.program_id(1)
    first_row = tl.program_id(0) * BN
    rows_N = first_row + tl.arange(0, BN)
    tile = (block, padded_outputs.to(tl.int64) * block + first_row, rows_N)
    to_N1 = dense + (rows_N.to(tl.int64) * inputs)[:, None]
    there_N1 = (rows_N < outputs)[:, None]
    if LAYOUT == "dense":
        PLANES: tl.constexpr = 4 if BITS == 3 else 16 // BITS
        HALVES: tl.constexpr = 2 if BITS == 3 else 1
        U: tl.constexpr = BLOCK // (PLANES * HALVES)
        for half in tl.static_range(HALVES):
            words = dense_words(codes, high, tile, half, BITS, U, BN)
            one = block * BLOCK + tl.arange(0, 1)
            biased = dense_biased(
                words[0], zero_tile(grid, rows_N, one, padded_outputs, BITS, GROUP), BITS, SYMMETRIC, PTX, DTYPE
            )
            for plane in tl.static_range(PLANES):
                at_U = block * BLOCK + (half * PLANES + plane) * U + tl.arange(0, U)
                zeros_NU = zero_tile(grid, rows_N, at_U, padded_outputs, BITS, GROUP)
                field_NU = dense_plane(words, biased, half, plane, BITS, PTX)
                w_NU = weight_of(field_NU, zeros_NU, BITS, SYMMETRIC, PTX, DTYPE)
                w_NU = scaled(w_NU, scale_tile(grid, rows_N, at_U, padded_outputs, GROUP), DTYPE)
                tl.store(to_N1 + at_U[None, :], w_NU, mask=there_N1 & (at_U < inputs)[None, :])
    else:
        UNITS: tl.constexpr = BLOCK // 16
        if LAYOUT == "bitmap":
            words_N1 = codes + tl.load(rows + rows_N)[:, None]
        both_NU = masks(mask, tile, UNITS, BN)
        for half in tl.static_range(2):
            first = block * BLOCK + half * (BLOCK // 2)
            at_U = first + tl.arange(0, UNITS) * 8
            zeros_NU = zero_tile(grid, rows_N, at_U, padded_outputs, BITS, GROUP)
            if LAYOUT == "8:16":
                fields = eight_sixteen(
                    (codes, high, mask), both_NU, zeros_NU, tile, half, BITS, SYMMETRIC, PTX, UNITS, BN, DTYPE
                )
            else:
                fields = bitmap((words_N1, starts), both_NU, zeros_NU, tile, half, BITS, SYMMETRIC, PTX, BN, DTYPE)
            # the first join's pairs end up furthest apart: (N, U, 2, 2, 2), places 4, 2 and 1
            even = tl.join(tl.join(fields[0], fields[4]), tl.join(fields[2], fields[6]))
            odd = tl.join(tl.join(fields[1], fields[5]), tl.join(fields[3], fields[7]))
            fields_NU8 = tl.reshape(tl.join(even, odd), (BN, UNITS, 8))
            w_NU8 = weight_of(fields_NU8, zeros_NU[:, :, None], BITS, SYMMETRIC, PTX, DTYPE)
            scale_NU = scale_tile(grid, rows_N, at_U, padded_outputs, GROUP)
            w_NK = tl.reshape(scaled(w_NU8, scale_NU[:, :, None], DTYPE), (BN, UNITS * 8))
            at_K = first + tl.arange(0, UNITS * 8)
            tl.store(to_N1 + at_K[None, :], w_NK, mask=there_N1 & (at_K < inputs)[None, :])
