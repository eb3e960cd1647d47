"""Where text comes from: names of data sets, `pydoc`, or local files.

A text is written `[LABEL=]SOURCE[:PART]`:
    pydoc:test              the reference topics inside every Python; parts train, validation, test
    c4, wikitext2, ptb      Hugging Face data sets; parts train, validation, test
    notes.txt               a local file as it stands
    notes.txt:lines         its lines joined by a space
    rows.jsonl[.gz]         column `text` of every row, joined by a blank line; `rows.jsonl:body` takes another column
    rows.parquet[:column]   likewise
"""

import contextlib
import errno
import gzip
import hashlib
import json
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from ctp_cli.errors import InputError, NetworkError

PARTS = ("train", "validation", "test")
FILE_ENDINGS = (".txt", ".jsonl", ".jsonl.gz", ".json.gz", ".parquet")
_EXPANSION = 20
"""Times that packed text may be longer than its file, which real text never is."""
_SMALL_CHARACTERS = 64_000_000
"""What any file may hold, however well it is packed."""
_BEGINNING = 4096
"""Characters by which a text is known again, long enough to go past what many documents begin with."""
_ROWS = 64
"""Of parquet, unpacked at a time."""


@dataclass(frozen=True)
class Text:
    """A text and what is to be stored about it: where it came from and the hash of its UTF-8 form."""

    label: str
    source: str
    content: str

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content.encode()).hexdigest()

    @property
    def beginning(self) -> str:
        """A short hash of its first characters, white space apart: also that of a first part which is long enough."""
        parts = range(0, len(self.content), _BEGINNING)
        return hash_of_beginning(self.content[start : start + _BEGINNING] for start in parts)


def hash_of_beginning(pieces: Iterable[str]) -> str:
    """As `Text.beginning`, of a text in pieces, of which no more are taken than are needed."""
    words: list[str] = []
    length = 0
    for word in _words(pieces):
        words.append(word)
        length += len(word) + 1
        if length > _BEGINNING:
            break
    # JSON can spell half of a surrogate pair
    content = " ".join(words)[:_BEGINNING].encode("utf-8", "surrogatepass")
    return hashlib.sha256(content).hexdigest()[:16]


def _words(pieces: Iterable[str]) -> Iterator[str]:
    """Those of a whole text, whose pieces may end within one."""
    rest = ""
    for piece in pieces:
        *whole, rest = f"{rest}{piece}_".split()
        rest = rest.removesuffix("_")
        yield from whole
    if rest:
        yield rest


@dataclass(frozen=True)
class HubText:
    """A Hugging Face data set and how its rows become one text. `rows`: (skip, take) per part, None for all."""

    repository: str
    config: str | None
    column: str
    joiner: str
    files: dict[str, str] | None
    rows: dict[str, tuple[int, int | None]]
    shards: dict[str, str] | None = None
    """Names, with wildcards, of the files that are streamed, where they are not those in `files`."""


# C4 as in SparseGPT: the first documents of shard 0. Its first 1,100 validation documents are for reporting, later ones
# for choosing prompts. Script data sets no longer load, so PTB comes from a mirror in parquet.
HUB_TEXTS = {
    "c4": HubText(
        "allenai/c4",
        None,
        "text",
        " ",
        {
            "train": "en/c4-train.00000-of-01024.json.gz",
            "validation": "en/c4-validation.00000-of-00008.json.gz",
            "test": "en/c4-validation.00000-of-00008.json.gz",
        },
        {"train": (0, 5000), "validation": (1100, 400), "test": (0, 1100)},
        {"train": "en/c4-train.*.json.gz", "validation": "en/c4-validation.*.json.gz"},
    ),
    "wikitext2": HubText("Salesforce/wikitext", "wikitext-2-raw-v1", "text", "\n\n", None, {}),
    "ptb": HubText("FALcon6/ptb_text_only", None, "sentence", " ", None, {}),
}


def known_names() -> list[str]:
    return [*HUB_TEXTS, "pydoc"]


def load_text(spec: str, *, default_part: str) -> Text:
    """Raises InputError for an unknown name or an empty or unreadable file, NetworkError without the hub."""
    file = file_of(spec)
    label, source, part, rest = split_spec(spec)
    if file is None:
        part = part or default_part
        content = pydoc_text(part) if source == "pydoc" else _hub_text(source, part)
        name = f"{source}:{part}"
    else:
        content = _local_text(file, part)
        name = rest
    if not content.strip():
        raise InputError(f"text {spec!r} is empty")
    try:
        content.encode()
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair
        raise InputError(f"text {spec!r} has no UTF-8 form ({error})") from None
    return Text(label or (Path(source).name if "." in source else name), name, content)


def file_of(spec: str) -> Path | None:
    """The local file that a text is read from, None for a named text; reads nothing.

    Raises InputError for an unknown name or part, and where there is no such file.
    """
    _, source, part, rest = split_spec(spec)
    if source in known_names():
        if part and part not in PARTS:
            raise InputError(f"text {spec!r}: no part {part!r}", hint=f"parts are {', '.join(PARTS)}")
        return None
    path = Path(source)
    if not (rest.endswith(FILE_ENDINGS) or source.endswith(FILE_ENDINGS) or path.exists()):
        raise InputError(
            f"unknown text {spec!r}: not a file, and not one of {', '.join(known_names())}",
            hint="local files end in .txt, .jsonl, .jsonl.gz or .parquet; write FILE:COLUMN to choose a column",
        )
    if not path.is_file():
        hint = "several files are read by `ctp learn --stream`" if any(c in source for c in "*?[") else None
        raise InputError(f"{path}: no such text file", hint=hint)
    return path


