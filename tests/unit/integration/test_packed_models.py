"""Checkpoints of format ctp in transformers: the same model as its dense twin, packed in memory, with gradients."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import VOCAB_SIZE, tiny_model
from transformers import AutoModelForCausalLM

import ctp_cli.integration  # noqa: F401 - registers the format
from ctp_cli.integration.linear import PackedLinear
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


def test_a_layer_whose_parts_lie_is_named(tmp_path: Path) -> None:
    path = compressed("llama_tied_gqa", tmp_path)
    file = path / "ctp-00002-of-00003.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.mlp.up_proj.mask"][3] = 255
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.up_proj: .* do not go together"):
        AutoModelForCausalLM.from_pretrained(path)


def test_without_the_import_transformers_refuses_instead_of_reading_wrong_weights(tmp_path: Path) -> None:
    path = compressed("llama_tied_gqa", tmp_path)
    code = "import sys, transformers; transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "OSError" in done.stderr
    assert "model.safetensors" in done.stderr
