"""From one format to another and back: the same tensors, the same model, nothing left behind by a refusal."""

import json
from pathlib import Path

import pytest
import torch
from compressed import calibration_text, run, stored_tensors
from safetensors.torch import load_file, save_file
from tiny_models import VOCAB_SIZE, tiny_model

from ctp_cli.errors import InputError
from ctp_cli.models.loading import load_model, load_tokenizer
from ctp_cli.models.resolve import resolve_model
from ctp_cli.stages.convert import convert


def logits(path: Path) -> torch.Tensor:
    ids = torch.randint(3, VOCAB_SIZE, (2, 20), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        return load_model(path)(ids).logits


def to(form: str, source: Path) -> Path:
    return convert(form, model=resolve_model(str(source)), output=source.with_name(f"{source.name}-{form}")).path


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama_tied_gqa", {}),
        ("llama_tied_gqa", {"sparsity": "2:4", "bits": 3, "symmetric": False}),
        ("llama_tied_gqa", {"sparsity": None, "bits": 8, "act_order": "column", "dampening": 0.02}),
        ("llama_tied_gqa", {"sparsity": None, "act_order": "static", "true_sequential": False}),
        ("gpt2", {"group_size": "row"}),
    ],
)
def test_codes_go_there_and_back_untouched(family: str, changes: dict[str, object], tmp_path: Path) -> None:
    model, text = tiny_model(family, tmp_path / "model"), calibration_text(tmp_path)
    run(model, tmp_path / "small", text, format="gptq", **changes)
    packed = to("ctp", tmp_path / "small")
    if changes.get("act_order") == "column":
        with pytest.raises(InputError, match="no runs of inputs"):
            to("compressed-tensors", packed)
        tensors = packed
    else:
        tensors = to("compressed-tensors", packed)
    back, dense = to("gptq", tensors), to("dense", packed)
    before, after = stored_tensors(tmp_path / "small"), stored_tensors(back)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    configs = [json.loads((path / "config.json").read_text()) for path in (tmp_path / "small", back)]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]
    assert json.loads((back / "quantize_config.json").read_text()) == configs[1]["quantization_config"]
    for path in (packed, tensors, back, dense):
        assert torch.equal(logits(path), logits(tmp_path / "small"))
        assert load_tokenizer(path).get_vocab() == load_tokenizer(model).get_vocab()
    assert not (dense / "quantize_config.json").exists()
    if "sparsity" not in changes:
        assert sum(f.stat().st_size for f in packed.glob("*.safetensors")) < sum(
            f.stat().st_size for f in back.glob("*.safetensors")
        )
    direct = run(model, tmp_path / "direct", text, format="ctp", **changes)
    if "2:4" not in changes.values():  # the writer knows of n:m, a conversion sees a mask
        assert all(torch.equal(t, stored_tensors(direct.path)[n]) for n, t in stored_tensors(packed).items())


def test_one_file_of_others_making_is_converted(tmp_path: Path) -> None:
    model, text = tiny_model("llama_tied_gqa", tmp_path / "model"), calibration_text(tmp_path)
    run(model, tmp_path / "small", text)
    tensors = stored_tensors(tmp_path / "small")
    for file in (*(tmp_path / "small").glob("model*"), tmp_path / "small" / "ctp.json"):
        file.unlink()
    save_file(tensors, tmp_path / "small" / "model.safetensors", metadata={"format": "pt"})
    packed = to("ctp", tmp_path / "small")
    assert [path.name for path in packed.glob("*.safetensors")] == ["ctp-00001-of-00001.safetensors"]
    assert torch.equal(logits(packed), logits(tmp_path / "small"))
    # how others found their codes is not known, and not made up
    settings = json.loads((to("gptq", packed) / "quantize_config.json").read_text())
    assert not settings.keys() & {"damp_percent", "static_groups", "true_sequential"}


def test_a_layer_may_be_split_over_two_files(tmp_path: Path) -> None:
    run(tiny_model("llama_tied_gqa", tmp_path / "model"), tmp_path / "small", calibration_text(tmp_path))
    index = tmp_path / "small" / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    name = "model.layers.0.mlp.up_proj.qweight"
    first, second = (tmp_path / "small" / f"model-0000{i}-of-00003.safetensors" for i in (2, 3))
    tensors, others = load_file(first), load_file(second)
    others[name] = tensors.pop(name)
    expected = logits(tmp_path / "small")
    save_file(tensors, first, metadata={"format": "pt"})
    save_file(others, second, metadata={"format": "pt"})
    content["weight_map"][name] = second.name
    index.write_text(json.dumps(content))
    assert torch.equal(logits(to("ctp", tmp_path / "small")), expected)


def test_what_cannot_be_converted_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    model, text = tiny_model("llama_tied_gqa", tmp_path / "model"), calibration_text(tmp_path)
    with pytest.raises(InputError, match="not quantized"):
        to("ctp", model)
    run(model, tmp_path / "small", text)
    file = tmp_path / "small" / "model-00002-of-00003.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.mlp.up_proj.qzeros"] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    before = {path.name for path in tmp_path.iterdir()}
    with pytest.raises(InputError, match=r"up_proj: said to be symmetric"):
        to("ctp", tmp_path / "small")
    assert {path.name for path in tmp_path.iterdir()} == before


def test_scales_that_float16_does_not_reach_are_refused(tmp_path: Path) -> None:
    model, text = tiny_model("llama_tied_gqa", tmp_path / "model", dtype=torch.bfloat16), calibration_text(tmp_path)
    run(model, tmp_path / "small", text, format="compressed-tensors")
    file = tmp_path / "small" / "model-00002-of-00003.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.mlp.up_proj.weight_scale"][0, 0] = 1e-20
    save_file(tensors, file, metadata={"format": "pt"})
    for form in ("gptq", "ctp"):
        with pytest.raises(InputError, match=r"up_proj: its scales are beyond float16"):
            to(form, tmp_path / "small")
    assert torch.isfinite(logits(to("dense", tmp_path / "small"))).all()
