"""Decoding 4-bit codes on NVIDIA GPUs, two weights to a register: what Triton's compiler does one weight at a time.

Every function here means what the plain code beside its call means, and is taken for float16 and bfloat16. It works on
two neighbouring elements of a tile at once, the lower in the lower half of a register. `bias` holds, for every weight,
the bits of a number whose last bits are the zero point (see `values.centered`); what comes out are `field ^ bias`, the
bits of that number plus `code - zero`.

N=outputs U=places of a tile along inputs
"""

import triton
import triton.language as tl

_SPREAD = ((12, 0x000F000F), (6, 0x03030303), (3, 0x11111111))
"""Shifts and masks after which 8 bits lie in 8 nibbles."""
_AND_XOR, _OR_AND, _OR_XOR = 0x6A, 0xA8, 0xF6
"""Tables of lop3: (a & b) ^ c, (a | b) & c, a | (b ^ c)."""


def _dense() -> str:
    lines = [f"lop3.b32 $0, $4, 0x000F000F, $5, {_AND_XOR};"]
    for plane in (1, 2, 3):
        lines += [f"shr.u32 t, $4, {4 * plane};", f"lop3.b32 ${plane}, t, 0x000F000F, $5, {_AND_XOR};"]
    return "{ .reg .b32 t;\n" + "\n".join(lines) + "\n}"


def _spread(bits: str) -> list[str]:
    """8 mask bits in register `bits` to the lowest bits of its nibbles."""
    return [
        line
        for shift, mask in _SPREAD
        for line in (f"shl.b32 t, {bits}, {shift};", f"lop3.b32 {bits}, {bits}, t, {mask}, {_OR_AND};")
    ]


def _selector(bits: str, to: str) -> list[str]:
    """From how many kept weights come before each of 8, in `to`, to what prmt takes: nibbles whose fourth bit says
    that a weight is pruned, for which prmt repeats a byte's sign, which is 0 here."""
    return [f"shl.b32 t, {bits}, 3;", f"lop3.b32 {to}, {to}, t, 0x88888888, {_OR_XOR};"]


def _quads(low: str, high: str, selector: str, first: str, second: str) -> list[str]:
    """The bytes that eight nibbles of a selector choose, four in each register."""
    return [
        f"prmt.b32 {first}, {low}, {high}, {selector};",
        f"shr.u32 t, {selector}, 16;",
        f"prmt.b32 {second}, {low}, {high}, t;",
    ]


def _pairs(planes: int, bias: int) -> list[str]:
    """Byte j of a{k} and of b{k} into the halves of output 4 k + j, the bias flipped in."""
    return [
        line
        for plane in range(planes)
        for line in (
            f"prmt.b32 t, a{plane // 4}, b{plane // 4}, {0x8080 | plane % 4 | (4 + plane % 4) << 8};",
            f"xor.b32 ${plane}, t, ${bias};",
        )
    ]


def _eight_sixteen(half: int) -> str:
    lines = [".reg .b32 t, lo, hi, s, z, r, q, a0, a1, b0, b1;"]
    lines += ["and.b32 lo, $8, 0x0F0F0F0F;", "shr.u32 t, $8, 4;", "and.b32 hi, t, 0x0F0F0F0F;"]
    lines += [f"bfe.u32 s, $9, {8 * half}, 8;", f"bfe.u32 z, $9, {16 + 8 * half}, 8;", *_spread("s"), *_spread("z")]
    # nibble j: kept weights before place j, of 8, then of those after them
    lines += ["mul.lo.u32 r, s, 0x11111110;", "add.u32 q, r, s;", "shr.u32 q, q, 28;"]
    lines += ["mul.lo.u32 q, q, 0x11111111;", "mad.lo.u32 q, z, 0x11111110, q;"]
    lines += _selector("s", "r") + _selector("z", "q") + _quads("lo", "hi", "r", "a0", "a1")
    lines += _quads("lo", "hi", "q", "b0", "b1")
    return "{\n" + "\n".join(lines + _pairs(8, 10)) + "\n}"


def _eight() -> str:
    lines = [".reg .b32 t, lo, hi, s, r, q, a0, a1, b0, b1;"]
    for unit, (word, quad) in enumerate((("$8", "a"), ("$9", "b"))):
        lines += [f"and.b32 lo, {word}, 0x0F0F0F0F;", f"shr.u32 t, {word}, 4;", "and.b32 hi, t, 0x0F0F0F0F;"]
        lines += [f"bfe.u32 s, $10, {16 * unit}, 8;", *_spread("s"), "mul.lo.u32 r, s, 0x11111110;"]
        # codes follow one another: even ones are the bytes of lo, odd ones those of hi
        lines += ["shr.u32 q, r, 1;", "and.b32 q, q, 0x33333333;"]
        lines += ["and.b32 r, r, 0x11111111;", "mad.lo.u32 r, r, 4, q;"]
        lines += _selector("s", "r") + _quads("lo", "hi", "r", f"{quad}0", f"{quad}1")
    return "{\n" + "\n".join(lines + _pairs(8, 11)) + "\n}"


def _outputs(count: int, inputs: int) -> str:
    return ",".join(["=&r"] * count + ["r"] * inputs)


DENSE, DENSE_REGISTERS = tl.constexpr(_dense()), tl.constexpr(_outputs(4, 2))
FIRST_HALF, SECOND_HALF = (tl.constexpr(_eight_sixteen(half)) for half in (0, 1))
HALF_REGISTERS = tl.constexpr(_outputs(8, 3))
EIGHT, EIGHT_REGISTERS = tl.constexpr(_eight()), tl.constexpr(_outputs(8, 4))
BITS4, BITS8 = (tl.constexpr((tl.int16,) * count) for count in (4, 8))
"""Types of the results."""


@triton.jit
def dense_planes(word_NU, bias):
    """Four fields of int16 words, as 4 tiles of int16."""
    return tl.inline_asm_elementwise(DENSE, DENSE_REGISTERS, [word_NU, bias], dtype=BITS4, is_pure=True, pack=2)


@triton.jit
def eight_sixteen_planes(word_NU, kept_NU, bias, HALF: tl.constexpr):
    """8 places of units, two of which keep 8 together, as 8 tiles of int16.

    word int16: two neighbours' bits are 8 codes, byte k those of k and k + 4; kept int16: 8 bits of each half block.
    Codes are spread over bytes, and prmt picks four by how many kept weights come before each place.
    """
    return tl.inline_asm_elementwise(
        SECOND_HALF if HALF else FIRST_HALF,
        HALF_REGISTERS,
        [word_NU, kept_NU, bias],
        dtype=BITS8,
        is_pure=True,
        pack=2,
    )


@triton.jit
def eight_planes(word_NU, kept_NU, bias):
    """8 places, of which any are kept, as 8 tiles of int16. word int32: codes, one after the other; kept int16."""
    return tl.inline_asm_elementwise(
        EIGHT, EIGHT_REGISTERS, [word_NU, kept_NU, bias], dtype=BITS8, is_pure=True, pack=2
    )
