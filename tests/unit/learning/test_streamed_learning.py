"""Learning from a text that is streamed: resuming, what is set aside for validation, and what is written down."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from learning_runs import StopAfter, run
from tiny_models import tiny_model

from ctp_cli.data.batches import StreamedText
from ctp_cli.data.sources import Text, load_text, pydoc_text
from ctp_cli.errors import InputError, OutputError
from ctp_cli.models.resolve import resolve_model
from ctp_cli.prompts.file import KvPrefix, PromptMetadata, load_prompt
from ctp_cli.recipe import EvalSection
from ctp_cli.stages.eval import Target, _overlaps, evaluate

STREAM: dict[str, Any] = {"stream": True, "shuffle_buffer": 40, "validation": None}


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    """Three files of rows."""
    paragraphs = pydoc_text("train").split("\n\n")
    for file in range(3):
        rows = (json.dumps({"text": paragraph}) + "\n" for paragraph in paragraphs[file::3])
        (tmp_path / f"part-{file}.jsonl").write_text("".join(rows))
    return str(tmp_path / "part-*.jsonl")


@pytest.mark.parametrize("method", ["soft-prompt", "kv-prefix"])
def test_interrupted_learning_gets_the_same_batches(
    method: str, corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama_tied_gqa", tmp_path / "model")
    changes = STREAM | {"text": corpus, "method": method, "learning_rate": "auto"}
    whole = run(model, tmp_path / "whole", **changes)
    with pytest.raises(KeyboardInterrupt):
        run(model, tmp_path / "cut", StopAfter(6), **changes)
    went = []
    go_to = StreamedText.go_to
    monkeypatch.setattr(StreamedText, "go_to", lambda text, position: went.append(position) or go_to(text, position))
    resumed = run(model, tmp_path / "cut", **changes)
    assert [int(position["numbers"][0]) for position in went] == [4]  # not all over again
    assert resumed.prompt_file.read_bytes() == whole.prompt_file.read_bytes()
    data = json.loads(load_prompt(whole.prompt_file).metadata.data or "")
    assert data["text"] == corpus and data["validation"].startswith(f"{corpus} (first ")
    other = run(model, tmp_path / "other", **(changes | {"seed": 1, "learning_rate": 3e-2}))
    assert other.history != whole.history


def test_another_text_under_the_same_name_is_not_gone_on_with(corpus: str, tmp_path: Path) -> None:
    model = tiny_model("llama_tied_gqa", tmp_path / "model")
    with pytest.raises(KeyboardInterrupt):
        run(model, tmp_path / "cut", StopAfter(6), text=corpus, **STREAM)
    with (tmp_path / "part-2.jsonl").open("a") as handle:
        handle.write('{"text": "more"}\n')
    with pytest.raises(OutputError, match=r"text\.fingerprint was"):
        run(model, tmp_path / "cut", text=corpus, **STREAM)


def test_eval_warns_of_a_text_that_was_streamed(corpus: str, tmp_path: Path) -> None:
    """Whatever its name and form; also of its first part."""
    model = tiny_model("llama_tied_gqa", tmp_path / "model")
    prompt = run(model, tmp_path / "p", text=corpus, steps=1, **STREAM).prompt_file
    content = load_text(str(tmp_path / "part-1.jsonl"), default_part="train").content
    for name, text in (("whole", content), ("part", content[:5000]), ("later", content[3000:]), ("other", "x " * 3000)):
        (tmp_path / f"{name}.txt").write_text(text)
    texts = [tmp_path / name for name in ("part-2.jsonl", "whole.txt", "part.txt", "later.txt", "other.txt")]
    section = EvalSection(ppl=tuple(map(str, texts)), seqlen=32, windows=2)
    report = evaluate(section, targets=[Target("prompted", resolve_model(str(model)), prompt)])
    assert [re.findall(r"begins as (\S+) does", line) for line in report.warnings] == [
        [name] for name in ("part-2.jsonl", "whole.txt", "part.txt")
    ]


def test_eval_warns_of_a_part_of_a_data_set_that_was_streamed() -> None:
    data = json.dumps({"text": "c4:train", "text_fingerprint": "allenai/c4@1", "text_beginnings": []})
    prompt = KvPrefix(torch.zeros(1, 2, 1, 1, 1), PromptMetadata(kind="kv-prefix", data=data))
    texts = [Text(part, f"c4:{part}", part) for part in ("train", "test")]
    assert [" train does" in line for line in _overlaps({"p": prompt}, texts)] == [True]


def test_what_cannot_be_streamed_is_refused(corpus: str, tmp_path: Path) -> None:
    model = tiny_model("llama_tied_gqa", tmp_path / "model")
    one = str(tmp_path / "part-0.jsonl")
    with pytest.raises(InputError, match="is the text learned from"):
        run(model, tmp_path / "p", **(STREAM | {"text": one, "validation": f"mine={one}"}))
    with pytest.raises(InputError, match="is the text learned from"):  # one of several files
        run(model, tmp_path / "p", **(STREAM | {"text": corpus, "validation": one}))
    with pytest.raises(InputError, match="pydoc cannot be streamed"):
        run(model, tmp_path / "p", **(STREAM | {"text": "pydoc"}))
