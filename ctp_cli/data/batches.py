"""Batches of token windows in an order that depends on nothing but the text and the seed.

B=batch T=tokens K=windows in the shuffle buffer
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from ctp_cli.data.streams import Stream
from ctp_cli.errors import InputError

_CHARACTERS_AT_ONCE = 1 << 18
"""Tokenized in one call: enough for a fast tokenizer to be fast."""


class Batches(Protocol):
    """The batch of every step. `position` and `go_to` spare whoever goes on what lies before."""

    @property
    def seqlen(self) -> int: ...

    def at(self, step: int) -> Tensor:
        """The batch (B, seqlen) int64 of one step, the same whenever it is asked for."""

    def beginning(self, count: int) -> Tensor:
        """The first tokens (count,) int64 of the text; fewer where it has no more."""

    def position(self) -> dict[str, Tensor]:
        """What it takes to give the step after the last one asked for; empty where nothing is needed."""

    def go_to(self, position: dict[str, Tensor]) -> None:
        """Be where an equal object was when it gave this position."""


def batch_at(ids_T: Tensor, seqlen: int, *, step: int, batch_size: int, seed: int) -> Tensor:
    """The batch (B, seqlen) of one step, a pure function of its arguments.

    An epoch takes every window of the text once, in a random order; windows start at another offset in every epoch.
    """
    per_epoch = (ids_T.numel() - seqlen) // seqlen  # the offset costs up to one window
    rows = []
    for index in range(step * batch_size, (step + 1) * batch_size):
        epoch, position = divmod(index, per_epoch)
        generator = _generator(seed, epoch)
        offset = int(torch.randint(seqlen, (1,), generator=generator))
        window = int(torch.randperm(per_epoch, generator=generator)[position])
        rows.append(ids_T[offset + window * seqlen : offset + (window + 1) * seqlen])
    return torch.stack(rows)


@dataclass(frozen=True)
class WholeText:
    """Batches of a text that is in memory as tokens."""

    ids_T: Tensor
    seqlen: int
    batch_size: int
    seed: int

    def at(self, step: int) -> Tensor:
        return batch_at(self.ids_T, self.seqlen, step=step, batch_size=self.batch_size, seed=self.seed)

    def beginning(self, count: int) -> Tensor:
        return self.ids_T[:count]

    def position(self) -> dict[str, Tensor]:
        return {}

    def go_to(self, position: dict[str, Tensor]) -> None: ...


@dataclass(frozen=True)
class _Position:
    """Where a stream is; tokens are int32."""

    step: int
    """The next one."""
    epoch: int
    turn: int
    """Of the file being read, in this epoch's order."""
    pieces: int
    """Read of that file."""
    rest_T: Tensor
    """Tokens that are in no window yet."""
    buffer_KT: Tensor


