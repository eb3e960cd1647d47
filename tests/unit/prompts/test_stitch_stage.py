"""The stage: a prompt and a checkpoint become one artifact, or a refusal that leaves nothing behind."""

import json
import shutil

import pytest
import torch
from peft import PeftModel
from prompt_cases import TEXT, prompt_for
from safetensors.torch import load_file, save_file
from tiny_models import VOCAB_SIZE, tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from ctp_cli.errors import InputError, OutputError, UnfinishedError
from ctp_cli.models.loading import load_model
from ctp_cli.models.resolve import resolve_model
from ctp_cli.prompts import rejection
from ctp_cli.prompts.file import (
    Prompt,
    PromptMetadata,
    fingerprint_embedding,
    fingerprint_tokenizer,
    load_prompt,
    save_prompt,
)
from ctp_cli.recipe import CompressSection, StitchSection
from ctp_cli.stages.compress import compress
from ctp_cli.stages.stitch import stitch


@pytest.fixture
def made(tmp_path):
    """A base and a prompt that was learned on it."""
    base = tiny_model("llama_tied_gqa", tmp_path / "base")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    metadata = PromptMetadata(
        base_model="tiny",
        tokenizer_fingerprint=fingerprint_tokenizer(tokenizer),
        embedding_fingerprint=fingerprint_embedding(model.get_input_embeddings().weight),
    )
    save_prompt(tmp_path / "prompt.safetensors", Prompt(prompt_for(model).embeddings, metadata))
    return tmp_path


def _stitch(folder, *, format="vocab", prompt="prompt.safetensors", model="base", output="out", **settings):
    section = StitchSection(format=format)
    return stitch(section, prompt_path=folder / prompt, model_path=folder / model, output=folder / output, **settings)


@torch.no_grad()
def _expected(folder, model="base"):
    model = AutoModelForCausalLM.from_pretrained(folder / model)
    ids = AutoTokenizer.from_pretrained(folder / "base")(TEXT, add_special_tokens=False, return_tensors="pt")
    rows = load_prompt(folder).embeddings[None]
    embeds = torch.cat([rows, model.get_input_embeddings()(ids["input_ids"])], dim=1)
    return model(inputs_embeds=embeds).logits, ids["input_ids"]


def test_vocab_makes_an_ordinary_checkpoint_with_a_manifest(made):
    report = _stitch(made)
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(report.path),
        AutoTokenizer.from_pretrained(report.path),
    )
    with torch.no_grad():
        logits = model(**tokenizer(TEXT, return_tensors="pt")).logits
    assert torch.allclose(logits[..., :VOCAB_SIZE], _expected(made)[0], atol=1e-5)
    manifest = json.loads((report.path / "ctp.json").read_text())
    assert manifest["kind"] == "stitched-checkpoint"
    assert manifest["results"]["mass_max"] == report.mass_max < 1e-4
    assert manifest["results"]["token_ids"] == [VOCAB_SIZE, VOCAB_SIZE + 8]
    assert manifest["results"]["text_positions"] == 512 - 9
    assert any("dense head" in note for note in report.notes)
    assert {p.name for p in made.iterdir()} == {"base", "out", "prompt.safetensors"}


def test_peft_makes_an_adapter_with_a_manifest(made):
    report = _stitch(made, format="peft")
    expected, ids = _expected(made)
    with torch.no_grad():
        adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(made / "base"), report.path)
        logits = adapted(input_ids=ids).logits
    assert torch.allclose(logits, expected[:, -logits.shape[1] :], atol=1e-5)
    assert json.loads((report.path / "ctp.json").read_text())["kind"] == "peft-adapter"
    assert report.mass_max is None


def test_another_compression_of_the_same_model_is_welcome(made):
    shutil.copytree(made / "base", made / "pruned")
    tensors = load_file(made / "pruned" / "model.safetensors")
    for name, tensor in tensors.items():
        if "proj" in name:
            tensor[tensor.abs() < tensor.abs().median()] = 0
    save_file(tensors, made / "pruned" / "model.safetensors", metadata={"format": "pt"})
    report = _stitch(made, model="pruned")
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(report.path),
        AutoTokenizer.from_pretrained(report.path),
    )
    with torch.no_grad():
        logits = model(**tokenizer(TEXT, return_tensors="pt")).logits
    assert torch.allclose(logits[..., :VOCAB_SIZE], _expected(made, "pruned")[0], atol=1e-5)


