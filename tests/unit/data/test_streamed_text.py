"""Text read while it is used: pieces that are the text, batches that are its windows, an order that resuming keeps."""

import gzip
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from ctp_cli.data import sources, streams
from ctp_cli.data.batches import StreamedText
from ctp_cli.data.sources import HubText, load_text
from ctp_cli.data.streams import open_stream
from ctp_cli.errors import InputError, NetworkError
from ctp_cli.runner import _stream_key


class Characters:
    """A tokenizer whose ids are code points, which counts what it is given."""

    def __init__(self) -> None:
        self.seen = 0

    def __call__(self, texts: list[str], **_: Any) -> dict[str, list[list[int]]]:
        self.seen += sum(map(len, texts))
        return {"input_ids": [[ord(c) for c in text] for text in texts]}


ROWS = [f"row {number} " + "überall " * (number % 40) for number in range(900)]


def _write(folder: Path, name: str) -> Path:
    path = folder / name
    if name.endswith(".parquet"):
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table({"body": ROWS}), path, row_group_size=100)
    elif name.endswith(".txt"):
        path.write_text("\n".join(ROWS))
    else:
        opener: Any = gzip.open if name.endswith(".gz") else open
        with opener(path, "wt") as handle:
            handle.writelines(json.dumps({"body": row}) + "\n" for row in ROWS)
    return path


@pytest.mark.parametrize("name", ["a.txt", "a.txt:lines", "a.jsonl:body", "a.jsonl.gz:body", "a.parquet:body"])
def test_pieces_together_are_the_text(name: str, tmp_path: Path) -> None:
    _write(tmp_path, name.split(":")[0])
    stream = open_stream(f"label={tmp_path / name}")
    pieces = list(stream.pieces(0))
    assert "".join(pieces).rstrip() == load_text(str(tmp_path / name), default_part="train").content.rstrip()
    assert len(pieces) > 1 and max(map(len, pieces)) < 70_000
    assert list(stream.pieces(0, skip=1)) == pieces[1:]


def test_a_pattern_is_all_its_files_in_the_order_of_their_names(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "c[1].txt"):
        (tmp_path / name).write_text(f"text of {name}\n")
    (tmp_path / "other.jsonl").write_text("")
    stream = open_stream(str(tmp_path / "*.txt"))
    assert ["".join(stream.pieces(i)) for i in range(stream.files)] == [
        f"text of {name}\n" for name in ("a.txt", "b.txt", "c[1].txt")
    ]
    assert open_stream(str(tmp_path / "c[1].txt")).files == 1
    before = stream.fingerprint()
    (tmp_path / "b.txt").write_text("text of b.tx_\n")
    assert open_stream(str(tmp_path / "*.txt")).fingerprint() != before
    with pytest.raises(InputError, match="no file is named so"):
        open_stream(str(tmp_path / "*.parquet"))
    with pytest.raises(InputError, match="has no columns"):
        open_stream(str(tmp_path / "*.txt") + ":body")
    with pytest.raises(InputError, match="no such text file") as caught:
        load_text(str(tmp_path / "*.txt"), default_part="train")
    assert "--stream" in caught.value.hint
    (tmp_path / "bad.jsonl").write_text('{"text": "x"}\n{"text": 5}\n')
    with pytest.raises(InputError, match=r"bad\.jsonl, line 2: no text in column 'text'"):
        list(open_stream(str(tmp_path / "bad.jsonl")).pieces(0))


def _streamed(source: str, tokenizer: Any = None, **changes: Any) -> StreamedText:
    settings: dict[str, Any] = {"seqlen": 16, "batch_size": 3, "buffer": 50, "seed": 0} | changes
    return StreamedText(open_stream(source), tokenizer or Characters(), **settings)


def _numbers(folder: Path, files: int, per_file: int) -> str:
    """Rows that are windows of 16 characters, with the blank line that follows them, each a number of its own."""
    for file in range(files):
        rows = [json.dumps({"text": f"{number:014}"}) for number in range(file * per_file, (file + 1) * per_file)]
        (folder / f"{file:03}.jsonl").write_text("\n".join(rows))
    return str(folder / "*.jsonl")


def _values(batch: torch.Tensor) -> list[int]:
    return [int("".join(map(chr, row))) for row in batch.tolist()]


