"""The dtype that is written and a padded vocabulary: what plain transformers loads, and what unstitching gives back."""

import json
from pathlib import Path

import pytest
import torch
from prompt_cases import TEXT, prompt_for, stitched_case
from safetensors.torch import load_file
from tiny_models import FAMILIES, VOCAB_SIZE, tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from ctp_cli.errors import InputError, RecipeError
from ctp_cli.models.loading import load_model, weight_files
from ctp_cli.prompts.file import Prompt, load_prompt, save_prompt
from ctp_cli.recipe import StitchSection, build
from ctp_cli.stages.stitch import StitchReport, stitch
from ctp_cli.stages.unstitch import unstitch

VOCABULARY = "model-vocabulary.safetensors"


def _stitch(base: Path, folder: Path, **settings: object) -> StitchReport:
    save_prompt(folder / "prompt.safetensors", prompt_for(load_model(base)))
    section = StitchSection.model_validate(settings)
    return stitch(section, prompt_path=folder / "prompt.safetensors", model_path=base, output=folder / "out")


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in set(weight_files(folder).values()) for name, t in load_file(file).items()}


def _check_given_back(base: Path, stitched: Path, folder: Path) -> None:
    unstitch(model_path=stitched, output=folder)
    expected, found = _tensors(base), _tensors(folder)
    assert found.keys() == expected.keys()
    assert all(t.dtype == expected[name].dtype and torch.equal(t, expected[name]) for name, t in found.items())
    assert (folder / "config.json").read_bytes() == (base / "config.json").read_bytes()
    assert not list(folder.glob("tables*"))


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_padding_are_never_generated(family, tmp_path):
    case = stitched_case(tiny_model(family, tmp_path / "base"), tmp_path / "stitched", vocab_multiple=100)
    model, tokenizer = case.stitched()
    assert model.config.vocab_size == case.made.vocabulary_rows == 400
    assert model.get_input_embeddings().weight.shape[0] == model.get_output_embeddings().weight.shape[0] == 400
    inputs = tokenizer(TEXT, return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits
    assert (logits[..., :VOCAB_SIZE] - case.expected_logits()).abs().max() < 1e-5
    left = logits.double().softmax(-1)[..., VOCAB_SIZE:].sum(-1)  # of 80 tokens, 71 of them padding
    assert left[:, 9:].max() < 1e-6
    assert case.made.mass_max < 1e-6
    torch.manual_seed(0)
    drawn = model.generate(
        **inputs, do_sample=True, temperature=5.0, top_k=0, max_new_tokens=50, num_return_sequences=4
    )
    assert drawn[:, inputs["input_ids"].shape[1] :].max() < VOCAB_SIZE
    assert set(range(VOCAB_SIZE, 400)) <= set(model.generation_config.suppress_tokens)


@pytest.mark.parametrize("multiple, rows", [(None, 384), (1, 329), (7, 329), (64, 384), (1000, 1000)])
def test_the_vocabulary_is_the_next_multiple(multiple, rows, tmp_path):
    base = tiny_model("llama_tied_gqa", tmp_path / "base")
    report = _stitch(base, tmp_path, vocab_multiple=multiple)
    assert json.loads((report.path / "config.json").read_text())["vocab_size"] == rows
    _check_given_back(base, report.path, tmp_path / "back")


def test_the_probability_counts_every_padded_row(tmp_path):
    base = tiny_model("llama", tmp_path / "base")
    few = stitched_case(base, tmp_path / "few", vocab_multiple=1)
    many = stitched_case(base, tmp_path / "many", vocab_multiple=1000)
    assert many.made.mass_mean == pytest.approx(few.made.mass_mean * (1000 - VOCAB_SIZE) / 9, rel=1e-3)


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_tables_in_another_dtype(dtype, stored, tmp_path):
    family = "phi" if dtype == "float16" else "llama_tied_gqa"  # a head with a bias, a head that was not there
    base = tiny_model(family, tmp_path / "base", dtype=getattr(torch, stored))
    report = _stitch(base, tmp_path, dtype=dtype)
    tables = load_file(report.path / VOCABULARY)
    assert {t.dtype for t in tables.values()} == {getattr(torch, dtype)}
    stitched = AutoModelForCausalLM.from_pretrained(report.path)
    assert stitched.dtype == getattr(torch, dtype)
    for name, t in _tensors(report.path).items():
        if name not in tables:
            assert t.dtype == getattr(torch, stored)  # unread, and cast by whoever loads it
    _check_given_back(base, report.path, tmp_path / "back")
    # random bfloat16 weights are no smaller than float16 can hold
    lossless = dtype in (stored, "float32") or (dtype, stored) == ("float16", "bfloat16")
    assert (report.path / "original" / "tables.safetensors").exists() != lossless
    assert any("to the bit" in note for note in report.notes) != lossless


@pytest.mark.parametrize("family", ["llama", "llama_tied_gqa", "gpt2", "opt", "bloom", "gpt_neox", "qwen3", "gemma"])
def test_float32_tables_hold_the_prompt_as_it_was_learned(family, tmp_path):
    base = tiny_model(family, tmp_path / "base", dtype=torch.bfloat16)
    report = _stitch(base, tmp_path, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(report.path)
    wide = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    rows = load_prompt(tmp_path).embeddings[None]
    ids = tokenizer(TEXT, add_special_tokens=False, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(report.path)(**tokenizer(TEXT, return_tensors="pt")).logits
        expected = wide(inputs_embeds=torch.cat([rows, wide.get_input_embeddings()(ids)], dim=1)).logits
    assert torch.allclose(logits[..., :VOCAB_SIZE], expected, atol=1e-4)


def test_a_dtype_that_cannot_hold_the_tables_is_refused(tmp_path):
    base = tiny_model("llama", tmp_path / "base", dtype=torch.bfloat16)
    save_prompt(tmp_path / "prompt.safetensors", Prompt(torch.full((2, 64), 1e5)))
    for format in ("vocab", "peft"):
        with pytest.raises(InputError, match=r"fit into torch\.float16"):
            stitch(
                StitchSection(format=format, dtype="float16"),
                prompt_path=tmp_path / "prompt.safetensors",
                model_path=base,
                output=tmp_path / "out",
            )
    assert {path.name for path in tmp_path.iterdir()} == {"base", "prompt.safetensors"}


@pytest.mark.parametrize("format, file", [("peft", "adapter_model.safetensors"), ("kv", "prompt.safetensors")])
def test_adapters_and_caches_in_a_dtype(format, file, tmp_path):
    report = _stitch(tiny_model("llama", tmp_path / "base"), tmp_path, format=format, dtype="bfloat16")
    assert {t.dtype for t in load_file(report.path / file).values()} == {torch.bfloat16}


def test_only_a_vocabulary_is_padded():
    with pytest.raises(RecipeError, match="vocab_multiple pads a vocabulary, and format peft has none"):
        build(StitchSection, {"format": "peft", "vocab_multiple": 64})
    with pytest.raises(RecipeError, match="greater than or equal to 1"):
        build(StitchSection, {"vocab_multiple": 0})
    with pytest.raises(RecipeError, match="'float32', 'bfloat16' or 'float16'"):
        build(StitchSection, {"dtype": "float8"})
