# ruff: noqa: E501 - tables of what to write are read best in long lines
"""Texts: plain, JSON lines packed or not, and parquet."""

import gzip
import io
import json
import random
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from hostile.damage import damaged_bytes, wrong_place
from hostile.inputs import LEARN, SMALL, Inputs, Mutant

_WORDS = "Some words that make a row of text, for windows of sixteen tokens. "


def text_mutant(draw: random.Random, inputs: Inputs, place: Path) -> Mutant:
    ending = draw.choice((".txt", ".jsonl", ".jsonl.gz", ".json.gz", ".parquet"))
    file = place / f"rows{ending}"
    content, what = _rows(draw, ending)
    if draw.random() < 0.4 and len(content) < 10**6:
        content, how = damaged_bytes(draw, content)
        what += f", {how}"
    file.write_bytes(content)
    if draw.random() < 0.03:
        what = wrong_place(draw, file)
    spec = file.name + draw.choice(("", "", "", "", ":text", ":lines", ":other", ":", "::", ":\0"))
    model = str(inputs.folder / "dense")
    commands: tuple[tuple[str, ...], ...] = (
        ("eval", model, "--ppl", spec, *SMALL, "-o", "out"),
        ("compress", model, "--bits", "4", "--group-size", "32", "--calibration", spec, *SMALL, "-o", "out"),
        ("learn", model, "--text", spec, *LEARN, "-o", "out"),
        ("learn", model, "--text", "pydoc:test", "--validation", spec, *LEARN, "-o", "out"),
    )
    return Mutant(draw.choice(commands), f"{spec!r}: {what}")


def _rows(draw: random.Random, ending: str) -> tuple[bytes, str]:
    if ending == ".txt":
        text = draw.choice((_WORDS * 40, "a", "", " \n\t ", "\0" * 3000, "é" * 2000, "a" * 2_000_000, "\n" * 100_000,
                            "<s></s><|endoftext|>" * 200, "\ufffe\u202e" * 500, "😀" * 700, "\x1b[31m" * 500,
                            "<pad>" * 400))  # fmt: skip
        return text.encode(), f"{text[:10]!r} x {len(text)}"
    if ending == ".parquet":
        return _parquet(draw)
    rows = [json.dumps({"text": _WORDS * 5, "n": number}) for number in range(10)]
    odd = draw.choice(
        ('{"text": 5}', '{"text": null}', "[]", "5", "null", "{", '{"text": "\\ud800"}', '{"text": "\\u0000"}', "", "\0",
         '{"other": "x"}', '{"text": ["x"]}', "[" * 100_000, '{"text": ' + "9" * 5000 + "}", '{"n": ' + "9" * 5000 + "}",
         '{"text": "a", "text": 1}', "NaN", '{"text": "' + "a" * 1_000_000 + '"}', '{"text": ""}', "\ufeff{}", "\x85",
         '{"text": "x"} {"text": "y"}', "// x", "{'text': 'x'}", '{"text": "x"')
    )  # fmt: skip
    place = draw.randrange(len(rows) + 1)
    content = "\n".join([*draw.choice((rows[:place], [])), odd, *draw.choice((rows[place:], []))]).encode()
    what = f"row {odd[:30]!r}"
    if ending.endswith(".gz"):
        if draw.random() < 0.08:
            out = io.BytesIO()
            with gzip.GzipFile(fileobj=out, mode="wb", compresslevel=1) as bomb:
                line = draw.choice((b'{"text": "%s"}\n', b" %s\n", b'{"text": "%s'))
                for _ in range(800):
                    bomb.write(line % (b"a" * 1_000_000))
            return out.getvalue(), "a bomb of 800 MB"
        content = gzip.compress(content, 1)
    return content, what


def _parquet(draw: random.Random) -> tuple[bytes, str]:
    columns: dict[str, Any] = {
        "text": [_WORDS * 5] * 10,
        "numbers": list(range(10)),
        "nulls": pyarrow.array([None] * 10, pyarrow.string()),
        "bytes": [b"\xff\xfe"] * 10,
        "lists": [[_WORDS]] * 10,
        "structs": [{"text": _WORDS}] * 10,
        "times": pyarrow.array([2**62] * 10, pyarrow.timestamp("us")),
        "invalid": pyarrow.Array.from_buffers(
            pyarrow.string(), 1, [None, pyarrow.py_buffer(b"\0\0\0\0\2\0\0\0"), pyarrow.py_buffer(b"\xff\xfe")]
        ),
        "large": pyarrow.array([_WORDS] * 10, pyarrow.large_string()),
        "dictionary": pyarrow.array([_WORDS] * 10).dictionary_encode(),
        "bomb": pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 3000, pyarrow.int32()), ["a" * 300_000]),
        "none": pyarrow.array([], pyarrow.string()),
    }
    name = draw.choice([*columns, *("text",) * 4])
    out = io.BytesIO()
    named = draw.choice(("text", "text", "text", "", "a.b", "TEXT"))
    pyarrow.parquet.write_table(
        pyarrow.table({named: columns[name]}), out, compression=draw.choice(("none", "snappy", "gzip", "zstd"))
    )
    return out.getvalue(), f"column {named!r} of {name}"