def test_an_epoch_takes_every_window_once_in_another_order_every_time(tmp_path: Path) -> None:
    source = _numbers(tmp_path, files=6, per_file=200)
    text = _streamed(source)
    drawn = [value for step in range(800) for value in _values(text.at(step))]
    first, second = drawn[: 1200 - 50], drawn[1200 : 2400 - 50]
    assert len(set(first)) == len(first) and len(set(second)) > 1150 - 50
    assert first != second != sorted(second) and first != sorted(first)
    # shuffled within the buffer, and the files among one another: their order changes from epoch to epoch
    orders = [
        [Counter(value // 200 for value in drawn[start : start + 200]).most_common(1)[0][0] for start in starts]
        for starts in (range(0, 1200, 200), range(1200, 2400, 200))
    ]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(6)) and orders[0] != orders[1]
    other = _streamed(source, seed=1)
    assert [value for step in range(300) for value in _values(other.at(step))] != drawn[:900]
    held = _streamed(source, held_out=150)
    assert not {v for step in range(1200) for v in _values(held.at(step))} & set(range(150))


def test_a_buffer_of_one_reads_in_order(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("".join(ROWS))
    text = _streamed(str(tmp_path / "a.txt"), buffer=1)
    whole = "".join(ROWS)
    read = "".join(map(chr, torch.cat([text.at(step).flatten() for step in range(500)]).tolist()))
    assert read == whole[: len(read)] and len(read) == 500 * 48
    assert "".join(map(chr, text.beginning(33).tolist())) == whole[:33]


def test_a_step_has_the_same_batch_whenever_and_from_wherever_it_is_asked_for(tmp_path: Path) -> None:
    source = _numbers(tmp_path, files=3, per_file=6000)
    text = _streamed(source)
    batches = [text.at(step).clone() for step in range(3000)]
    for step in (2999, 0, 7, 1500, 1500):
        assert torch.equal(text.at(step), batches[step])
    one = _streamed(source)
    one.at(1999)
    position = {name: tensor.clone() for name, tensor in one.position().items()}
    one.at(2500)  # a position is not changed by what comes after
    tokenizer = Characters()
    again = _streamed(source, tokenizer)
    before = tokenizer.seen
    again.go_to(position)
    assert torch.equal(again.at(2000), batches[2000]) and tokenizer.seen == before  # nothing is read again
    assert all(torch.equal(again.at(step), batches[step]) for step in range(2001, 3000))
    assert torch.equal(again.at(2000), batches[2000]) and torch.equal(again.at(3), batches[3])
    assert torch.equal(again.at(2400), batches[2400])


def test_a_text_that_does_not_fill_the_buffer_is_refused_with_its_numbers(tmp_path: Path) -> None:
    source = _numbers(tmp_path, files=2, per_file=24)
    with pytest.raises(InputError, match="48 windows of 16 tokens do not fill the shuffle buffer of 49") as caught:
        _streamed(source, buffer=49)
    assert "--shuffle-buffer" in caught.value.hint
    assert _streamed(source, buffer=48).at(0).shape == (3, 16)


_MEASURED = """
import resource, sys
import torch
from ctp_cli.data.batches import StreamedText
from ctp_cli.data.streams import open_stream

class Sparse:  # a token for every 16 bytes
    def __call__(self, texts, **_):
        return {"input_ids": [list(text.encode()[::16]) for text in texts]}

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

text = StreamedText(open_stream(sys.argv[1]), Sparse(), seqlen=512, batch_size=4, buffer=256, seed=0)
before, steps = peak(), 0
while not int(text.position()["numbers"][1]):  # to the end of the file
    steps += 50
    text.at(steps)
print(steps, peak() - before)
"""


@pytest.mark.parametrize("name", ["large.jsonl", "large.txt"])
def test_memory_does_not_grow_with_the_file(name: str, tmp_path: Path) -> None:
    """200 MB are streamed to their end in less than 16 MB beyond what the first batch took."""
    line = "It is a truth universally acknowledged, that memory is bounded. " * 16 + "\n"
    row = line if name.endswith(".txt") else json.dumps({"text": line}) + "\n"
    with (tmp_path / name).open("w") as handle:
        for _ in range(200):
            handle.write(row * (1_000_000 // len(row)))
    assert (tmp_path / name).stat().st_size > 199_000_000
    done = subprocess.run(
        [sys.executable, "-c", _MEASURED, str(tmp_path / name)], capture_output=True, text=True, check=True
    )
    steps, grown = map(int, done.stdout.split())
    assert steps > 5000 and grown < 16e6, (steps, grown)


def test_a_data_set_of_the_hub_is_read_file_by_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder stands for the repository: `datasets` reads it by the same code."""
    for shard in range(3):
        rows = "".join(json.dumps({"text": f"{shard}-{row}"}) + "\n" for row in range(4))
        (tmp_path / f"train-{shard}.jsonl").write_text(rows)
    hub = HubText(str(tmp_path), None, "text", " ", {}, {}, {"train": "train-*.jsonl"})
    monkeypatch.setitem(sources.HUB_TEXTS, "c4", hub)
    monkeypatch.setattr(sources, "_hub_answers", lambda: True)
    monkeypatch.setattr(streams, "_revision", lambda repository: None)
    stream = open_stream("c4")
    assert [list(stream.pieces(file, skip=2)) for file in range(stream.files)] == [
        [f"{shard}-2 ", f"{shard}-3 "] for shard in range(3)
    ]
    monkeypatch.undo()
    monkeypatch.setattr(sources, "_hub_answers", lambda: False)
    with pytest.raises(NetworkError, match="cannot be loaded from the Hugging Face hub"):
        open_stream("c4")


def test_a_recipe_knows_a_streamed_text_by_its_files(tmp_path: Path) -> None:
    source = _numbers(tmp_path, files=2, per_file=5)
    assert _stream_key("c4:train") == "c4:train" and _stream_key(None) is None
    before = _stream_key(source)
    assert before == _stream_key(source) != source
    (tmp_path / "002.jsonl").write_text("{}")
    assert _stream_key(source) != before
