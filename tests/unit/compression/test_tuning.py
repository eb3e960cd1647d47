"""Tuning scales and norms: the loss against plain logits, what it stores, and that it helps on other text."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import VOCAB_SIZE, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM

from ctp_cli.compression import tuning
from ctp_cli.compression.tuning import tune
from ctp_cli.data.sources import load_text
from ctp_cli.data.windows import token_ids, windows
from ctp_cli.errors import SolverError
from ctp_cli.models.blocks import find_blocks
from ctp_cli.models.head import Scorer
from ctp_cli.models.loading import load_model, load_tokenizer
from ctp_cli.models.resolve import resolve_model
from ctp_cli.recipe import CompressSection
from ctp_cli.stages.compress import compress


def stored_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def divergence(folder: Path, other: Path, ids_NT: torch.Tensor) -> float:
    with torch.no_grad():
        theirs = load_model(folder, device="cpu")(ids_NT).logits.float().log_softmax(-1)
        ours = load_model(other, device="cpu")(ids_NT).logits.float().log_softmax(-1)
    return nn.functional.kl_div(ours, theirs, log_target=True, reduction="none").sum(-1).mean().item()


@pytest.mark.parametrize("family", ["llama", "phi", "gemma3", "gpt2"])
def test_divergence_and_its_gradient_are_those_of_whole_logits(family: str, tmp_path: Path) -> None:
    """Phi's head has a bias; Gemma caps its logits in some versions and scales embeddings in all."""
    folder = tiny_model(family, tmp_path / family)
    model, full = (AutoModelForCausalLM.from_pretrained(folder).eval() for _ in range(2))
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    ids = torch.randint(3, VOCAB_SIZE, (2, 300), generator=torch.Generator().manual_seed(0))  # more than one chunk
    vectors = [p for n, p in model.named_parameters() if p.dim() == 1 and "head" not in n]
    head = model.get_output_embeddings()
    if head.bias is not None:
        head.bias.data.copy_(full.get_output_embeddings().bias.data)
    weight = torch.rand(ids.shape)
    ours = Scorer(model).divergence(Scorer(full), ids)
    gradients = torch.autograd.grad((ours * weight).sum(), vectors)
    wanted = full(ids).logits.log_softmax(-1).detach()
    plain = nn.functional.kl_div(model(ids).logits.log_softmax(-1), wanted, log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-5)
    assert plain.mean() > 1e-4
    for one, other in zip(gradients, torch.autograd.grad((plain * weight).sum(), vectors), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-4 * other.abs().max().item())


@pytest.mark.parametrize(
    "settings",
    [
        {"sparsity": 0.5, "bits": 3},
        {"sparsity": 0.5, "bits": 3, "tune": "scales"},
        {"bits": 2, "symmetric": False},
        {"sparsity": "2:4"},
    ],
    ids=str,
)
def test_a_tuned_checkpoint_keeps_its_zeros_and_predicts_better(
    trained: Path, tmp_path: Path, settings: dict[str, object]
) -> None:
    """Divergence on text of another part than that of calibration and tuning."""
    model = resolve_model(str(trained))
    for name, count in (("plain", 0), ("tuned", 48)):
        section = CompressSection(calibration="pydoc:train", windows=16, seqlen=128, tune_windows=count, **settings)
        compress(section, model=model, output=tmp_path / name)
    held_out = load_text("pydoc:test", default_part="test")
    ids_NT = windows(token_ids(held_out, load_tokenizer(trained)), 128, most=32, text=held_out)
    before, after = (divergence(trained, tmp_path / name, ids_NT) for name in ("plain", "tuned"))
    assert after < 0.9 * before
    plain, tuned = stored_tensors(tmp_path / "plain"), stored_tensors(tmp_path / "tuned")
    assert plain.keys() == tuned.keys()
    changed = {name.rpartition(".")[2] for name in plain if not torch.equal(plain[name], tuned[name])}
    twice = settings == {"sparsity": 0.5, "bits": 3}  # pruned, tuned and only then quantized: other masks and codes
    assert changed == {"weight", *(["scales"] if "bits" in settings else []), *(["codes", "mask"] if twice else [])}
    for name in plain:
        assert "embed" not in name or torch.equal(plain[name], tuned[name])
        if plain[name].dim() == 2 and not twice:
            assert torch.equal(plain[name] == 0, tuned[name] == 0), name
    if "sparsity" in settings:
        for block in find_blocks(load_model(tmp_path / "tuned", device="cpu")):
            for layer in block.layers:
                assert (layer.weight_OI == 0).float().mean() >= 0.5


