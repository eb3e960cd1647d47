"""What the kernels share: from bits to numbers.

Layouts store `flipped = code ^ zero` of a weight, and 0 of one that is pruned. Flipping back gives a pruned weight its
zero point, so that it comes out as exactly 0, whatever the zero point is, and no kernel asks which weights are there.

N=outputs U=places of a tile along inputs
"""

import triton
import triton.language as tl


@triton.jit
def centered(flipped_NU, zeros_NU, BITS: tl.constexpr, SYMMETRIC: tl.constexpr, DTYPE: tl.constexpr):
    """code - zero, exact, in DTYPE; zeros_NU int32, (N, U) or (N, 1), not looked at where SYMMETRIC: 2^(BITS - 1).

    16-bit types need no conversion from integers: 1024 + c is a float16 whose last bits are those of c, and 128 + c a
    bfloat16 for c up to 127. Constants are written as such: a tile of them would cost weights a way through
    shared memory.
    """
    IN_FLOAT16: tl.constexpr = tl.float16 == DTYPE
    MAGIC: tl.constexpr = 0x6400 if IN_FLOAT16 else 0x4300
    BASE: tl.constexpr = 1024 if IN_FLOAT16 else 128
    MIDDLE: tl.constexpr = 1 << (BITS - 1)
    if tl.float32 == DTYPE or (tl.bfloat16 == DTYPE and BITS == 8):
        if SYMMETRIC:
            w_NU = ((flipped_NU.to(tl.int32) ^ MIDDLE) - MIDDLE).to(DTYPE)
        else:
            w_NU = ((flipped_NU.to(tl.int32) ^ zeros_NU) - zeros_NU).to(DTYPE)
    else:
        if SYMMETRIC:
            w_NU = _as(flipped_NU ^ (MAGIC | MIDDLE), DTYPE) - (BASE + MIDDLE)
        else:
            w_NU = _as(flipped_NU ^ (zeros_NU | MAGIC), DTYPE) - _as(zeros_NU | MAGIC, DTYPE)
    return w_NU


@triton.jit
def bias(zeros_NU, BITS: tl.constexpr, SYMMETRIC: tl.constexpr, DTYPE: tl.constexpr):
    """int16: what `centered` flips fields with, (1, 1) where SYMMETRIC, for `ptx` to do it."""
    MAGIC: tl.constexpr = 0x6400 if tl.float16 == DTYPE else 0x4300
    MIDDLE: tl.constexpr = 1 << (BITS - 1)
    return tl.full((1, 1), MAGIC | MIDDLE, tl.int16) if SYMMETRIC else (zeros_NU | MAGIC).to(tl.int16)


@triton.jit
def centered_by(biased_NU, bias_NU, BITS: tl.constexpr, SYMMETRIC: tl.constexpr, DTYPE: tl.constexpr):
    """`centered` of fields that were flipped with their `bias`."""
    if SYMMETRIC:
        BASE: tl.constexpr = (1024 if tl.float16 == DTYPE else 128) + (1 << (BITS - 1))
        w_NU = _as(biased_NU, DTYPE) - BASE
    else:
        w_NU = _as(biased_NU, DTYPE) - _as(bias_NU, DTYPE)
    return w_NU


@triton.jit
def scaled(w_NU, scale_NU, DTYPE: tl.constexpr):
    """w * scale, rounded once. A float16 scale does not fit into a bfloat16, so there the product is float32."""
    if tl.bfloat16 == DTYPE:
        product_NU = (w_NU.to(tl.float32) * scale_NU.to(tl.float32)).to(DTYPE)
    else:
        product_NU = w_NU * scale_NU.to(DTYPE)
    return product_NU


@triton.jit
def _as(bits_NU, DTYPE: tl.constexpr):
    return bits_NU.to(tl.int16).to(DTYPE, bitcast=True)


