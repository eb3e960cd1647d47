"""Safetensors files whose header lies, or whose data does."""

import json
import random
from typing import Any

from hostile.damage import damaged_bytes, damaged_json


def damaged_safetensors(draw: random.Random, content: bytes) -> tuple[bytes, str]:
    """A header that lies, consistently or not, or data that does."""
    if draw.random() < 0.2:
        return damaged_bytes(draw, content)
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    names = [name for name in header if name != "__metadata__"]
    name = draw.choice(names)
    entry = header[name]
    start, end = entry["data_offsets"]
    change = draw.choice(
        ("length", "dtype", "shape", "product", "offsets", "overlap", "metadata", "json", "nan", "drop", "rename",
         "reshape", "empty", "other size", "scalar", "many", "same bytes", "deep")
    )  # fmt: skip
    if change == "length":
        lie = draw.choice((0, 1, 2, 7, length - 1, length + 1, len(content), 10**8, 2**31, 2**63, 2**64 - 1))
        return lie.to_bytes(8, "little") + content[8:], f"length {lie}"
    if change == "dtype":
        names = ("F64", "F32", "F16", "BF16", "I64", "I32", "I8", "U8", "BOOL", "F8_E4M3", "F4", "C64", "U32", "x")
        entry["dtype"] = draw.choice(names)
    elif change == "shape":
        entry["shape"] = draw.choice(([], [0], [-1], [1], [2**60], [2**32, 2**32], [2**63, 2], [0, 2**62], [1.5], "x",
                                      [2**64, 0], [1] * 70, None))  # fmt: skip
    elif change == "product":
        entry["shape"] = [2**30, 2**30]
        entry["data_offsets"] = [0, 2**62]
    elif change == "offsets":
        entry["data_offsets"] = draw.choice(
            ([0, 0], [end, start], [start + 1, end + 1], [start, end - 1], [-8, end], [start, 2**62], [2**63, 2**64],
             [start], [], None, ["0", "8"], [start, end, end], [0.0, float(end)], [True, end])
        )  # fmt: skip
    elif change == "overlap":
        header["second"] = dict(entry)
        header[draw.choice(names)]["data_offsets"] = [start, end]
    elif change == "metadata":
        facts = header.setdefault("__metadata__", {})
        key = draw.choice([*facts, "format", "format_version", "kind", "layout", "steps", "seed", "data"])
        facts[key] = draw.choice(
            ("", "x", "-1", "1" * 5000, "1e999", "nan", "kv-prefix", "soft-prompt", "bos-prompt-text", "\0", "{", "[]",
             '{"text_sha256": [1]}', "[" * 5000, "0", "2", "٣", "1_0", "tf", "np", 5, None, [], "a" * 10**6)
        )  # fmt: skip
    elif change == "json":
        return _with_header(*damaged_json(draw, json.dumps(header).encode()), data)
    elif change == "nan":
        values = {2: (0x7C00, 0x7E00, 0xFBFF), 4: (0x7F800000, 0x7FC00000, 0x7F7FFFFF, 0xFF800000, 0x7FFFFFFF)}
        width = draw.choice((2, 4))
        pattern = draw.choice(values[width]).to_bytes(width, "little")
        count = draw.choice((1, 8, (end - start) // width))
        count = min(count, (end - start) // width)
        data = data[:start] + pattern * count + data[start + width * count :]
    elif change == "drop":
        del header[name]
        header, data = _moved(header, start, end, data, b"")
    elif change == "rename":
        header[draw.choice((f"{name}x", "", "a\0", name.upper(), "../x", name + ".weight", "0", name * 50))] = (
            header.pop(name)
        )
    elif change == "reshape" and entry["shape"]:
        count = 1
        for number in entry["shape"]:
            count *= number
        entry["shape"] = draw.choice(([count], [1, count], [count, 1], [*entry["shape"], 1], entry["shape"][::-1]))
    elif change in ("empty", "other size", "scalar"):
        wide = {"F64": 8, "I64": 8, "F16": 2, "BF16": 2, "I16": 2, "U8": 1, "I8": 1, "BOOL": 1}.get(entry["dtype"], 4)
        shape = list(entry["shape"]) or [1]
        if change == "other size":
            where = draw.randrange(len(shape))
            shape[where] = draw.choice((1, shape[where] - 1, shape[where] + 1, 2 * shape[where], shape[where] // 2))
        shape = {"empty": [0, *shape[1:]], "scalar": []}.get(change, shape)
        count = 1
        for number in shape:
            count *= number
        entry["shape"] = shape
        grown = (data[start:end] * 3)[: count * wide].ljust(count * wide, b"\1")
        header, data = _moved(header, start, end, data, grown)
        entry["data_offsets"] = [start, start + count * wide]
    elif change == "many":
        for number in range(draw.choice((100, 20_000))):
            header[f"n{number}"] = {"dtype": "U8", "shape": [0], "data_offsets": [end, end]}
    elif change == "same bytes":
        header[draw.choice(("second", "prompt_embeddings", "key_values"))] = dict(entry)
    elif change == "deep":
        entry["shape"] = json.loads("[" * 800 + "]" * 800)
    return _with_header(json.dumps(header).encode("utf-8", "surrogatepass"), f"{change} of {name}", data)


def _with_header(header: bytes, what: str, data: bytes) -> tuple[bytes, str]:
    return len(header).to_bytes(8, "little") + header + data, what


def _moved(header: dict[str, Any], start: int, end: int, data: bytes, new: bytes) -> tuple[dict[str, Any], bytes]:
    """Other data between two offsets, and all that comes later moved to fit: a file that is whole."""
    shift = len(new) - (end - start)
    for entry in header.values():
        offsets = entry.get("data_offsets")
        if offsets and offsets[0] >= end:
            entry["data_offsets"] = [offsets[0] + shift, offsets[1] + shift]
    return header, data[:start] + new + data[end:]
