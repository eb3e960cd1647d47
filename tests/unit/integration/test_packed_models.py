"""Checkpoints of format ctp in transformers: the same model as its dense twin, packed in memory, with gradients."""

import copy
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ctp_kernels import dispatch
from ctp_kernels.cpu.build import cpu_features
from safetensors.torch import load_file, save_file
from tiny_models import VOCAB_SIZE, tiny_model
from transformers import AutoModel, AutoModelForCausalLM

import ctp_cli.integration  # noqa: F401 - registers the format
from ctp_cli.checkpoints.packed_linear import PackedLinear
from ctp_cli.errors import InputError
from ctp_cli.models.loading import load_model
from ctp_cli.models.resolve import resolve_model
from ctp_cli.recipe import CompressSection
from ctp_cli.stages.compress import compress

TEXT = "A pruned weight takes one bit, a kept one its code and that bit. " * 40


def compressed(family: str, folder: Path, **settings: Any) -> Path:
    model = tiny_model(family, folder / "model")
    (folder / "text.txt").write_text(TEXT)
    small = {"sparsity": 0.5, "bits": 4, "group_size": 32, "windows": 4, "seqlen": 32, "format": "ctp"}
    section = CompressSection(**{**small, "calibration": str(folder / "text.txt"), **settings})
    compress(section, model=resolve_model(str(model)), output=folder / "packed")
    return folder / "packed"


def ids() -> torch.Tensor:
    return torch.randint(3, VOCAB_SIZE, (2, 20), generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama_tied_gqa", {}),
        ("llama_tied_gqa", {"sparsity": "2:4", "bits": 3, "symmetric": False}),
        ("llama_tied_gqa", {"bits": 8, "act_order": "column", "sparsity": None}),
        ("opt", {"group_size": "row", "bits": 2}),
        ("gpt2", {"sparsity": 0.75}),
    ],
)
def test_a_packed_model_is_its_dense_twin(family: str, settings: dict[str, Any], tmp_path: Path) -> None:
    path = compressed(family, tmp_path, **settings)
    packed, dense = AutoModelForCausalLM.from_pretrained(path).eval(), load_model(path)
    with torch.no_grad():
        # GPT-2's dense layers add the bias inside of the product
        torch.testing.assert_close(packed(ids()).logits, dense(ids()).logits, rtol=1e-5, atol=1e-5)
        assert torch.equal(packed.generate(ids(), max_new_tokens=8), dense.generate(ids(), max_new_tokens=8))
    layers = [module for module in packed.modules() if isinstance(module, PackedLinear)]
    assert len(layers) == sum(isinstance(m, torch.nn.Linear) or "Conv1D" in str(type(m)) for m in dense.modules()) - 1
    for layer in layers:
        held = sum(tensor.nbytes for tensor in (*layer.buffers(), *layer.parameters()))
        assert held < layer.in_features * layer.out_features * 2
        assert not hasattr(layer, "weight")
    packed.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()
    with torch.no_grad():
        assert torch.equal(again(ids()).logits, packed(ids()).logits)


def test_gradients_go_through_packed_weights_without_keeping_dense_ones(tmp_path: Path) -> None:
    path = compressed("llama_tied_gqa", tmp_path)
    packed, dense = AutoModelForCausalLM.from_pretrained(path).eval(), load_model(path)
    for parameter in packed.parameters():
        parameter.requires_grad_(False)
    shapes = {(m.out_features, m.in_features) for m in packed.modules() if isinstance(m, PackedLinear)}
    kept: list[tuple[int, ...]] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    gradients = []
    for model in (packed, dense):
        embeds = model.get_input_embeddings()(ids()).detach().requires_grad_(True)
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model(inputs_embeds=embeds, labels=ids()).loss
        assert bool(shapes & {shape[-2:] for shape in kept}) == (model is dense), "dense layers show that this is seen"
        loss.backward()
        gradients.append(embeds.grad)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-7)