@pytest.mark.parametrize("family", ["gpt2", "opt350"])
def test_transposed_layers_are_scaled_by_groups_of_their_inputs(family: str, tmp_path: Path) -> None:
    folder = tiny_model(family, tmp_path / family)
    model, full = (AutoModelForCausalLM.from_pretrained(folder).eval() for _ in range(2))
    blocks = find_blocks(model)
    before = {layer.name: layer.weight_OI.clone() for block in blocks for layer in block.layers}
    for block in blocks:
        for layer in block.layers:
            layer.set_weight(layer.weight_OI + 0.02 * torch.randn_like(layer.weight_OI))
            before[layer.name] = layer.weight_OI.clone()
    ids = torch.randint(3, VOCAB_SIZE, (12, 24), generator=torch.Generator().manual_seed(0))
    tuned = tune(model, full, blocks, ids, what="scales", group_size=32, learning_rate=1e-2)
    for block in find_blocks(model):
        for layer in block.layers:
            factors_OI = tuned.factors_OG[layer.name].repeat_interleave(32, dim=1)
            assert factors_OI.std() > 1e-3
            assert torch.equal(layer.weight_OI, before[layer.name] * factors_OI)


def test_parts_of_a_window_begin_with_its_bos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_model("llama", tmp_path / "llama", max_position_embeddings=1024)
    model, full = (AutoModelForCausalLM.from_pretrained(folder).eval() for _ in range(2))
    ids = torch.randint(3, VOCAB_SIZE, (2, 1024), generator=torch.Generator().manual_seed(0))
    ids[:, 0] = 1
    seen: list[torch.Tensor] = []
    monkeypatch.setattr(tuning, "_descend", lambda scorer, full, ids_NT, *_: seen.append(ids_NT) or [1.0])
    for bos in (False, True):
        tune(model, full, find_blocks(model), ids, what="scales", learning_rate=1e-2, bos=bos)
    assert torch.equal(seen[0], ids.view(4, 512))
    assert torch.equal(seen[1][::2], ids[:, :512])
    assert (seen[1][:, 0] == 1).all() and torch.equal(seen[1][1::2, 1:], ids[:, 512:1023])


def test_a_model_in_float16_learns_where_the_two_hardly_differ(tmp_path: Path) -> None:
    """What its gradients are then would round to zero."""
    folder = tiny_model("llama", tmp_path / "llama", initializer_range=0.1)
    ids = torch.randint(3, VOCAB_SIZE, (1, 512), generator=torch.Generator().manual_seed(0))
    changes = {}
    for dtype in (torch.float16, torch.float32):
        model, full = (AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval() for _ in range(2))
        generator = torch.Generator().manual_seed(1)
        for block in find_blocks(model):
            for layer in block.layers:
                noise_OI = torch.randn(layer.weight_OI.shape, generator=generator)
                layer.set_weight((layer.weight_OI.float() * (1 + 0.001 * noise_OI)).to(dtype))
        tuned = tune(model, full, find_blocks(model), ids, what="scales", group_size=32, learning_rate=1e-3)
        assert tuned.first_divergence < 1e-5
        changes[dtype] = torch.cat(
            [factors.flatten() - 1 for name, factors in tuned.factors_OG.items() if "q_proj" in name]
        )
    # the first step of AdamW is the gradient's sign
    agree = changes[torch.float16].sign() == changes[torch.float32].sign()
    assert agree.float().mean() > 0.7


def test_a_learning_rate_that_blows_up_is_reported(tmp_path: Path) -> None:
    folder = tiny_model("llama", tmp_path / "llama")
    model, full = (AutoModelForCausalLM.from_pretrained(folder).eval() for _ in range(2))
    for block in find_blocks(model):
        for layer in block.layers:
            layer.set_weight(layer.weight_OI * 1.1)
    ids = torch.randint(3, VOCAB_SIZE, (12, 24))
    with pytest.raises(SolverError, match="tuning: the divergence"):
        tune(model, full, find_blocks(model), ids, what="scales", group_size=32, learning_rate=1e30)
