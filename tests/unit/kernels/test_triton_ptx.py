"""The instructions that decode two weights at once, followed one by one in Python: no GPU is needed for that."""

import importlib.util
import re
from collections.abc import Callable

import pytest
import torch
from ctp_kernels.triton.layouts import pack

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
ALL = 0xFFFFFFFF
BIASES = pytest.mark.parametrize("bias", [(0x6407, 0x6408), (0x430F, 0x4300)], ids=["float16", "bfloat16"])
"""Of two weights: their zero points are the lowest bits."""


def lop3(a: int, b: int, c: int, table: int) -> int:
    """Bit by bit, the table's entry number abc; by the PTX instruction set's description."""
    return sum(
        ((table >> ((a >> bit & 1) << 2 | (b >> bit & 1) << 1 | (c >> bit & 1))) & 1) << bit for bit in range(32)
    )


def prmt(a: int, b: int, selector: int) -> int:
    """Byte j is the one of b:a that nibble j of the selector names; eight times its sign if the fourth bit is set."""
    both, found = a | b << 32, 0
    for at in range(4):
        nibble = selector >> 4 * at & 15
        byte = both >> 8 * (nibble & 7) & 255
        found |= (255 * (byte >> 7) if nibble & 8 else byte) << 8 * at
    return found


OPERATIONS: dict[str, Callable[..., int]] = {
    "lop3.b32": lop3,
    "prmt.b32": prmt,
    "shl.b32": lambda a, b: a << b,
    "shr.u32": lambda a, b: a >> b,
    "and.b32": lambda a, b: a & b,
    "xor.b32": lambda a, b: a ^ b,
    "add.u32": lambda a, b: a + b,
    "bfe.u32": lambda a, first, length: a >> first & ((1 << length) - 1),
    "mul.lo.u32": lambda a, b: a * b,
    "mad.lo.u32": lambda a, b, c: a * b + c,
}


def run(code: str, outputs: int, *inputs: int) -> list[int]:
    """What `$0` and on hold after the code, `$outputs` and on being the inputs."""
    registers = {f"${outputs + number}": value for number, value in enumerate(inputs)}
    for name, operands in re.findall(r"^(?:\{ *)?([a-z0-9]+(?:\.[a-z0-9]+)+) ([^;{]*);$", code, re.MULTILINE):
        target, *sources = operands.split(", ")
        values = [registers[x] if x in registers else int(x, 0) for x in sources]
        registers[target] = OPERATIONS[name](*values) & ALL
    return [registers[f"${number}"] for number in range(outputs)]


def halves(values: list[int]) -> list[tuple[int, int]]:
    return [(value & 0xFFFF, value >> 16) for value in values]


def random(high: int, *shape: int) -> torch.Tensor:
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(sum(shape)))


def signed_words(x: torch.Tensor) -> list[int]:
    """int16 next to one another as 32 bits, the first in the lower half."""
    return [int(value) & ALL for value in x.contiguous().view(torch.int32).flatten()]


@BIASES
def test_dense_planes(bias: tuple[int, int]) -> None:
    from ctp_kernels.triton import ptx

    codes = random(16, 64, 128).to(torch.uint8)
    weight = pack(codes, torch.ones(64, 1), bits=4)
    fields = (codes ^ 8).long().view(64, 4, 32)
    for row, u in ((0, 0), (3, 2), (63, 30)):
        word = signed_words(weight.codes[0, row, u : u + 2])[0]
        found = halves(run(ptx.DENSE.value, 4, word, bias[0] | bias[1] << 16))
        assert found == [
            (int(fields[row, plane, u]) ^ bias[0], int(fields[row, plane, u + 1]) ^ bias[1]) for plane in range(4)
        ]


@BIASES
def test_eight_sixteen_planes(bias: tuple[int, int]) -> None:
    from ctp_kernels.triton import ptx

    codes = random(16, 64, 256).to(torch.uint8)
    keep = torch.rand(64, 16, 16, generator=torch.Generator().manual_seed(1)).argsort(2) < 8
    keep[0], keep[1] = torch.arange(16) < 8, torch.arange(16) >= 8
    keep = keep.flatten(1)
    weight = pack(codes, torch.ones(64, 1), bits=4, keep_NK=keep)
    assert weight.layout == "8:16" and weight.mask is not None
    fields = ((codes ^ 8).long() * keep).view(64, 2, 16, 8)
    for half, code in ((0, ptx.FIRST_HALF), (1, ptx.SECOND_HALF)):
        for row in range(64):
            words = signed_words(weight.codes[0, row, 8 * half : 8 * half + 8])
            masks = signed_words(weight.mask[0, row])
            for pair in range(8):
                found = halves(run(code.value, 8, words[pair], masks[pair], bias[0] | bias[1] << 16))
                first, second = fields[row, half, 2 * pair], fields[row, half, 2 * pair + 1]
                assert found == [(int(first[p]) ^ bias[0], int(second[p]) ^ bias[1]) for p in range(8)]


@BIASES
def test_eight_planes(bias: tuple[int, int]) -> None:
    from ctp_kernels.triton import ptx

    kept = [0, 255, 1, 128, *(int(x) for x in random(256, 60))]
    for first, second in zip(kept[::2], kept[1::2], strict=True):
        codes = random(16, 2, 8).tolist()
        # codes after the last of a unit are those of later ones
        words = [sum(code << 4 * at for at, code in enumerate(unit)) for unit in codes]
        found = halves(run(ptx.EIGHT.value, 8, *words, first | second << 16, bias[0] | bias[1] << 16))
        wanted = []
        for place in range(8):
            both = []
            for mask, unit, own in ((first, codes[0], bias[0]), (second, codes[1], bias[1])):
                rank = (mask & ((1 << place) - 1)).bit_count()
                both.append((unit[rank] if mask >> place & 1 else 0) ^ own)
            wanted.append(tuple(both))
        assert found == wanted
