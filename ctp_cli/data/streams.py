"""Text that is read while it is used, in pieces: for what is larger than memory.

A streamed text is written as others are (`ctp_cli.data.sources`), and FILE may be a pattern: `corpus/*.jsonl:body`.
"""

import glob
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from ctp_cli.data.sources import (
    FILE_ENDINGS,
    HUB_TEXTS,
    hash_of_beginning,
    hub_errors_are_said,
    jsonl_rows,
    known_names,
    parquet_rows,
    split_spec,
    unreadable_is_said,
)
from ctp_cli.errors import InputError

_CHUNK = 1 << 16
"""Characters of a .txt file that are a piece, or as many more as lie before the end of the line."""
_ENDS_BYTES = 1 << 20


class Stream(ABC):
    """Files whose text comes in pieces, in an order that never changes."""

    source: str
    """As given, without the label."""
    files: int

    @abstractmethod
    def pieces(self, file: int, *, skip: int = 0) -> Iterator[str]:
        """The pieces of a file but for the first `skip`; joined, they are its text.

        Raises InputError (NetworkError for the hub) for what cannot be read, where it is reached.
        """

    @abstractmethod
    def fingerprint(self) -> str:
        """By which equal text is known again."""

    @abstractmethod
    def beginnings(self) -> list[str]:
        """`Text.beginning` of every file; none for a data set of the hub, which its name and part tell.

        Raises InputError for a file whose beginning cannot be read.
        """


def open_stream(spec: str, *, part: str = "train") -> Stream:
    """Raises InputError for a text that is not there or cannot be streamed, NetworkError without the hub."""
    _, source, given_part, rest = split_spec(spec)
    if source in HUB_TEXTS:
        return HubStream(source, given_part or part)
    if source == "pydoc":
        raise InputError("text pydoc cannot be streamed: it is inside Python", hint="leave out --stream")
    if rest.endswith(FILE_ENDINGS):
        source, given_part = rest, ""
    paths = [Path(source)]
    if not paths[0].is_file():  # else its name may hold brackets
        names = sorted(glob.glob(source, recursive=True))  # noqa: PTH207 - Path.glob wants relative patterns
        paths = [path for path in map(Path, names) if path.is_file()]
    if not paths:
        raise InputError(
            f"text {spec!r}: no file is named so, and it is none of {', '.join(known_names())}",
            hint="give a file or a quoted pattern such as 'corpus/*.jsonl'",
        )
    return LocalStream(rest, paths, given_part)


class LocalStream(Stream):
    """Local files. A piece is a row, or of a .txt file some lines."""

    def __init__(self, source: str, paths: list[Path], column: str) -> None:
        self.source, self.files, self._paths, self._column = source, len(paths), paths, column
        if column not in ("", "lines") and any(_is_text(path) for path in paths):
            raise InputError(f"{source}: a .txt file has no columns", hint="write :lines to join lines by a space")

    def pieces(self, file: int, *, skip: int = 0) -> Iterator[str]:
        path = self._paths[file]
        with unreadable_is_said(path):
            yield from islice(self._all_pieces(path), skip, None)

    def _all_pieces(self, path: Path) -> Iterator[str]:
        if _is_text(path):
            yield from _line_pieces(path, joined=self._column == "lines")
            return
        column = self._column or "text"
        rows = parquet_rows(path, column) if path.name.endswith(".parquet") else jsonl_rows(path, column)
        yield from (f"{row}\n\n" for row in rows)

    def fingerprint(self) -> str:
        """Over names, sizes, and the first and the last MiB: to read all of it would take as long as an epoch."""
        digest = hashlib.sha256()
        for path in self._paths:
            with unreadable_is_said(path), path.open("rb") as handle:
                size = path.stat().st_size
                digest.update(f"{path.name}\0{size}\0".encode())
                digest.update(handle.read(_ENDS_BYTES))
                handle.seek(max(0, size - _ENDS_BYTES))
                digest.update(handle.read(_ENDS_BYTES))
        return digest.hexdigest()

    def beginnings(self) -> list[str]:
        return sorted({hash_of_beginning(self.pieces(file)) for file in range(self.files)})


class HubStream(Stream):
    """A data set of the Hugging Face hub, all its rows, at the revision it has now. A piece is a row."""

    def __init__(self, name: str, part: str) -> None:
        self.source, self._name, self._text = f"{name}:{part}", name, HUB_TEXTS[name]
        import datasets

        with hub_errors_are_said(name, self._text.repository):
            self._revision = _revision(self._text.repository)
            self._rows = datasets.load_dataset(
                self._text.repository,
                self._text.config,
                split=part,
                streaming=True,
                revision=self._revision,
                **({"data_files": {part: self._text.shards[part]}} if self._text.shards else {}),
            )
        self.files = self._rows.num_shards

    def pieces(self, file: int, *, skip: int = 0) -> Iterator[str]:
        with hub_errors_are_said(self._name, self._text.repository):
            for row in self._rows.shard(num_shards=self.files, index=file).skip(skip):
                yield row[self._text.column] + self._text.joiner

    def fingerprint(self) -> str:
        return f"{self._text.repository}@{self._revision}"

    def beginnings(self) -> list[str]:
        return []


def _revision(repository: str) -> str | None:
    import huggingface_hub

    return huggingface_hub.HfApi().dataset_info(repository).sha


def _is_text(path: Path) -> bool:
    return not path.name.endswith(tuple(ending for ending in FILE_ENDINGS if ending != ".txt"))


def _line_pieces(path: Path, *, joined: bool) -> Iterator[str]:
    with path.open(encoding="utf-8") as handle:
        # a line that never ends is cut, so that memory stays bounded
        while piece := handle.read(_CHUNK) + handle.readline(_CHUNK):
            yield " ".join(piece.splitlines()) + " " if joined else piece
