"""Integer codes to 32-bit words and back: one little-endian bit stream along the first dimension.

For 2, 4 and 8 bits a word holds 32 / bits codes, least significant bits first; for 3 bits, 32 codes fill 3 words.
This is the layout of GPTQ checkpoints (qweight along inputs, qzeros along outputs).
"""

import torch
from torch import Tensor

WORD_BITS = 32


def pack_rows(codes_NM: Tensor, bits: int) -> Tensor:
    """Pack codes (N, M), integers in [0, 2^bits), into int32 words (N * bits / 32, M).

    Raises: ValueError if N * bits is no multiple of 32, or codes have more bits.
    """
    rows, columns = codes_NM.shape
    if codes_NM.numel() and not 0 <= int(codes_NM.min()) <= int(codes_NM.max()) < 2**bits:
        raise ValueError(f"codes from {int(codes_NM.min())} to {int(codes_NM.max())} in {bits} bits")
    if rows * bits % WORD_BITS:
        raise ValueError(f"{rows} codes of {bits} bits do not fill whole 32-bit words")
    codes_NM = codes_NM.to(torch.int64)
    if WORD_BITS % bits == 0:
        per_word = WORD_BITS // bits
        split = codes_NM.view(-1, per_word, columns)
        words = torch.zeros(split.shape[0], columns, dtype=torch.int64, device=split.device)
        for position in range(per_word):
            words |= split[:, position] << (bits * position)
    else:
        split = codes_NM.view(-1, WORD_BITS, columns)  # `bits` words hold 32 codes
        words = torch.zeros(split.shape[0], bits, columns, dtype=torch.int64, device=split.device)
        for position in range(WORD_BITS):
            word, shift = divmod(position * bits, WORD_BITS)
            words[:, word] |= (split[:, position] << shift) & 0xFFFFFFFF
            if shift + bits > WORD_BITS:
                words[:, word + 1] |= split[:, position] >> (WORD_BITS - shift)
        words = words.view(-1, columns)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def unpack_rows(words_WM: Tensor, bits: int) -> Tensor:
    """The inverse of `pack_rows`: int32 words (W, M) to uint8 codes (W * 32 / bits, M).

    Raises: ValueError if W words hold no whole number of 32-code runs (3 bits only).
    """
    columns = words_WM.shape[1]
    words = words_WM.to(torch.int64) & 0xFFFFFFFF
    mask = (1 << bits) - 1
    if WORD_BITS % bits == 0:
        per_word = WORD_BITS // bits
        codes = torch.stack([(words >> (bits * position)) & mask for position in range(per_word)], dim=1)
        return codes.view(-1, columns).to(torch.uint8)
    if words.shape[0] % bits:
        raise ValueError(f"{words.shape[0]} words are no whole number of {bits}-word runs")
    runs = words.view(-1, bits, columns)
    positions = []
    for position in range(WORD_BITS):
        word, shift = divmod(position * bits, WORD_BITS)
        code = runs[:, word] >> shift
        if shift + bits > WORD_BITS:
            code = code | (runs[:, word + 1] << (WORD_BITS - shift))
        positions.append(code & mask)
    return torch.stack(positions, dim=1).reshape(-1, columns).to(torch.uint8)