@triton.jit
def popcount16(bits):
    """Set bits of int32 below 2^16."""
    bits = bits - ((bits >> 1) & 0x5555)
    bits = (bits & 0x3333) + ((bits >> 2) & 0x3333)
    bits = (bits + (bits >> 4)) & 0x0F0F
    return (bits + (bits >> 8)) & 31


@triton.jit
def window(words, bit, BITS: tl.constexpr):
    """8 codes as unsigned integers, from any bit of a stream of 32-bit words on; reads one word more than it needs."""
    at, shift = bit >> 5, (bit & 31).to(tl.uint32)
    first = tl.load(words + at).to(tl.uint32, bitcast=True)
    second = tl.load(words + at + 1).to(tl.uint32, bitcast=True)
    # two shifts, since shifting 32 bits by 32 is undefined
    codes = (first >> shift) | ((second << 1) << (31 - shift))
    if BITS == 8:
        third = tl.load(words + at + 2).to(tl.uint32, bitcast=True)
        later = (second >> shift) | ((third << 1) << (31 - shift))
        codes = codes.to(tl.uint64) | (later.to(tl.uint64) << 32)
    return codes


@triton.jit
def half_unit(codes, high, mask, row, place_U, half, U: tl.constexpr, BITS: tl.constexpr):
    """The codes of 8 weights of an 8:16 layout as unsigned integers, and after them those of later weights.

    Two neighbours of U in a half block share the 8 codes of 16 weights: 16, 24 (in two pieces), 32 or 64 bits.
    """
    at_U = row + half * (U // 2) + place_U // 2
    word_NU = tl.load(codes + at_U)
    if BITS == 8:
        unit_NU = word_NU.to(tl.uint64, bitcast=True)
    elif BITS == 4:  # byte k is codes k and k + 4
        word_NU = word_NU.to(tl.uint32, bitcast=True)
        unit_NU = _bytes_to_nibbles(word_NU & 0x0F0F0F0F) | (_bytes_to_nibbles((word_NU >> 4) & 0x0F0F0F0F) << 16)
    else:
        unit_NU = word_NU.to(tl.uint16, bitcast=True).to(tl.uint32)
        if BITS == 3:
            unit_NU = unit_NU | (tl.load(high + at_U).to(tl.uint32) << 16)
    first_NU = (tl.load(mask + row + place_U // 2 * 2).to(tl.int32) >> (8 * half)) & 255
    before_NU = tl.where(place_U % 2 == 1, popcount16(first_NU), 0)
    # 8 codes of 8 bits cannot be shifted out of 64 at once, which is undefined
    shift_NU = (tl.minimum(before_NU, 7) * BITS).to(unit_NU.dtype)
    return tl.where(before_NU == 8, 0, unit_NU >> shift_NU)


@triton.jit
def _bytes_to_nibbles(bytes_NU):
    """Four bytes below 16, next to one another in the lowest 16 bits."""
    pairs_NU = (bytes_NU | (bytes_NU >> 4)) & 0x00FF00FF
    return (pairs_NU | (pairs_NU >> 8)) & 0xFFFF


@triton.jit
def scale_tile(grid, rows_N, inputs_U, outputs, GROUP: tl.constexpr):
    """Scales (N, U) of outputs rows_N at inputs inputs_U."""
    return tl.load(grid[0] + (inputs_U // GROUP)[None, :] * outputs + rows_N[:, None])


@triton.jit
def zero_tile(grid, rows_N, inputs_U, outputs, BITS: tl.constexpr, GROUP: tl.constexpr):
    """Zero points, int32, as `scale_tile`; where all are the same, a (1, 1) that nobody looks at."""
    zeros = grid[1]
    if zeros is None:
        zeros_NU = tl.full((1, 1), 1 << (BITS - 1), tl.int32)
    else:
        zeros_NU = tl.load(zeros + (inputs_U // GROUP)[None, :] * outputs + rows_N[:, None]).to(tl.int32)
    return zeros_NU
