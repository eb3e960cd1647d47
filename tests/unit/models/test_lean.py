"""Norms and gated MLPs that keep less compute the same; what only looks like one is left alone."""

import copy
import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_model
from torch import Tensor, nn
from transformers import Phi3Config, Phi3ForCausalLM

from ctp_cli.models.lean import _Leaner, keep_less
from ctp_cli.models.loading import load_model


def ways(model: Any) -> set[str]:
    """What the model's modules came to."""
    return {module.forward.way.__name__ for module in model.modules() if isinstance(module.forward, _Leaner)}


def loss_gradient_and_kept(model: Any, embeds: Tensor) -> tuple[Tensor, Tensor, int]:
    sizes: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        if not isinstance(x, nn.Parameter):
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    embeds = embeds.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        hidden = model.base_model(inputs_embeds=embeds, use_cache=False).last_hidden_state
    loss = (hidden * torch.linspace(-1, 1, hidden.shape[-1], dtype=hidden.dtype)).float().square().mean()
    kept = sum(sizes.values())
    loss.backward()
    assert embeds.grad is not None
    return loss.detach(), embeds.grad, kept


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("llama_tied_gqa", {"_norm", "_mlp"}),
        ("mistral", {"_norm", "_mlp"}),
        ("qwen2", {"_norm", "_mlp"}),
        ("gemma", {"_other_norm", "_mlp"}),
        ("gpt_neox", set()),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_families(family: str, expected: set[str], dtype: torch.dtype, tmp_path: Path) -> None:
    path = tiny_model(family, tmp_path / family)
    plain, lean = (load_model(path, dtype=dtype) for _ in range(2))
    keep_less(lean)
    keep_less(lean)  # a second time changes nothing
    width = plain.get_input_embeddings().weight.shape[1]
    embeds = torch.randn(2, 12, width, generator=torch.Generator().manual_seed(0)).to(dtype)
    wanted, found = loss_gradient_and_kept(plain, embeds), loss_gradient_and_kept(lean, embeds)
    near = 1e-4 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(found[0], wanted[0], rtol=near, atol=0)
    assert float((found[1] - wanted[1]).float().norm()) <= near * float(wanted[1].float().norm())
    assert ways(lean) == expected
    assert found[2] < 0.97 * wanted[2] if expected else found[2] == wanted[2]


class OtherRMSNorm(nn.Module):
    """Looks like one, and is not."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((8,), 0.5), requires_grad=False)
        self.eps = 1e-5

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return self.weight * x * scale


def test_what_only_looks_like_a_norm_computes_what_it_did() -> None:
    module, x = OtherRMSNorm(), torch.randn(3, 8)
    wanted = module(x)
    keep_less(module)
    assert torch.equal(module(x), wanted) and torch.equal(module(x, scale=2.0), 2 * wanted)
    assert ways(module) == {"_other_norm"}


class LimitedMLP(nn.Module):
    """Has the parts of Llama's, and limits what passes."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = (nn.Linear(8, 8) for _ in range(3))
        self.act_fn = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(self.act_fn(self.gate_proj(x).clamp(max=7)) * self.up_proj(x))
        return out


def test_a_gated_mlp_of_another_kind_is_left_alone() -> None:
    module, x = LimitedMLP(), 1000 * torch.randn(3, 8)
    wanted = module(x)
    keep_less(module)
    assert torch.equal(module(x), wanted) and ways(module) == set()


def test_gate_and_up_in_one_layer() -> None:
    config = Phi3Config(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, pad_token_id=0
    )
    plain = Phi3ForCausalLM(config).requires_grad_(False)
    lean = copy.deepcopy(plain)
    keep_less(lean)
    embeds = torch.randn(2, 12, 16, generator=torch.Generator().manual_seed(0))
    wanted, found = loss_gradient_and_kept(plain, embeds), loss_gradient_and_kept(lean, embeds)
    torch.testing.assert_close(found[:2], wanted[:2], rtol=1e-4, atol=1e-7)
    assert ways(lean) == {"_norm", "_joint_mlp"} and found[2] < wanted[2]


def test_a_model_that_nobody_needs_is_gone_at_once(tmp_path: Path) -> None:
    model = load_model(tiny_model("llama_tied_gqa", tmp_path / "m"))
    keep_less(model)
    mlp = weakref.ref(next(module for module in model.modules() if isinstance(module.forward, _Leaner)))
    gc.disable()
    try:
        del model
        assert mlp() is None
    finally:
        gc.enable()


def test_a_norm_that_learns_is_left_alone() -> None:
    module = OtherRMSNorm().requires_grad_()
    keep_less(module)
    module(torch.randn(3, 8)).sum().backward()
    assert module.weight.grad is not None and ways(module) == set()
