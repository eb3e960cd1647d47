"""From one format to another and back: the same tensors, the same model, nothing left behind by a refusal."""

import json
import re
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


def others_making(folder: Path, text: Path, **changes: object) -> tuple[Path, dict[str, torch.Tensor]]:
    """A quantized checkpoint without our manifest and files, whose tensors the caller stores anew."""
    run(tiny_model("llama_tied_gqa", folder / "model", dtype=torch.bfloat16), folder / "small", text, **changes)
    tensors = stored_tensors(folder / "small")
    for file in (*(folder / "small").glob("model*"), folder / "small" / "ctp.json"):
        file.unlink()
    return folder / "small", tensors


def store(folder: Path, files: dict[str, dict[str, torch.Tensor]]) -> None:
    for name, tensors in files.items():
        save_file(tensors, folder / name, metadata={"format": "pt"})
    weight_map = {tensor: name for name, tensors in files.items() for tensor in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_files_whose_names_hold_no_number_are_all_converted(tmp_path: Path) -> None:
    small, tensors = others_making(tmp_path, calibration_text(tmp_path))
    extra = {name: tensors.pop(name) for name in list(tensors) if ".layers.1." in name}
    store(small, {"model.safetensors": tensors, "model_extra_tensors.safetensors": extra})
    packed = to("ctp", small)
    assert len(list(packed.glob("*.safetensors"))) == 2
    assert torch.equal(logits(packed), logits(small))


def test_a_layer_without_its_codes_is_refused(tmp_path: Path) -> None:
    small, tensors = others_making(tmp_path, calibration_text(tmp_path))
    del tensors["model.layers.0.mlp.up_proj.qweight"]
    store(small, {"model.safetensors": tensors})
    with pytest.raises(InputError, match=r"up_proj: qweight missing"):
        to("ctp", small)


def test_files_beside_those_of_the_index_are_not_read(tmp_path: Path) -> None:
    run(tiny_model("llama_tied_gqa", tmp_path / "model"), tmp_path / "small", calibration_text(tmp_path))
    expected = logits(tmp_path / "small")
    stale = load_file(tmp_path / "small" / "model-00002-of-00003.safetensors")
    save_file({name: torch.zeros_like(x) for name, x in stale.items()}, tmp_path / "small" / "z-old.safetensors")
    assert torch.equal(logits(tmp_path / "small"), expected)


def test_layers_that_are_dense_are_said_to_be(tmp_path: Path) -> None:
    """A reader looks for codes of every linear layer else."""
    small, tensors = others_making(tmp_path, calibration_text(tmp_path), format="ctp")
    name = "model.layers.0.mlp.gate_proj"
    codes = {part: tensors.pop(part) for part in list(tensors) if part.startswith(name)}
    tensors[f"{name}.weight"] = torch.randn(128, 64, generator=torch.Generator().manual_seed(0)).bfloat16() * 0.1
    assert codes
    for file in small.glob("ctp*"):
        file.unlink()
    save_file(tensors, small / "ctp.safetensors", metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "ctp.safetensors")}
    (small / "ctp.safetensors.index.json").write_text(json.dumps(index))
    expected = logits(small)
    for form in ("compressed-tensors", "gptq"):
        made = to(form, small)
        settings = json.loads((made / "config.json").read_text())["quantization_config"]
        if form == "gptq":
            assert [re.fullmatch(key.removeprefix("-:"), name) is not None for key in settings["dynamic"]] == [True]
        else:
            assert settings["ignore"] == ["lm_head", name]
        assert torch.equal(logits(made), expected)


def test_scales_in_bfloat16_stay_what_they_are(tmp_path: Path) -> None:
    small, tensors = others_making(tmp_path, calibration_text(tmp_path), format="compressed-tensors")
    for name in tensors:
        if name.endswith("weight_scale"):
            tensors[name] = tensors[name] * 2.0**-24
            assert tensors[name].dtype == torch.bfloat16
    store(small, {"model.safetensors": tensors})
    with pytest.raises(InputError, match="beyond float16"):
        to("ctp", small)  # as subnormal numbers they would lose bits
    after = stored_tensors(to("compressed-tensors", small))
    assert all(torch.equal(after[name], tensor) for name, tensor in tensors.items())


def test_a_zero_point_of_nought_stays_one(tmp_path: Path) -> None:
    """Version 1 stores zero - 1, which wraps."""
    small, tensors = others_making(tmp_path, calibration_text(tmp_path), symmetric=False, sparsity=None)
    for file in ("config.json", "quantize_config.json"):
        content = json.loads((small / file).read_text())
        content.get("quantization_config", content)["checkpoint_format"] = "gptq"
        (small / file).write_text(json.dumps(content))
    for name in tensors:
        if name.endswith("qzeros"):
            tensors[name] = torch.full_like(tensors[name], -1)  # 15 everywhere: zero points of 0
    store(small, {"model.safetensors": tensors})
    after = stored_tensors(to("gptq", small))
    assert all(torch.equal(after[name], tensor) for name, tensor in tensors.items())
