# ruff: noqa: E501 - tables of what to write are read best in long lines
"""Damage that knows nothing of what it damages but that it is bytes, a value, JSON, or a file in a folder."""

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

_VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 3, 7, 33, 1000, 2**31 - 1, 2**31, 2**40, 2**60, 2**63, 2**64, -(2**63), 10**400,
    0.5, -0.5, 1e-300, 1e308, float("inf"), float("nan"), "", "x", "0", "-1", "1e999", "nan", "\0", "a\0b", "..",
    "../..", "/", "/dev/null/x", "\ud800", "é\u202e", "%s{}", "[red]", "a" * 100_000, [], {}, [[]], [None], [0], [-1],
    [2**60, 2**60], ["x"] * 1000, {"": None}, {"x": 1}, {"auto_map": {"AutoConfig": "evil.py"}},
)  # fmt: skip


def damaged_bytes(draw: random.Random, content: bytes) -> tuple[bytes, str]:
    """Damage that knows nothing of the format."""
    size = len(content)
    where, other = sorted((draw.randrange(size + 1), draw.randrange(size + 1)))
    changes: dict[str, Callable[[], bytes]] = {
        "bits flipped": lambda: _flipped(draw, content),
        "cut": lambda: content[:where],
        "head lost": lambda: content[where:],
        "middle lost": lambda: content[:where] + content[other:],
        "repeated": lambda: content[:other] + content[where:],
        "appended": lambda: content + draw.randbytes(draw.choice((1, 8, 4096))),
        "noise": lambda: content[:where] + draw.randbytes(min(64, other - where)) + content[other:],
        "NUL": lambda: content[:where] + b"\0" + content[where:],
        "zeroed": lambda: content[:where] + bytes(other - where) + content[other:],
        "BOM": lambda: b"\xef\xbb\xbf" + content,
        "UTF-16": lambda: content.decode("latin-1").encode("utf-16"),
        "Latin-1": lambda: content[:where] + b"\xe9\xff" + content[where:],
        "CR": lambda: content.replace(b"\n", b"\r"),
        "empty": lambda: b"",
        "a pickle": lambda: b"\x80\x04\x95\x1d\0\0\0\0\0\0\0\x8c\x05posix\x94\x8c\x06system\x94\x93\x94\x8c\x02id\x94\x85\x94R\x94.",
    }  # fmt: skip
    name = draw.choice(list(changes))
    return changes[name](), name


def _flipped(draw: random.Random, content: bytes) -> bytes:
    changed = bytearray(content)
    for _ in range(draw.choice((1, 1, 3, 20))):
        if changed:
            changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def _places(value: Any, depth: int = 0) -> Iterator[tuple[Any, Any]]:
    """(container, key) of everything inside; of long lists only the ends."""
    if isinstance(value, dict):
        keys = list(value)
        keys = keys if len(keys) <= 60 else keys[:30] + keys[-30:]
    else:
        keys = [*range(len(value))][:4] if isinstance(value, list) else []
    for key in keys:
        yield value, key
        if depth < 8:
            yield from _places(value[key], depth + 1)


def damage_value(draw: random.Random, content: Any) -> str:
    """Change one thing inside a JSON-like value, in place; return what."""
    places = list(_places(content))
    if not places:
        return "nothing"
    holder, key = draw.choice(places)
    change = draw.choice(("drop", "rename", "replace", "replace", "replace", "nest", "swap", "scale", "list"))
    if change == "drop":
        del holder[key]
    elif change == "rename" and isinstance(holder, dict):
        holder[draw.choice((f"{key}x", str(key)[:-1], str(key).upper(), "", "x" * 70_000))] = holder.pop(key)
    elif change == "nest":
        inner: Any = holder[key]
        for _ in range(draw.choice((3, 90, 900))):
            inner = [inner]
        holder[key] = inner
    elif change == "swap":
        second, other = draw.choice(places)
        try:
            holder[key], second[other] = second[other], holder[key]
            json.dumps(content)
        except (KeyError, IndexError, ValueError):  # one lay inside the other
            return "nothing"
    elif change == "scale" and type(holder[key]) in (int, float):
        holder[key] *= draw.choice((-1, 0, 0.5, 2, 2**20, 2**70))
    elif change == "list":
        holder[key] = [holder[key]] * draw.choice((2, 500))
    else:
        holder[key] = draw.choice(_VALUES)
    return f"{change} {str(key)[:40]}"


def damaged_json(draw: random.Random, content: bytes) -> tuple[bytes, str]:
    if draw.random() < 0.25:
        return damaged_bytes(draw, content)
    value = json.loads(content)
    what = [damage_value(draw, value) for _ in range(draw.choice((1, 1, 1, 2, 4)))]
    text = json.dumps(value)
    special = draw.random()
    if special < 0.03:
        return b"[" * 200_000, "deep"
    if special < 0.06:
        return text.replace(": ", ": 1" + "0" * 5000 + ', "y": ', 1).encode(), "a number of 5000 digits"
    if special < 0.09:
        return (text[:-1] + "," + text[1:]).encode(), "every key twice"
    return text.encode("utf-8", "surrogatepass"), ", ".join(what)


def wrong_place(draw: random.Random, file: Path) -> str:
    """Something else where a file is expected."""
    file.unlink(missing_ok=True)
    what = draw.choice(("nothing", "a folder", "a link to nowhere", "a link to itself", "a link to a device"))
    if what == "a folder":
        file.mkdir()
    elif what == "a link to nowhere":
        file.symlink_to("nowhere")
    elif what == "a link to itself":
        file.symlink_to(file.name)
    elif what == "a link to a device":
        file.symlink_to("/dev/zero")
    return what
