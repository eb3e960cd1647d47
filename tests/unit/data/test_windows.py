"""Token windows: in order, none overlapping, the tail dropped."""

import pytest
import torch
from tiny_models import tiny_tokenizer

from ctp_cli.data.sources import Text
from ctp_cli.data.windows import token_ids, windows
from ctp_cli.errors import InputError

TEXT = Text("label", "notes.txt", "The assert statement. " * 20)


def test_windows_follow_each_other_and_drop_the_tail() -> None:
    ids = torch.arange(103)
    cut = windows(ids, 25, text=TEXT)
    assert cut.tolist() == [list(range(start, start + 25)) for start in (0, 25, 50, 75)]
    assert windows(ids, 25, most=2, text=TEXT).tolist() == cut[:2].tolist()
    assert windows(ids, 25, most=99, text=TEXT).tolist() == cut.tolist()
    assert windows(torch.arange(100), 25, text=TEXT).shape == (4, 25)


def test_a_text_that_is_too_short_is_refused_with_its_numbers() -> None:
    with pytest.raises(InputError, match=r"'notes\.txt' is too short: 24 tokens are 0 windows of 25") as caught:
        windows(torch.arange(24), 25, text=TEXT)
    assert "--seqlen" in caught.value.hint
    assert windows(torch.arange(25), 25, text=TEXT).shape == (1, 25)
    with pytest.raises(InputError, match="at least 3 needed"):
        windows(torch.arange(74), 25, at_least=3, text=TEXT)


def test_ids_are_those_of_the_text_alone() -> None:
    """A tokenizer that puts a BOS before what it encodes must not do so in the middle of a stream."""
    tokenizer = tiny_tokenizer(bos=True)
    assert tokenizer(TEXT.content)["input_ids"][0] == tokenizer.bos_token_id
    ids = token_ids(TEXT, tokenizer)
    assert ids.dtype == torch.int64
    assert tokenizer.bos_token_id not in ids.tolist()
    assert tokenizer.decode(ids) == TEXT.content


@pytest.mark.parametrize("most", [1, 50, 333, 100_000])
def test_of_a_long_text_only_its_beginning_is_tokenized(most: int) -> None:
    words = " ".join(str(number) for number in range(3000))  # more tokens a character than the first guess
    text, tokenizer = Text("label", "numbers.txt", words), tiny_tokenizer(bos=False)
    whole = token_ids(text, tokenizer)
    assert token_ids(text, tokenizer, most=most).tolist() == whole[:most].tolist()
    seen = []

    def spy(content: str, **options: object) -> object:
        seen.append(len(content))
        return tokenizer(content, **options)

    token_ids(text, spy, most=most)
    assert max(seen) < len(words) / 2 or most > 1000
