"""Unstitching gives back the checkpoint that was stitched onto: its tensors, its tokenizer, its settings."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from prompt_cases import TEXT, prompt_for
from safetensors.torch import load_file
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from ctp_cli.errors import InputError
from ctp_cli.models.loading import load_model, weight_files
from ctp_cli.prompts.file import save_prompt
from ctp_cli.recipe import StitchSection
from ctp_cli.stages.stitch import stitch
from ctp_cli.stages.unstitch import unstitch


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in set(weight_files(folder).values()) for name, t in load_file(file).items()}


def _stitched(base: Path, folder: Path) -> Path:
    save_prompt(folder / "prompt.safetensors", prompt_for(load_model(base)))
    return stitch(
        StitchSection(), prompt_path=folder / "prompt.safetensors", model_path=base, output=folder / "stitched"
    ).path


def _check_given_back(base: Path, made: Path) -> None:
    expected, found = _tensors(base), _tensors(made)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    settings = {p.name for p in base.glob("*.json") if not p.name.endswith(".index.json")} - {"ctp.json"}
    assert {p.name for p in made.glob("*.json") if not p.name.endswith(".index.json")} - {"ctp.json"} == settings
    for name in settings:
        assert (made / name).read_bytes() == (base / name).read_bytes()


@pytest.mark.parametrize("family", ["llama", "llama_tied_gqa", "opt350", "gpt2", "gpt_neox", "phi", "gemma"])
def test_everything_is_as_it_was(family: str, tmp_path: Path) -> None:
    base = tiny_model(family, tmp_path / "base")
    stitched = _stitched(base, tmp_path)
    report = unstitch(model_path=stitched, output=tmp_path / "back")
    _check_given_back(base, tmp_path / "back")
    assert report.written_bytes < report.linked_bytes
    ids = AutoTokenizer.from_pretrained(tmp_path / "back")(TEXT, return_tensors="pt")["input_ids"]
    assert torch.equal(ids, AutoTokenizer.from_pretrained(base)(TEXT, return_tensors="pt")["input_ids"])
    logits = [AutoModelForCausalLM.from_pretrained(folder).eval()(ids).logits for folder in (base, tmp_path / "back")]
    assert torch.equal(*logits)


def test_named_chat_templates_come_back(tmp_path: Path) -> None:
    base = tiny_model("llama", tmp_path / "base")
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tool_use.jinja").write_text("{{ messages[0]['content'] }}")
    templates = AutoTokenizer.from_pretrained(base).chat_template
    assert set(templates) == {"default", "tool_use"}
    unstitch(model_path=_stitched(base, tmp_path), output=tmp_path / "back")
    assert AutoTokenizer.from_pretrained(tmp_path / "back").chat_template == templates


def test_a_compressed_checkpoint_comes_back_with_its_manifest(compressed: Path, tmp_path: Path) -> None:
    stitched = _stitched(compressed, tmp_path)
    unstitch(model_path=stitched, output=tmp_path / "back")
    _check_given_back(compressed, tmp_path / "back")
    before, after = (json.loads((folder / "ctp.json").read_text()) for folder in (compressed, tmp_path / "back"))
    for key in ("kind", "recipe", "format", "base_model"):
        assert after[key] == before[key]
    _stitched_again = stitch(
        StitchSection(),
        prompt_path=tmp_path / "prompt.safetensors",
        model_path=tmp_path / "back",
        output=tmp_path / "again",
    ).path
    again, first = _tensors(_stitched_again), _tensors(stitched)
    assert again.keys() == first.keys() and all(torch.equal(again[name], first[name]) for name in first)


def test_what_was_not_stitched_or_is_damaged_is_refused(tmp_path: Path) -> None:
    base = tiny_model("llama", tmp_path / "base")
    with pytest.raises(InputError, match="no checkpoint that `ctp stitch` made"):
        unstitch(model_path=base, output=tmp_path / "back")
    stitched = _stitched(base, tmp_path)
    manifest = json.loads((stitched / "ctp.json").read_text())
    for results, message in [
        ({}, "does not say what the base was"),
        ({"base_rows": {"lm_head.weight": "all"}}, "does not say what the base was"),
        ({"base_rows": {"lm_head.weight": 10**9}}, "has fewer rows than its base had"),
        ({"base_rows": {"nothing": 3}}, "holds no tensor nothing"),
    ]:
        (stitched / "ctp.json").write_text(json.dumps(manifest | {"results": results}))
        with pytest.raises(InputError, match=message):
            unstitch(model_path=stitched, output=tmp_path / "back")
    (stitched / "ctp.json").write_text(json.dumps(manifest))
    shutil.rmtree(stitched / "original")
    with pytest.raises(InputError, match="original is missing"):
        unstitch(model_path=stitched, output=tmp_path / "back")
    assert {path.name for path in tmp_path.iterdir()} == {"base", "stitched", "prompt.safetensors"}