def stored_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize(
    "settings",
    [{"sparsity": "2:4"}, pytest.param({"sparsity": 0.5, "bits": 3, "symmetric": False}, marks=pytest.mark.slow)],
)
def test_a_llama_on_interpreted_kernels_is_its_dense_twin(settings: dict[str, Any], tmp_path: Path) -> None:
    path = compressed("llama_tied_gqa", tmp_path, **settings)
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("interpreted_llama.py")), str(path), str(tmp_path / "again")],
        capture_output=True, text=True, check=False, env={**os.environ, "TRITON_INTERPRET": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert all(error < 1e-5 for error in found["torch.float32"]), found
    assert all(error < 1e-3 for error in found["torch.float16"]), found
    assert found["converted"]
    assert found["stored parts held"] == 0, "nothing is in memory twice"
    assert found["restored bytes"]
    before, after = stored_tensors(path), stored_tensors(tmp_path / "again")
    assert before.keys() - after.keys() <= {"lm_head.weight"}
    for name, tensor in after.items():
        if name.rpartition(".")[2] in ("codes", "mask", "scales", "zeros"):
            assert torch.equal(tensor, before[name]), name


@pytest.mark.skipif("avx2" not in cpu_features(), reason="PyTorch's int4 product is taken on processors with AVX2")
def test_dense_codes_are_multiplied_as_they_are_packed_and_saved_as_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch.packed, "available", lambda: False)  # without a compiler
    path = compressed("llama_tied_gqa", tmp_path, sparsity=None)
    packed = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
    layers = {name: m for name, m in packed.named_modules() if isinstance(m, PackedLinear)}
    held = {name: sum(tensor.nbytes for tensor in layer.buffers()) for name, layer in layers.items()}
    dense = load_model(path, dtype=torch.float32)
    one = ids()[:1, :5]
    with torch.no_grad():
        logits, wanted = packed(one).logits.float(), dense(one).logits
        # bfloat16 everywhere, two blocks one after the other
        assert (logits - wanted).norm() < 2e-2 * wanted.norm()
    converted = {name for name, layer in layers.items() if layer.codes is None}
    assert converted == {name for name, layer in layers.items() if layer.out_features % 64 == 0}
    for name in converted:
        grid_bytes = layers[name].scales.nbytes * 2
        assert sum(tensor.nbytes for tensor in layers[name].buffers()) == held[name] + grid_bytes
    packed.to("cpu", torch.float32)  # the scales of a model that changes its type belong to its weights, and stay
    assert all(layer.codes is not None and layer.scales.dtype == torch.float16 for layer in layers.values())
    with torch.no_grad():
        # embeddings and norms stay rounded to bfloat16
        assert (packed(one).logits - wanted).norm() < 1e-2 * wanted.norm()
        packed.to(torch.bfloat16)(one)
    assert layers[next(iter(converted))].codes is None
    twin = copy.deepcopy(packed)
    other = {name: tensor.clone() for name, tensor in packed.state_dict().items()}
    name = next(name for name in other if name.endswith("up_proj.codes"))
    other[name] = 255 - other[name]
    with torch.no_grad():
        changed = packed(one).logits  # in PyTorch's form again
        assert torch.equal(twin(one).logits, changed)
        packed.load_state_dict(other, assign=True)
        assert not torch.equal(packed(one).logits, changed)
        assert torch.equal(twin(one).logits, changed), "a copy has weights of its own"
    packed = twin
    packed.save_pretrained(tmp_path / "again")
    before, after = stored_tensors(path), stored_tensors(tmp_path / "again")
    assert all(
        torch.equal(after[f"{name}.{part}"], before[f"{name}.{part}"])
        for name in layers
        for part in ("codes", "scales")
    )


