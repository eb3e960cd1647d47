"""Token windows for calibration, learning and evaluation."""

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ctp_cli.data.sources import Text
from ctp_cli.errors import InputError

_CHARACTERS = 6
"""Of a token, at first guess."""
_MARGIN = 64
"""Tokens before a cut that may be others than those of the whole text."""


def token_ids(text: Text, tokenizer: PreTrainedTokenizerBase, *, most: int | None = None) -> Tensor:
    """The text as one stream of ids (T,) int64, or its first `most`; no BOS or other special tokens are added.

    Of a long text only as much is tokenized as is needed: a file of C4 would take minutes.
    """
    length = len(text.content) if most is None else _CHARACTERS * (most + _MARGIN)
    while True:
        ids = tokenizer(text.content[:length], add_special_tokens=False, verbose=False)["input_ids"]
        if length >= len(text.content) or (most is not None and len(ids) >= most + _MARGIN):
            return torch.tensor(ids, dtype=torch.long)[:most]
        length *= 2


def bos_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """Raises InputError where the tokenizer has none."""
    if tokenizer.bos_token_id is None:
        raise InputError("this model's tokenizer has no BOS token", hint="leave out --bos")
    return int(tokenizer.bos_token_id)


def windows(ids_T: Tensor, seqlen: int, *, most: int | None = None, text: Text, at_least: int = 1) -> Tensor:
    """Non-overlapping windows (N, seqlen), the tail dropped, the first `most` of them.

    Raises InputError if the text has fewer than `at_least` windows.
    """
    count = ids_T.numel() // seqlen
    if count < at_least:
        raise InputError(
            f"text {text.source!r} is too short: {ids_T.numel()} tokens are {count} windows of {seqlen}, at least "
            f"{at_least} needed",
            hint="use a longer text or a smaller --seqlen",
        )
    count = count if most is None else min(count, most)
    return ids_T[: count * seqlen].view(count, seqlen)