def test_a_packed_checkpoint_stays_packed(made):
    text = made / "text.txt"
    text.write_text("What is pruned takes one bit, and a prompt does not change that. " * 40)
    section = CompressSection(
        sparsity=0.5, bits=4, group_size=32, windows=4, seqlen=32, format="ctp", calibration=str(text)
    )
    compress(section, model=resolve_model(str(made / "base")), output=made / "packed")
    report = _stitch(made, model="packed")
    assert not list(report.path.glob("model*"))
    assert (report.path / "ctp-00002-of-00003.safetensors").samefile(made / "packed" / "ctp-00002-of-00003.safetensors")
    base, stitched = load_model(made / "packed"), load_model(report.path)
    tokenizer = AutoTokenizer.from_pretrained(report.path)
    ids = AutoTokenizer.from_pretrained(made / "base")(TEXT, add_special_tokens=False, return_tensors="pt")["input_ids"]
    rows = load_prompt(made).embeddings[None]
    with torch.no_grad():
        logits = stitched(**tokenizer(TEXT, return_tensors="pt")).logits
        expected = base(inputs_embeds=torch.cat([rows, base.get_input_embeddings()(ids)], dim=1)).logits
    assert torch.allclose(logits[..., :VOCAB_SIZE], expected, atol=1e-5)


@pytest.mark.parametrize("format", ["vocab", "peft"])
def test_a_prompt_of_another_model_is_refused_and_leaves_nothing(format, made):
    tiny_model("llama_tied_gqa", made / "other", seed=1)
    with pytest.raises(InputError, match="another embedding table"):
        _stitch(made, format=format, model="other")
    assert not list(made.glob("out*")) and not list(made.glob(".out*"))


def test_a_prompt_that_says_nothing_is_stitched_with_a_warning(made):
    save_prompt(made / "prompt.safetensors", Prompt(load_prompt(made).embeddings))
    notes = _stitch(made).notes
    assert sum("not verified" in note for note in notes) == 2


def test_too_much_mass_keeps_nothing(made, monkeypatch):
    monkeypatch.setattr(rejection, "_ATTEMPTS", ((None, 30.0),))
    with pytest.raises(InputError, match="of the probability"):
        _stitch(made)
    assert not list(made.glob("out*")) and not list(made.glob(".out*"))


def test_a_refusal_after_the_first_file_keeps_nothing_either(made, monkeypatch):
    def refuse(*_):
        raise InputError("the tokenizer lost it")

    monkeypatch.setattr("ctp_cli.prompts.stitching.check_saved_tokenizer", refuse)
    with pytest.raises(InputError, match="lost it"):
        _stitch(made)
    assert not list(made.glob("out*"))


def test_a_full_disk_is_no_bug_and_leaves_nothing(made, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ctp_cli.prompts.shards.copy_without", full)
    with pytest.raises(UnfinishedError, match="No space left"):
        _stitch(made)
    assert not list(made.glob("out*"))
    monkeypatch.undo()
    assert _stitch(made).path.is_dir()


def test_nothing_is_overwritten_without_force(made):
    _stitch(made)
    with pytest.raises(OutputError, match="exists"):
        _stitch(made)
    assert _stitch(made, format="peft", force=True).format == "peft"
    assert not (made / "out" / "config.json").exists()


def test_the_model_itself_is_never_the_output(made):
    before = sorted((made / "base").iterdir())
    with pytest.raises(OutputError, match="is what is to be read"):
        _stitch(made, output="base", force=True)
    assert sorted((made / "base").iterdir()) == before


def test_no_warning_of_long_samples(made, capsys):
    """transformers warns where more is tokenized than `model_max_length`; nothing of it is a model's input here."""
    file = made / "base" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_max_length": 4}))
    for format in ("vocab", "peft", "kv"):
        _stitch(made, format=format, output=format)
    assert "Token indices" not in capsys.readouterr().err