def split_spec(spec: str) -> tuple[str, str, str, str]:
    """Label, source and part, each "" where there is none, and source and part as they were given."""
    label, separator, rest = spec.partition("=")
    if not separator or "/" in label:  # a path may hold an equals sign, too
        label, rest = "", spec
    return (label, *_split_part(rest), rest)


def _split_part(rest: str) -> tuple[str, str]:
    source, separator, part = rest.rpartition(":")
    if not separator or "/" in part or rest.endswith(FILE_ENDINGS):
        return rest, ""
    return source, part


def pydoc_text(part: str) -> str:
    """The English reference topics that ship inside Python, split by topic: 80% train, 10% validation, 10% test.

    A topic's part follows from the hash of its name, so it is the same in every Python release.
    """
    from pydoc_data.topics import topics

    chosen = []
    for name in sorted(topics):
        bucket = hashlib.sha256(name.encode()).digest()[0] % 10
        if part == ("validation" if bucket == 0 else "test" if bucket == 1 else "train"):
            chosen.append(str(topics[name]))
    return "\n\n".join(chosen)


def _local_text(path: Path, column: str) -> str:
    name = path.name
    with unreadable_is_said(path):
        if name.endswith(".parquet"):
            return "\n\n".join(parquet_rows(path, column or "text"))
        if name.endswith((".jsonl", ".jsonl.gz", ".json.gz")):
            return "\n\n".join(jsonl_rows(path, column or "text"))
        content = path.read_text(encoding="utf-8")
    if column == "lines":
        return " ".join(content.splitlines())
    if column:
        raise InputError(
            f"{path}:{column}: a .txt file has no columns", hint="write :lines to join its lines by a space"
        )
    return content


def _most_characters(path: Path) -> int:
    return max(_EXPANSION * path.stat().st_size, _SMALL_CHARACTERS)


def _too_much(path: Path) -> InputError:
    return InputError(
        f"{path}: unpacks to more than {_most_characters(path):,} characters, which no text of its size does",
        hint="is it damaged, or made to fill the memory? unpack it to .jsonl to use it all the same",
    )


@contextlib.contextmanager
def unreadable_is_said(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, UnicodeDecodeError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: cannot be read as UTF-8 text ({error})") from None


def jsonl_rows(path: Path, column: str) -> Iterable[str]:
    opener: Callable[..., Any] = gzip.open if path.name.endswith(".gz") else open
    most = left = _most_characters(path)
    with opener(path, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(iter(lambda: lines.readline(most + 1), ""), 1):
            left -= len(line)
            if left < 0:
                raise _too_much(path)
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:  # ValueError: no JSON, or a number of 5,000 digits
                raise InputError(f"{path}, line {number}: not JSON ({error})") from None
            if not isinstance(row, dict) or not isinstance(row.get(column), str):
                raise InputError(
                    f"{path}, line {number}: no text in column {column!r}",
                    hint="write FILE:COLUMN to choose another",
                )
            yield row[column]


def parquet_rows(path: Path, column: str) -> Iterable[str]:
    import pyarrow
    import pyarrow.parquet

    left = _most_characters(path)
    try:
        file = pyarrow.parquet.ParquetFile(path)
        kind = file.schema_arrow.field(column).type
        kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
        if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
            raise InputError(f"{path}: column {column!r} holds {kind}, no text", hint="write FILE:COLUMN for another")
        for batch in file.iter_batches(batch_size=_ROWS, columns=[column]):
            for row in batch.column(0).to_pylist():
                left -= len(row or "")
                if left < 0:
                    raise _too_much(path)
                if row is not None:
                    yield row
    except (pyarrow.ArrowException, KeyError, ValueError) as error:  # ValueError: no UTF-8
        raise InputError(f"{path}: no readable column {column!r} ({error})") from None


def _hub_text(name: str, part: str) -> str:
    import datasets

    source = HUB_TEXTS[name]
    files = {"data_files": {part: source.files[part]}} if source.files else {}
    with hub_errors_are_said(name, source.repository):
        rows = datasets.load_dataset(source.repository, source.config, split=part, streaming=bool(files), **files)
        skip, take = source.rows.get(part, (0, None))
        return source.joiner.join(
            row[source.column] for row in islice(rows, skip, None if take is None else skip + take)
        )


@contextlib.contextmanager
def hub_errors_are_said(name: str, repository: str) -> Iterator[None]:
    import datasets
    import huggingface_hub

    datasets.disable_progress_bars()
    if not _hub_answers():
        # what is in the local cache still loads; without this the client retries for half a minute
        datasets.config.HF_HUB_OFFLINE = huggingface_hub.constants.HF_HUB_OFFLINE = True
    try:
        yield
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise NetworkError(
            f"text {name!r}: {repository} cannot be loaded from the Hugging Face hub ({type(error).__name__})",
            hint="use pydoc, which needs no network, or a local .txt, .jsonl, .jsonl.gz or .parquet file",
        ) from None


def _hub_answers() -> bool:
    """One short question to the hub, through the system's proxies."""
    from huggingface_hub import constants

    question = urllib.request.Request(constants.ENDPOINT, method="HEAD")
    try:
        urllib.request.urlopen(question, timeout=5).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True
