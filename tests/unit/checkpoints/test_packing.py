"""Codes in 32-bit words: against bit streams written out by hand and big integers of Python's own."""

import pytest
import torch
from ctp_kernels.packing import pack_rows, unpack_rows
from hypothesis import given, settings
from hypothesis import strategies as st

UNIT = {2: 16, 3: 32, 4: 8, 8: 4}  # codes that fill whole words


@st.composite
def code_tables(draw: st.DrawFn) -> tuple[int, list[list[int]]]:
    """bits, and columns of codes of equal length."""
    bits = draw(st.sampled_from([2, 3, 4, 8]))
    length = UNIT[bits] * draw(st.integers(1, 3))
    column = st.lists(st.integers(0, 2**bits - 1), min_size=length, max_size=length)
    return bits, draw(st.lists(column, min_size=1, max_size=3))


@settings(deadline=None, max_examples=100)
@given(code_tables())
def test_packing_is_one_little_endian_bit_stream_and_can_be_undone(table: tuple[int, list[list[int]]]) -> None:
    bits, columns = table
    codes = torch.tensor(columns, dtype=torch.uint8).T
    words = pack_rows(codes, bits)
    assert words.dtype == torch.int32
    for j, column in enumerate(columns):
        stream = sum(code << (bits * i) for i, code in enumerate(column))  # one integer of any length
        expected = [(stream >> (32 * k)) & 0xFFFFFFFF for k in range(len(column) * bits // 32)]
        assert [word & 0xFFFFFFFF for word in words[:, j].tolist()] == expected
    back = unpack_rows(words, bits)
    assert back.dtype == torch.uint8
    assert torch.equal(back, codes)


def test_three_bits_by_hand() -> None:
    """Codes 1, 2, 3 and 7 at 9, 10 and 21: the tenth and the twenty-first straddle two words.

    Code i lies at bit 3i: 0 -> 1, 3 -> 2, 6 -> 3; code 10 at bits 30, 31 and 0 of the next word; code 21 at bit 63,
    the last of word 1, and bits 0 and 1 of word 2.
    """
    codes = torch.zeros(32, 1, dtype=torch.uint8)
    codes[0], codes[1], codes[2], codes[10], codes[21], codes[31] = 1, 2, 3, 7, 5, 4
    words = [word & 0xFFFFFFFF for word in pack_rows(codes, 3)[:, 0].tolist()]
    assert words[0] == 0b11 << 30 | 0b011 << 6 | 0b010 << 3 | 0b001
    assert words[1] == 1 << 31 | 0b1  # lowest bit of code 21 (0b101), highest of code 10
    assert words[2] == 0b100 << 29 | 0b10  # code 31 at bits 93 to 95; the rest of code 21
    assert torch.equal(unpack_rows(pack_rows(codes, 3), 3), codes)


@pytest.mark.parametrize(
    ("bits", "codes", "word"),
    [
        (4, range(8), 0x76543210),
        (4, [7] * 8, 0x77777777),
        (8, [0x78, 0x56, 0x34, 0x12], 0x12345678),
        (8, [255] * 4, -1),
        (2, [3] + [0] * 14 + [2], -(1 << 31) + 3),
    ],
)
def test_words_by_hand(bits: int, codes: list[int], word: int) -> None:
    column = torch.tensor(list(codes), dtype=torch.uint8)[:, None]
    assert pack_rows(column, bits).tolist() == [[word]]
    assert unpack_rows(torch.tensor([[word]], dtype=torch.int32), bits).flatten().tolist() == list(codes)


@pytest.mark.parametrize(("bits", "rows"), [(4, 7), (3, 16), (2, 8), (8, 3)])
def test_codes_that_fill_no_whole_words_are_refused(bits: int, rows: int) -> None:
    with pytest.raises(ValueError, match=f"{rows} codes of {bits} bits"):
        pack_rows(torch.zeros(rows, 2, dtype=torch.uint8), bits)


def test_words_that_hold_no_whole_runs_are_refused() -> None:
    with pytest.raises(ValueError, match="4 words"):
        unpack_rows(torch.zeros(4, 2, dtype=torch.int32), 3)
