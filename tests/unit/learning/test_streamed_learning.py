"""Learning from a text that is streamed: resuming, what is set aside for validation, and what is written down."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from learning_runs import StopAfter, run
from tiny_models import tiny_model

from ctp_cli.data.batches import StreamedText
from ctp_cli.data.sources import Text, load_text, pydoc_text
from ctp_cli.errors import InputError, OutputError
from ctp_cli.models.resolve import resolve_model
from ctp_cli.prompts.file import load_prompt
from ctp_cli.recipe import EvalSection, StitchSection
from ctp_cli.stages.eval import Target, _overlaps, evaluate
from ctp_cli.stages.stitch import stitch

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
    texts = [Text(part, f"c4:{part}", part) for part in ("train", "test")]
    assert [" train does" in line for line in _overlaps({"p": json.loads(data)}, texts)] == [True]


def test_eval_warns_of_texts_behind_a_stitched_and_behind_an_earlier_prompt(tmp_path: Path) -> None:
    model = tiny_model("llama_tied_gqa", tmp_path / "model")
    for name, part in (("first", "train"), ("second", "test")):
        (tmp_path / f"{name}.txt").write_text(pydoc_text(part)[:9000])
    text = str(tmp_path / "first.txt")
    first = run(model, tmp_path / "p", text=text, steps=1).prompt_file
    second = run(model, tmp_path / "q", text=str(tmp_path / "second.txt"), init=str(first), steps=1).prompt_file
    stitch(StitchSection(), prompt_path=second, model_path=model, output=tmp_path / "stitched")
    targets = {"second": Target("second", resolve_model(str(model)), second)}
    targets["stitched"] = Target("stitched", resolve_model(str(tmp_path / "stitched")))
    for label, target in targets.items():
        section = EvalSection(ppl=(text, f"joined={text}:lines"), seqlen=32, windows=2)
        said = evaluate(section, targets=[target]).warnings
        assert len(said) == 2 and all(line.startswith(f"{label}: its prompt was learned from") for line in said), said


def test_a_prompt_is_not_learned_on_one(tmp_path: Path) -> None:
    model = tiny_model("llama_tied_gqa", tmp_path / "model")
    prompt = run(model, tmp_path / "p", steps=1).prompt_file
    stitch(StitchSection(), prompt_path=prompt, model_path=model, output=tmp_path / "stitched")
    with pytest.raises(InputError, match="already carries a prompt"):
        run(tmp_path / "stitched", tmp_path / "q", steps=1)


def test_a_text_that_is_held_out_whole_is_refused(tmp_path: Path) -> None:
    """It used to be read again and again."""
    model = tiny_model("llama_tied_gqa", tmp_path / "model")
    (tmp_path / "tiny.txt").write_text("A few words, again and again. " * 90)
    with pytest.raises(InputError, match="has no tokens to learn from"):
        run(model, tmp_path / "p", **(STREAM | {"text": str(tmp_path / "tiny.txt"), "shuffle_buffer": 4}))


def test_half_a_surrogate_pair_in_a_row_is_said(corpus: str, tmp_path: Path) -> None:
    model = tiny_model("llama_tied_gqa", tmp_path / "model")
    rows = (tmp_path / "part-1.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "half.jsonl").write_text("".join([*rows[:40], json.dumps({"text": "\ud800 words"}) + "\n", *rows[40:]]))
    changes = STREAM | {"validation": "pydoc:validation", "text": str(tmp_path / "half.jsonl"), "shuffle_buffer": 4}
    with pytest.raises(InputError, match="has no UTF-8 form"):
        run(model, tmp_path / "p", **(changes | {"steps": 200, "validate_every": 200}))


def test_a_prefix_starts_from_more_than_a_short_first_file(corpus: str, tmp_path: Path) -> None:
    model = tiny_model("llama_tied_gqa", tmp_path / "model")
    for file in range(3):
        (tmp_path / f"part-{3 + file}.jsonl").write_text('{"text": "few"}\n')
    changes = STREAM | {"text": corpus, "validation": "pydoc:validation", "method": "kv-prefix", "steps": 1}
    for seed in range(3):
        prompt = load_prompt(run(model, tmp_path / f"p{seed}", tokens=40, seed=seed, **changes).prompt_file)
        assert prompt.num_virtual_tokens == 40
    (tmp_path / "short.txt").write_text("Only a few words are here. " * 3)
    short = {"text": str(tmp_path / "short.txt"), "seqlen": 8, "batch_size": 1, "method": "kv-prefix", "tokens": 200}
    with pytest.raises(InputError, match="from which a kv-prefix of 200 cannot start"):
        run(model, tmp_path / "q", **short)


def test_what_cannot_be_streamed_is_refused(corpus: str, tmp_path: Path) -> None:
    model = tiny_model("llama_tied_gqa", tmp_path / "model")
    one = str(tmp_path / "part-0.jsonl")
    with pytest.raises(InputError, match="is the text learned from"):
        run(model, tmp_path / "p", **(STREAM | {"text": one, "validation": f"mine={one}"}))
    with pytest.raises(InputError, match="is the text learned from"):  # one of several files
        run(model, tmp_path / "p", **(STREAM | {"text": corpus, "validation": one}))
    with pytest.raises(InputError, match="pydoc cannot be streamed"):
        run(model, tmp_path / "p", **(STREAM | {"text": "pydoc"}))