@pytest.mark.skipif(not dispatch.packed.available(), reason="there is no AVX2, or no C++ compiler")
@pytest.mark.parametrize("act_order", ["none", "column"])
def test_pruned_layers_decode_in_registers_and_with_8_bits_where_told(
    act_order: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = compressed("llama_tied_gqa", tmp_path, sparsity=0.5, act_order=act_order)
    wanted, one = load_model(path, dtype=torch.float32), ids()[:1, :5]
    ways = []
    monkeypatch.setenv("CTP_DENSE_CODES", "0")
    monkeypatch.setattr(dispatch, "_multiplied", noted(dispatch._multiplied, ways))
    errors = []
    for told in ("0", "1"):
        monkeypatch.setenv("CTP_INT8_ACTIVATIONS", told)
        packed = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        with torch.no_grad():
            logits = wanted(one).logits
            errors.append(float((packed(one).logits - logits).norm() / logits.norm()))
        packed.save_pretrained(tmp_path / told)
        after, before = stored_tensors(tmp_path / told), stored_tensors(path)
        assert all(torch.equal(tensor, before[name]) for name, tensor in after.items() if name.endswith("codes"))
        assert set(ways) == {"packed int8" if told == "1" else "packed"}
        ways.clear()
    assert errors[0] < 1e-5 < 1e-3 < errors[1] < 5e-2


@pytest.mark.parametrize(("sparsity", "act_order"), [(0.5, "none"), (0.5, "column"), ("2:4", "none")])
def test_pruned_layers_multiply_as_dense_codes_where_told_and_are_saved_as_they_were(
    sparsity: float | str, act_order: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = compressed("llama_tied_gqa", tmp_path, sparsity=sparsity, act_order=act_order)
    wanted, one = load_model(path, dtype=torch.float32), ids()[:1, :5]
    monkeypatch.setenv("CTP_DENSE_CODES", "1")
    packed = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = wanted(one).logits
        assert float((packed(one).logits - logits).norm() / logits.norm()) < 1e-5
    layer = packed.model.layers[0].mlp.up_proj
    if dispatch.packed.available():
        assert layer.mask is None and layer.codes is None
    packed.save_pretrained(tmp_path / "again")
    after, before = stored_tensors(tmp_path / "again"), stored_tensors(path)
    parts = {name for name in before if name.endswith(("codes", "mask", "scales", "g_idx"))}
    assert parts and parts <= after.keys()
    assert all(torch.equal(after[name], before[name]) for name in parts)


def noted(product: Any, ways: list[str]) -> Any:
    def noting(x: torch.Tensor, weight: dispatch.Weight) -> torch.Tensor:
        ways.append(weight.explain(x.dtype, x.shape[:-1].numel()).way)
        return product(x, weight)  # type: ignore[no-any-return]

    return noting


def test_a_layer_whose_parts_lie_is_named(tmp_path: Path) -> None:
    path = compressed("llama_tied_gqa", tmp_path)
    file = path / "ctp-00002-of-00003.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.mlp.up_proj.mask"][3] = 255
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.up_proj: .* do not go together"):
        AutoModelForCausalLM.from_pretrained(path)


@pytest.mark.parametrize(
    ("part", "change", "said"),
    [
        ("scales", lambda stored: {"scales": stored.float()}, "is stored as F32, format ctp has F16"),
        ("codes", lambda stored: {}, "are no whole layer"),
        ("scales", lambda stored: {"scales": stored, "zeros": stored.byte()}, "are no whole layer"),
    ],
)
def test_a_layer_that_is_stored_otherwise_is_named(
    part: str, change: Callable[[torch.Tensor], dict[str, torch.Tensor]], said: str, tmp_path: Path
) -> None:
    """It used to be left out, and its weights were random."""
    path, layer = compressed("llama_tied_gqa", tmp_path), "model.layers.0.mlp.up_proj"
    file = path / "ctp-00002-of-00003.safetensors"
    tensors = load_file(file)
    stored = tensors.pop(f"{layer}.{part}")
    tensors |= {f"{layer}.{name}": tensor for name, tensor in change(stored).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"up_proj.*{said}"):
        AutoModelForCausalLM.from_pretrained(path)


def test_the_model_without_its_head_is_loaded_too(tmp_path: Path) -> None:
    path = compressed("llama_tied_gqa", tmp_path)
    with torch.no_grad():
        hidden = AutoModel.from_pretrained(path).eval()(ids()).last_hidden_state
        wanted = AutoModelForCausalLM.from_pretrained(path).eval().base_model(ids()).last_hidden_state
    assert torch.equal(hidden, wanted)


def test_a_packed_model_can_be_pickled_after_its_first_product(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(compressed("llama_tied_gqa", tmp_path)).eval()
    with torch.no_grad():
        logits = model(ids()).logits
        torch.save(model, tmp_path / "model.pt")
        again = torch.load(tmp_path / "model.pt", weights_only=False)  # our own, of a line before
        assert torch.equal(again(ids()).logits, logits)


def test_packed_layers_of_other_shapes_than_the_model_s_are_refused(tmp_path: Path) -> None:
    path = compressed("llama_tied_gqa", tmp_path)
    file, layers = path / "ctp-00002-of-00003.safetensors", "model.layers.0.mlp"
    tensors = load_file(file)
    for name in list(tensors):  # 128 x 64 and 64 x 128
        if name.startswith(f"{layers}.up_proj."):
            other = name.replace("up_proj", "down_proj")
            tensors[name], tensors[other] = tensors[other], tensors[name]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"(up|down)_proj has (64|128) outputs, in its config\.json (64|128)"):
        load_model(path, packed=True)


def test_without_the_import_transformers_refuses_instead_of_reading_wrong_weights(tmp_path: Path) -> None:
    path = compressed("llama_tied_gqa", tmp_path)
    code = "import sys, transformers; transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "OSError" in done.stderr
    assert "model.safetensors" in done.stderr