class StreamedText:
    """Batches of a text that is read, tokenized and cut into windows as they are asked for.

    The next window is drawn from a buffer of `buffer` windows, and the next one read takes its place (as
    `datasets.IterableDataset.shuffle` does, whose state does not hold its buffer). Files are read in another order in
    every epoch. Memory: the buffer three times, at 4 bytes a token, and what is tokenized in one call.
    """

    def __init__(
        self, stream: Stream, tokenizer: Any, *, seqlen: int, batch_size: int, buffer: int, seed: int, held_out: int = 0
    ) -> None:
        """`held_out` pieces at the beginning of the first file are never read.

        Raises InputError if the text does not fill the buffer; errors of the stream come when its files are read.
        """
        self.seqlen, self._stream, self._tokenizer = seqlen, stream, tokenizer
        self._batch_size, self._seed, self._held_out = batch_size, seed, held_out
        self._open: Iterator[str] | None = None
        nothing_T = torch.empty(0, dtype=torch.int32)
        self._now = _Position(0, 0, 0, 0, nothing_T, torch.empty(buffer, seqlen, dtype=torch.int32))
        for window in range(buffer):
            self._now.buffer_KT[window] = self._next_window()
            if self._now.epoch:
                raise InputError(
                    f"text {stream.source!r} is too short to be streamed: {window} windows of {seqlen} tokens do not "
                    f"fill the shuffle buffer of {buffer}",
                    hint="leave out --stream, or use a smaller --shuffle-buffer",
                )
        self._marks = [self._copy()]
        """Positions to go back to, in ascending order: the beginning, and where it was told to go."""

    def at(self, step: int) -> Tensor:
        if step < self._now.step:
            self._return_to(max((m for m in self._marks if m.step <= step), key=lambda mark: mark.step))
        while True:
            batch = self._draw()
            if self._now.step > step:
                return batch

    def beginning(self, count: int) -> Tensor:
        found = torch.empty(0, dtype=torch.int32)
        for file in self._order(0):
            pieces = self._stream.pieces(file, skip=self._skipped(file))
            while found.numel() < count and (texts := _some(pieces)):
                found = torch.cat([found, self._tokens(texts)])
        return found[:count].long()

    def position(self) -> dict[str, Tensor]:
        now = self._copy()
        numbers = torch.tensor([now.step, now.epoch, now.turn, now.pieces])
        return {"numbers": numbers, "rest": now.rest_T, "buffer": now.buffer_KT}

    def go_to(self, position: dict[str, Tensor]) -> None:
        if position:
            step, epoch, turn, pieces = position["numbers"].tolist()
            mark = _Position(step, epoch, turn, pieces, position["rest"], position["buffer"])
            self._marks = [self._marks[0], mark]
            self._return_to(mark)

    def _draw(self) -> Tensor:
        rows = []
        for draw in range(self._now.step * self._batch_size, (self._now.step + 1) * self._batch_size):
            buffer_KT = self._now.buffer_KT
            chosen = int(torch.randint(len(buffer_KT), (1,), generator=_generator(self._seed, draw)))
            rows.append(buffer_KT[chosen].long())
            buffer_KT[chosen] = self._next_window()
        self._now = replace(self._now, step=self._now.step + 1)
        return torch.stack(rows)

    def _next_window(self) -> Tensor:
        begun = self._now.epoch
        while self._now.rest_T.numel() < self.seqlen:
            self._read()
            if self._now.epoch > begun + 1 and not self._now.rest_T.numel():  # a whole epoch lies between
                raise InputError(
                    f"text {self._stream.source!r} has no tokens to learn from, apart from what chooses the prompt",
                    hint="leave out --stream, or give --validation a text of its own",
                )
        window_T = self._now.rest_T[: self.seqlen]
        self._now = replace(self._now, rest_T=self._now.rest_T[self.seqlen :])
        return window_T

    def _read(self) -> None:
        """Add some tokens to the rest, or turn to the next file where this one has ended."""
        now, order = self._now, self._order(self._now.epoch)
        file = order[now.turn]
        if self._open is None:
            self._open = self._stream.pieces(file, skip=self._skipped(file) + now.pieces)
        texts = _some(self._open)
        if texts:
            rest_T = torch.cat([now.rest_T, self._tokens(texts)])
            self._now = replace(now, pieces=now.pieces + len(texts), rest_T=rest_T)
            return
        self._open = None
        ended = now.turn + 1 == len(order)
        self._now = replace(now, epoch=now.epoch + ended, turn=0 if ended else now.turn + 1, pieces=0)

    def _tokens(self, texts: list[str]) -> Tensor:
        try:
            "".join(texts).encode()
        except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair
            raise InputError(f"text {self._stream.source!r} has no UTF-8 form ({error})") from None
        lists = self._tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return torch.cat([torch.tensor(ids, dtype=torch.int32) for ids in lists])

    def _order(self, epoch: int) -> list[int]:
        order: list[int] = torch.randperm(self._stream.files, generator=_generator(self._seed, epoch)).tolist()
        return order

    def _skipped(self, file: int) -> int:
        return self._held_out if file == 0 else 0

    def _copy(self) -> _Position:
        return replace(self._now, rest_T=self._now.rest_T.clone(), buffer_KT=self._now.buffer_KT.clone())

    def _return_to(self, mark: _Position) -> None:
        self._now, self._open = mark, None
        self._now = self._copy()


def _some(pieces: Iterator[str]) -> list[str]:
    """The next ones, about as many as are tokenized at once."""
    texts: list[str] = []
    length = 0
    for text in pieces:
        texts.append(text)
        length += len(text)
        if length >= _CHARACTERS_AT_ONCE:
            break
    return texts


def _generator(seed: int, number: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed * 1_000_003 + number)
