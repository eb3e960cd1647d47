"""Stitching onto a checkpoint that ctp made reads and writes no weight of its linear layers, however many there are."""

import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from prompt_cases import TEXT, prompt_for
from safetensors.torch import load_file, save_file
from tiny_models import VOCAB_SIZE, tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from ctp_cli.checkpoints.hidden_states import FILE, POSITIONS, load_hidden_states, save_hidden_states
from ctp_cli.errors import InputError
from ctp_cli.models.loading import load_model
from ctp_cli.models.resolve import resolve_model
from ctp_cli.models.streaming import load_without_blocks
from ctp_cli.prompts.file import load_prompt, save_prompt
from ctp_cli.prompts.shards import read_header
from ctp_cli.recipe import CompressSection, StitchSection
from ctp_cli.stages import stitch as stage
from ctp_cli.stages.compress import compress
from ctp_cli.stages.convert import convert
from ctp_cli.stages.stitch import stitch
from ctp_cli.stages.unstitch import unstitch

FORMATS = {
    "dense": {"sparsity": 0.5},
    "gptq": {"bits": 4, "group_size": 32},
    "compressed-tensors": {"bits": 4, "group_size": 32},
    "ctp": {"sparsity": 0.5, "bits": 4, "group_size": 32},
}


def _compressed(folder: Path, family: str = "llama_tied_gqa", form: str = "ctp", **settings: object) -> Path:
    base = tiny_model(family, folder / f"base-{family}", **settings)
    text = folder / "text.txt"
    text.write_text("Stitching looks at embedding table and head, at nothing in between. " * 60)
    section = CompressSection(windows=8, seqlen=32, format=form, calibration=str(text), **FORMATS[form])
    compress(section, model=resolve_model(str(base)), output=folder / "compressed")
    save_prompt(folder / "prompt.safetensors", prompt_for(load_model(base)))
    return folder / "compressed"


def _stitch(folder: Path, output: str = "out", *, model: str = "compressed", format: str = "vocab"):
    section = StitchSection(format=format)
    return stitch(section, prompt_path=folder / "prompt.safetensors", model_path=folder / model, output=folder / output)


def _spoil_blocks(checkpoint: Path) -> set[str]:
    """Overwrite the data of every block's shard; names and shapes stay. Whoever reads a weight gets NaN or nonsense."""
    spoilt = set()
    for file in checkpoint.glob("*.safetensors"):
        header = read_header(file)
        if any(".0." in name or ".1." in name for name in header.tensors):
            content = file.read_bytes()
            file.unlink()  # it may be linked from elsewhere
            file.write_bytes(content[: header.data_start] + b"\xff" * (len(content) - header.data_start))
            spoilt.add(file.name)
    return spoilt


@torch.no_grad()
def _check_serves_the_prompt(folder: Path, stitched: Path) -> None:
    base, model, tokenizer = (
        load_model(folder / "compressed"),
        load_model(stitched),
        AutoTokenizer.from_pretrained(stitched),
    )
    ids = tokenizer(TEXT, add_special_tokens=False, return_tensors="pt")["input_ids"]
    rows = load_prompt(folder).embeddings[None]
    logits = model(**tokenizer(TEXT, return_tensors="pt")).logits
    expected = base(inputs_embeds=torch.cat([rows, base.get_input_embeddings()(ids)], dim=1)).logits
    assert torch.allclose(logits[..., :VOCAB_SIZE], expected, atol=1e-4)
    # the row was found on text without the prompt; where the prompt stands before it, it has to do as well
    assert logits.double().softmax(-1)[..., VOCAB_SIZE:].sum(-1).max() < 1e-6


@pytest.mark.parametrize("form", FORMATS)
def test_no_weight_of_a_block_is_read_or_written(form, tmp_path):
    checkpoint = _compressed(tmp_path, form=form)
    report = _stitch(tmp_path)
    _check_serves_the_prompt(tmp_path, report.path)
    shutil.copytree(checkpoint, tmp_path / "spoilt")
    spoilt = _spoil_blocks(tmp_path / "spoilt")
    assert len(spoilt) == 2
    again = _stitch(tmp_path, "again", model="spoilt")
    assert (again.mass_mean, again.mass_max) == (report.mass_mean, report.mass_max)
    ours = next(again.path.glob("*-vocabulary.safetensors"))
    assert ours.read_bytes() == (report.path / ours.name).read_bytes()
    for name in spoilt:
        assert (again.path / name).samefile(tmp_path / "spoilt" / name)
    assert again.linked_bytes == sum((again.path / name).stat().st_size for name in spoilt)
    assert again.copied_bytes < 2000  # the final norm


@pytest.mark.parametrize(
    "family", ["llama", "gpt2", "opt", "opt350", "bloom", "gpt_neox", "qwen3", "gemma3", "phi", "mistral"]
)
def test_every_family(family, tmp_path, monkeypatch):
    _compressed(tmp_path, family)
    monkeypatch.setattr(stage, "load_model", None)
    _check_serves_the_prompt(tmp_path, _stitch(tmp_path).path)


