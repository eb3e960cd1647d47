"""Only embedding, head and tokenizer are written; other weights are the same files or the same bytes."""

import json

import pytest
import torch
from prompt_cases import TEXT, stitched_case
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import VOCAB_SIZE, tiny_model

from ctp_cli.errors import InputError
from ctp_cli.prompts.shards import copy_without, link_or_copy, read_header

INDEX = "model.safetensors.index.json"
VOCABULARY = "model-vocabulary.safetensors"


def _reshard(base, parts):
    """Split a single-file checkpoint: `parts` maps a file name to a test on tensor names."""
    tensors = load_file(base / "model.safetensors")
    weight_map = {}
    for file, belongs in parts.items():
        chosen = {name: tensor for name, tensor in tensors.items() if belongs(name)}
        save_file(chosen, base / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(chosen, file)
    assert weight_map.keys() == tensors.keys()
    (base / "model.safetensors").unlink()
    (base / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return base


def _agrees(case):
    model, tokenizer = case.stitched()
    with torch.no_grad():
        logits = model(**tokenizer(TEXT, return_tensors="pt")).logits
    return (logits[..., :VOCAB_SIZE] - case.expected_logits()).abs().max() < 1e-5


def _held(folder):
    """Tensor name -> files that hold it."""
    held = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as handle:
            for name in handle.keys():  # noqa: SIM118 - it is no dict
                held.setdefault(name, []).append(file.name)
    return held


@pytest.mark.parametrize("family", ["llama", "llama_tied_gqa"])
def test_shards_that_do_not_change_are_the_same_file(family, tmp_path):
    base = _reshard(
        tiny_model(family, tmp_path / "base"),
        {
            "model-00001-of-00003.safetensors": lambda name: ".layers." not in name,
            "model-00002-of-00003.safetensors": lambda name: ".layers.0." in name,
            "model-00003-of-00003.safetensors": lambda name: ".layers.1." in name,
        },
    )
    case = stitched_case(base, tmp_path / "stitched")
    blocks = [f"model-0000{i}-of-00003.safetensors" for i in (2, 3)]
    for name in blocks:
        assert (case.folder / name).samefile(base / name)
    assert case.made.linked_bytes == sum((base / name).stat().st_size for name in blocks)
    written = {p for p in case.folder.glob("*.safetensors") if p.name not in blocks}
    assert case.made.written_bytes == sum(p.stat().st_size for p in written)
    assert _agrees(case)


def test_a_shard_that_holds_nothing_but_tables_is_left_out(tmp_path):
    base = _reshard(
        tiny_model("llama", tmp_path / "base"),
        {
            "model-00001-of-00002.safetensors": lambda name: "embed" in name or "lm_head" in name,
            "model-00002-of-00002.safetensors": lambda name: not ("embed" in name or "lm_head" in name),
        },
    )
    case = stitched_case(base, tmp_path / "stitched")
    assert {p.name for p in case.folder.glob("*.safetensors")} == {
        "model-00002-of-00002.safetensors",
        VOCABULARY,
    }
    assert _agrees(case)


@pytest.mark.parametrize("family", ["llama_tied_gqa", "gpt_neox", "bloom"])
def test_a_single_file_is_split_with_every_tensor_in_one_place(family, tmp_path):
    case = stitched_case(tiny_model(family, tmp_path / "base"), tmp_path / "stitched")
    assert not (case.folder / "model.safetensors").exists()  # it would be read instead of the index
    held = _held(case.folder)
    assert all(len(files) == 1 for files in held.values())
    weight_map = json.loads((case.folder / INDEX).read_text())["weight_map"]
    assert {name: files[0] for name, files in held.items()} == weight_map
    before = load_file(case.base / "model.safetensors")
    changed = {name for name, file in weight_map.items() if file == VOCABULARY}
    for name in before.keys() - changed:
        with safe_open(case.folder / weight_map[name], "pt") as handle:
            assert torch.equal(handle.get_tensor(name), before[name])
    assert len(changed) == 2


def test_names_are_those_a_checkpoint_of_the_family_has(tmp_path):
    case = stitched_case(tiny_model("gpt_neox", tmp_path / "base"), tmp_path / "stitched")
    with safe_open(case.folder / VOCABULARY, "pt") as handle:
        assert set(handle.keys()) == {"gpt_neox.embed_in.weight", "embed_out.weight"}


def test_a_head_stored_under_the_name_of_its_module_is_replaced_there(tmp_path):
    base = tiny_model("gpt_neox", tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("embed_out.weight")
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    case = stitched_case(base, tmp_path / "stitched")
    assert "embed_out.weight" not in _held(case.folder)  # two heads would be one too many
    assert _agrees(case)


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_older_files_without_the_decoder_prefix(family, tmp_path):
    base = tiny_model(family, tmp_path / "base")
    prefix = {"gpt2": "transformer.", "opt": "model."}[family]
    tensors = {name.removeprefix(prefix): tensor for name, tensor in load_file(base / "model.safetensors").items()}
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    case = stitched_case(base, tmp_path / "stitched")
    assert _agrees(case)


def test_the_base_is_untouched(tmp_path):
    base = tiny_model("llama", tmp_path / "base")
    before = {p.name: p.read_bytes() for p in base.iterdir()}
    stitched_case(base, tmp_path / "stitched")
    assert {p.name: p.read_bytes() for p in base.iterdir()} == before


def test_settings_of_a_quantized_base_come_along(tmp_path):
    base = tiny_model("llama", tmp_path / "base")
    (base / "quantize_config.json").write_text('{"bits": 4}')
    (base / "LICENSE").write_text("text")
    (base / "pytorch_model.bin").write_text("not this")
    case = stitched_case(base, tmp_path / "stitched")
    assert (case.folder / "quantize_config.json").read_text() == '{"bits": 4}'
    assert (case.folder / "LICENSE").exists()
    assert not (case.folder / "pytorch_model.bin").exists()


def test_a_quantized_head_is_refused(tmp_path):
    base = tiny_model("llama", tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.qweight"] = torch.zeros(8, 320, dtype=torch.int32)
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="head is quantized"):
        stitched_case(base, tmp_path / "stitched")


def test_copying_agrees_with_the_reader_of_safetensors(tmp_path):
    tensors = {
        "a": torch.randn(3, 5),
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(2.5),
        "codes": torch.arange(7, dtype=torch.uint8),
        "half": torch.randn(9).bfloat16(),
        "left": torch.ones(4),
    }
    save_file(tensors, tmp_path / "from.safetensors", metadata={"format": "pt", "x": "é"})
    written = copy_without(tmp_path / "from.safetensors", tmp_path / "to.safetensors", {"left", "not there"})
    assert written == (tmp_path / "to.safetensors").stat().st_size
    copied = load_file(tmp_path / "to.safetensors")
    assert copied.keys() == tensors.keys() - {"left"}
    assert all(torch.equal(copied[name], tensors[name]) for name in copied)
    with safe_open(tmp_path / "to.safetensors", "pt") as handle:
        assert handle.metadata() == {"format": "pt", "x": "é"}


def test_a_shard_that_was_cut_off_is_named(tmp_path):
    save_file({"a": torch.ones(10)}, tmp_path / "a.safetensors")
    whole = (tmp_path / "a.safetensors").read_bytes()
    for length in (0, 4, 20, len(whole) - 1):
        (tmp_path / "a.safetensors").write_bytes(whole[:length])
        with pytest.raises(InputError, match=r"a\.safetensors"):
            read_header(tmp_path / "a.safetensors")


def test_linking_follows_the_symbolic_links_of_the_hub_cache(tmp_path):
    (tmp_path / "blob").write_text("weights")
    (tmp_path / "name").symlink_to(tmp_path / "blob")
    assert link_or_copy(tmp_path / "name", tmp_path / "linked")
    assert not (tmp_path / "linked").is_symlink()
    assert (tmp_path / "linked").samefile(tmp_path / "blob")


def test_without_links_files_are_copied(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError("no links here")

    monkeypatch.setattr("os.link", refuse)
    (tmp_path / "a").write_text("weights")
    assert not link_or_copy(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_text() == "weights"
