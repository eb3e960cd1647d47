"""Move tensors between safetensors files as bytes: no tensor is ever in memory.

Format: 8 bytes little-endian header length, a JSON header (name -> dtype, shape, data_offsets), the data.
Source: https://huggingface.co/docs/safetensors.
"""

import json
import os
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ctp_cli.errors import InputError

_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_CHUNK_BYTES = 16 * 2**20
_DAMAGED_HINT = "copy, download or make it again"
_BITS = {
    "F64": 64,
    "I64": 64,
    "U64": 64,
    "F32": 32,
    "I32": 32,
    "U32": 32,
    "F16": 16,
    "BF16": 16,
    "I16": 16,
    "U16": 16,
}


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file. `start` and `end` are byte offsets into the data after the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Header:
    """What a safetensors file says it holds. `data_start` is the offset of the data in the file, in bytes."""

    tensors: dict[str, TensorEntry]
    metadata: dict[str, str]
    data_start: int

    @property
    def tensor_bytes(self) -> int:
        return sum(entry.end - entry.start for entry in self.tensors.values())


def read_header(file: Path) -> Header:
    """The header, checked against the file's length; no tensor is read.

    Raises InputError for a file that is no safetensors, cut off or inconsistent.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            if size < 8 or not 2 <= length <= min(size - 8, _MAX_HEADER_BYTES):
                raise InputError(f"{file}: not a safetensors file, or cut off", hint=_DAMAGED_HINT)
            content = json.loads(handle.read(length))
        metadata = content.pop("__metadata__", None) or {}
        tensors = {name: _entry(raw) for name, raw in content.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(
            f"{file}: not readable as safetensors ({type(error).__name__}: {error})", hint=_DAMAGED_HINT
        ) from None
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise InputError(f"{file}: its metadata is not text", hint=_DAMAGED_HINT)
    header = Header(tensors, metadata, 8 + length)
    described = header.data_start + header.tensor_bytes
    if described != size:
        raise InputError(
            f"{file}: {size:,} bytes long, its header describes {described:,}: cut off or damaged",
            hint=_DAMAGED_HINT,
        )
    return header


def _entry(raw: Mapping[str, Any]) -> TensorEntry:
    dtype, shape, (start, end) = raw["dtype"], tuple(raw["shape"]), raw["data_offsets"]
    if not all(isinstance(number, int) and number >= 0 for number in (*shape, start, end)) or end < start:
        raise ValueError("sizes that are no sizes")
    count = 1
    for number in shape:
        count *= number
    if dtype in _BITS and count * _BITS[dtype] != 8 * (end - start):
        raise ValueError(f"a {dtype} tensor of shape {list(shape)} in {end - start} bytes")
    return TensorEntry(dtype, shape, start, end)


def copy_without(source: Path, target: Path, left_out: Collection[str]) -> int:
    """Write `source` without the named tensors to `target`, byte for byte; return the bytes written."""
    header = read_header(source)
    kept = sorted(
        ((name, entry) for name, entry in header.tensors.items() if name not in left_out),
        key=lambda item: item[1].start,
    )
    content: dict[str, Any] = {"__metadata__": header.metadata} if header.metadata else {}
    offset = 0
    for name, entry in kept:
        size = entry.end - entry.start
        content[name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(content).encode()
    text += b" " * (-len(text) % 8)  # the format wants the data aligned
    with source.open("rb") as reader, target.open("wb") as writer:
        writer.write(len(text).to_bytes(8, "little") + text)
        for _, entry in kept:
            reader.seek(header.data_start + entry.start)
            _copy_bytes(reader, writer, entry.end - entry.start)
    return 8 + len(text) + offset


def _copy_bytes(reader: BinaryIO, writer: BinaryIO, count: int) -> None:
    while count:
        chunk = reader.read(min(count, _CHUNK_BYTES))
        if not chunk:
            raise OSError("the file became shorter while it was read")
        writer.write(chunk)
        count -= len(chunk)


def link_or_copy(source: Path, target: Path) -> bool:
    """The same file under a second name where the file system allows it, else a copy. True if linked."""
    source = source.resolve()  # the hub's cache holds symbolic links, which a link would point at
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
        return False
    return True
