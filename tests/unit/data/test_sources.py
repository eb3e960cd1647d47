"""Texts from local files and from Python's own reference topics; nothing here needs a network."""

import gzip
import hashlib
import json
from pathlib import Path
from pydoc_data.topics import topics

import pyarrow
import pyarrow.parquet
import pytest

from ctp_cli.data.sources import load_text, pydoc_text
from ctp_cli.errors import InputError

ROWS = ["first row", "second\nrow", "dritte Zeile äöü"]


def jsonl(path: Path, rows: list[object]) -> Path:
    content = "\n".join(json.dumps(row) for row in rows) + "\n"
    path.write_bytes(gzip.compress(content.encode()) if path.suffix == ".gz" else content.encode())
    return path


def content(spec: object) -> str:
    return load_text(str(spec), default_part="train").content


def test_a_text_file_is_taken_as_it_stands(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("one\n\n  two äö\n", encoding="utf-8")
    text = load_text(str(path), default_part="train")
    assert text.content == "one\n\n  two äö\n"
    assert text.label == "notes.txt"
    assert text.source == str(path)
    assert text.sha256 == hashlib.sha256("one\n\n  two äö\n".encode()).hexdigest()


def test_lines_are_joined_by_a_space(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("one\ntwo three\nfour\n", encoding="utf-8")
    assert content(f"{path}:lines") == "one two three four"


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".json.gz"])
def test_rows_are_joined_by_a_blank_line(tmp_path: Path, ending: str) -> None:
    path = jsonl(tmp_path / f"rows{ending}", [{"text": row, "body": row.upper()} for row in ROWS])
    assert content(path) == "\n\n".join(ROWS)
    assert content(f"{path}:body") == "\n\n".join(row.upper() for row in ROWS)


def test_parquet_columns(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ROWS, "body": ["a", None, "c"]}), path)
    assert content(path) == "\n\n".join(ROWS)
    assert content(f"{path}:body") == "a\n\nc"
    with pytest.raises(InputError, match=r"rows\.parquet: no readable column 'title'"):
        content(f"{path}:title")


def test_a_label_stands_before_the_source(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("text", encoding="utf-8")
    assert load_text(f"mine={path}", default_part="train").label == "mine"
    assert load_text("theirs=pydoc:test", default_part="train").label == "theirs"
    assert load_text("pydoc:test", default_part="train").label == "pydoc:test"


def test_a_path_with_an_equals_sign_is_no_label(tmp_path: Path) -> None:
    path = tmp_path / "date=2026" / "notes.txt"
    path.parent.mkdir()
    path.write_text("text", encoding="utf-8")
    for spec in (str(path), f"mine={path}"):
        assert content(spec) == "text"


def test_a_label_does_not_change_what_the_text_is(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("text", encoding="utf-8")
    plain, labelled = (load_text(spec, default_part="train") for spec in (str(path), f"mine={path}"))
    assert (plain.source, plain.sha256) == (labelled.source, labelled.sha256)


@pytest.mark.parametrize("blank", ["", " \n\t\n"])
@pytest.mark.parametrize("name", ["empty.txt", "empty.jsonl"])
def test_an_empty_text_is_refused(tmp_path: Path, name: str, blank: str) -> None:
    (tmp_path / name).write_text(blank, encoding="utf-8")
    with pytest.raises(InputError, match=rf"{name}' is empty"):
        content(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("latin.txt", b"caf\xe9 \xff"),
        ("latin.jsonl", b'{"text": "caf\xe9"}\n'),
        ("cut.jsonl.gz", gzip.compress(json.dumps({"text": "x" * 1000}).encode())[:-20]),
        ("no.jsonl.gz", b"this is not gzip"),
        ("bits.jsonl.gz", gzip.compress(json.dumps({"text": "some text " * 50}).encode())[:10] + b"\xff" * 40),
        ("no.parquet", b"this is not parquet"),
        ("cut.parquet", b"PAR1" + b"\0" * 50),
        ("surrogate.jsonl", b'{"text": "half of a pair: \\ud800"}\n'),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_unreadable_files_are_named(tmp_path: Path, name: str, damage: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(damage)
    with pytest.raises(InputError, match=name.replace(".", r"\.")):
        _ = load_text(str(path), default_part="train").sha256


def test_a_bad_row_is_named_by_its_line(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "rows.jsonl", [{"text": "fine"}, {"body": "no text"}])
    with pytest.raises(InputError, match="line 2: no text in column 'text'") as caught:
        content(path)
    assert "COLUMN" in caught.value.hint
    path.write_text('{"text": "fine"}\n\n{"text": \n', encoding="utf-8")
    with pytest.raises(InputError, match="line 3: not JSON"):
        content(path)
    jsonl(path, [["a", "list"]])
    with pytest.raises(InputError, match="line 1"):
        content(path)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("wikitext3", "unknown text 'wikitext3'.*pydoc"),
        ("missing.txt", "missing.txt: no such text file"),
        ("missing.jsonl:body", "missing.jsonl: no such text file"),
        ("pydoc:eval", "no part 'eval'"),
    ],
)
def test_unknown_texts_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        content(spec)


def test_a_text_file_has_no_columns(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("text", encoding="utf-8")
    with pytest.raises(InputError, match="no columns") as caught:
        content(f"{path}:body")
    assert ":lines" in caught.value.hint


def test_pydocs_parts_are_disjoint_complete_and_always_the_same() -> None:
    """A topic's part follows from its name's hash, worked out here once more from the documented 80/10/10 rule."""
    parts = {part: pydoc_text(part) for part in ("train", "validation", "test")}
    assert parts == {part: pydoc_text(part) for part in parts}
    held_out = {0: "validation", 1: "test"}
    count = dict.fromkeys(parts, 0)
    for name, text in topics.items():
        part = held_out.get(int(hashlib.sha256(name.encode()).hexdigest()[:2], 16) % 10, "train")
        count[part] += 1
        assert str(text) in parts[part]
        for other in parts.keys() - {part}:
            assert str(text) not in parts[other], name
    assert sum(len(text) for text in parts.values()) == sum(len(t) for t in topics.values()) + 2 * (len(topics) - 3)
    assert count["train"] > 5 * max(count["validation"], count["test"])
    assert min(count["validation"], count["test"]) > 0


def test_the_stage_chooses_the_part_unless_the_text_names_one() -> None:
    assert load_text("pydoc", default_part="validation").content == pydoc_text("validation")
    assert load_text("pydoc:test", default_part="validation").content == pydoc_text("test")
    assert load_text("pydoc", default_part="validation").source == "pydoc:validation"