def test_an_adapter_reads_no_blocks_either(tmp_path):
    checkpoint = _compressed(tmp_path, form="dense")
    shutil.copytree(checkpoint, tmp_path / "spoilt")
    _spoil_blocks(tmp_path / "spoilt")
    adapter = _stitch(tmp_path, model="spoilt", format="peft").path
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    ids = AutoTokenizer.from_pretrained(checkpoint)(TEXT, add_special_tokens=False, return_tensors="pt")["input_ids"]
    rows = load_prompt(tmp_path).embeddings[None]
    with torch.no_grad():
        expected = model(inputs_embeds=torch.cat([rows, model.get_input_embeddings()(ids)], dim=1)).logits
        logits = PeftModel.from_pretrained(model, adapter)(input_ids=ids).logits
    assert torch.allclose(logits, expected[:, -logits.shape[1] :], atol=1e-5)


def test_what_is_written_does_not_grow_with_the_layers(tmp_path):
    written = []
    for layers in (2, 5):
        folder = tmp_path / str(layers)
        folder.mkdir()
        _compressed(folder, num_hidden_layers=layers)
        written.append(_stitch(folder).written_bytes)
    assert written[0] == written[1]


@pytest.mark.parametrize("form", ["gptq", "ctp"])
def test_everything_outside_of_the_blocks_is_as_load_model_has_it(form, tmp_path):
    checkpoint = _compressed(tmp_path, "gemma3", form)
    whole, hollow = load_model(checkpoint), load_without_blocks(checkpoint)
    for name, tensor in whole.state_dict().items():
        found = hollow.state_dict()[name]
        assert found.shape == tensor.shape and found.dtype == tensor.dtype
        assert found.is_meta if ".layers." in name else torch.equal(found, tensor)
    assert dict(hollow.named_buffers()).keys() == dict(whole.named_buffers()).keys()
    assert not any(buffer.is_meta for buffer in hollow.buffers())


def test_hidden_states_are_those_behind_the_last_block(tmp_path):
    checkpoint = _compressed(tmp_path, form="dense")
    model, tokenizer = load_model(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
    ids_T = tokenizer((tmp_path / "text.txt").read_text(), return_tensors="pt")["input_ids"][0]
    seen = []
    model.model.layers[-1].register_forward_hook(lambda _m, _i, y: seen.append(y))
    with torch.no_grad():
        model(ids_T[: 8 * 32].view(8, 32))
    kept = load_hidden_states(checkpoint)
    assert torch.allclose(kept, seen[0][:, 1:].flatten(0, 1), atol=1e-4)  # 248 positions, all of them kept


def test_kept_positions_are_spread_over_all_batches(tmp_path):
    batches = [torch.arange(b * 3000, (b + 1) * 3000).view(3, 1000, 1).float() for b in range(4)]
    save_hidden_states(tmp_path, batches)
    kept = load_hidden_states(tmp_path)[:, 0]
    assert POSITIONS * 0.9 < len(kept) <= POSITIONS
    assert (kept.diff() > 0).all() and kept.diff().max() <= kept.diff().min() + 1 < 51
    assert not (kept % 1000 == 0).any()  # first tokens


def test_conversion_and_unstitching_keep_them(tmp_path):
    checkpoint = _compressed(tmp_path, form="gptq")
    convert("ctp", model=resolve_model(str(checkpoint)), output=tmp_path / "converted")
    assert (tmp_path / "converted" / FILE).read_bytes() == (checkpoint / FILE).read_bytes()
    stitched = _stitch(tmp_path, model="converted").path
    assert not (stitched / FILE).exists()  # its text has no prompt before it
    unstitch(model_path=stitched, output=tmp_path / "back")
    assert (tmp_path / "back" / FILE).read_bytes() == (checkpoint / FILE).read_bytes()


def test_without_them_the_model_is_run(tmp_path):
    checkpoint = _compressed(tmp_path)
    shutil.rmtree(checkpoint / FILE.parent)
    report = _stitch(tmp_path)
    assert any("the model was run" in note for note in report.notes)
    _check_serves_the_prompt(tmp_path, report.path)


def test_others_hidden_states_are_refused(tmp_path):
    checkpoint = _compressed(tmp_path)
    for tensors, message in [
        ({"hidden_states": torch.ones(5, 63)}, "63 wide, the model's are 64"),
        ({"hidden_states": torch.full((5, 64), torch.nan)}, "no hidden states"),
        ({"hidden_states": torch.ones(64)}, "no hidden states"),
        ({"something": torch.ones(5, 64)}, "damaged"),
    ]:
        save_file(tensors, checkpoint / FILE)
        with pytest.raises(InputError, match=message):
            _stitch(tmp_path)
    (checkpoint / FILE).write_bytes(b"nothing")
    with pytest.raises(InputError, match="damaged"):
        _stitch(tmp_path)
    assert not list(tmp_path.glob("out*"))


def test_what_is_copied_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr("ctp_cli.prompts.stitching._WORTH_A_NOTE", 1)
    base = tiny_model("llama", tmp_path / "base")
    save_prompt(tmp_path / "prompt.safetensors", prompt_for(load_model(base)))
    report = _stitch(tmp_path, model="base")
    rest = (report.path / "model-rest.safetensors").stat().st_size
    assert report.copied_bytes == rest and report.linked_bytes == 0
    assert any("the embedding table or the head is in the same file" in note for note in report.notes)
    tables = load_file(report.path / "model-vocabulary.safetensors")
    assert report.written_bytes - rest == pytest.approx(sum(t.nbytes for t in tables.values()), abs=400)

    def refuse(*_):
        raise OSError("another file system")

    _compressed(tmp_path)
    monkeypatch.setattr("os.link", refuse)
    report = _stitch(tmp_path, "copied")
    assert sum("cannot be linked to" in note for note in report.notes) == 2
