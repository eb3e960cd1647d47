"""Gradient checkpointing: the same loss and gradient from the activations of one block at a time."""

import functools
from pathlib import Path

import pytest
import torch
from ctp_kernels.arithmetic import fast_arithmetic
from tiny_models import tiny_model
from torch import Tensor

from ctp_cli.models import head
from ctp_cli.models.loading import load_model
from ctp_cli.models.sharding import Frozen
from ctp_cli.prompts import checkpointing
from ctp_cli.prompts.checkpointing import checkpoint_blocks
from ctp_cli.prompts.losses import KvPrefixLoss, PromptedLoss, SoftPromptLoss
from ctp_cli.prompts.prefix import rows_prefix


def fast_arithmetic_of(device: torch.device, _: torch.device, *, behind_prefix: bool = False) -> object:
    return fast_arithmetic(device, behind_prefix=behind_prefix)


def start_of(method: type[PromptedLoss], rows_PD: Tensor, path: Path) -> Tensor:
    if method is SoftPromptLoss:
        return rows_PD
    cache = rows_prefix(rows_PD, load_model(path))
    return torch.stack([torch.stack([layer.keys[0], layer.values[0]]) for layer in cache.layers])


def loss_gradient_and_kept(module: PromptedLoss, ids: Tensor) -> tuple[Tensor, Tensor | None, int]:
    kept = 0

    def keep(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = module(ids, 0, None)
    loss.backward()
    return loss.detach(), module.prompt.grad, kept


@pytest.mark.parametrize("method", [SoftPromptLoss, KvPrefixLoss])
@pytest.mark.parametrize("family", ["llama_tied_gqa", "opt350", "gpt2", "gpt_neox", "bloom", "gemma", "mistral", "phi"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_loss_and_gradient_are_the_same_and_less_is_kept(
    family: str, method: type[PromptedLoss], device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device == "cuda":  # the ways of GPUs, taken here
        for module in (head, checkpointing):
            monkeypatch.setattr(module, "fast_arithmetic", functools.partial(fast_arithmetic_of, torch.device("cuda")))
        monkeypatch.setattr(SoftPromptLoss, "_behind_prefix", SoftPromptLoss._in_front)
    path = tiny_model(family, tmp_path / family)
    ids = torch.randint(5, 300, (2, 40), generator=torch.Generator().manual_seed(0))
    width = load_model(path).get_input_embeddings().weight.shape[1]
    start = start_of(method, torch.randn(6, width, generator=torch.Generator().manual_seed(1)), path)
    plain, checkpointed = load_model(path), load_model(path)
    checkpoint_blocks(checkpointed)
    loss, gradient, kept = loss_gradient_and_kept(method([Frozen(plain)], start), ids)
    again, gradient_again, kept_again = loss_gradient_and_kept(method([Frozen(checkpointed)], start), ids)
    assert torch.equal(again, loss)
    torch.testing.assert_close(gradient_again, gradient, rtol=1e-6, atol=1e-9)
    assert gradient is not None
    assert gradient.abs().max() > 0
    assert kept_again < kept / 2


def test_nothing_changes_without_gradients(tmp_path: Path) -> None:
    path = tiny_model("llama_tied_gqa", tmp_path / "m")
    plain, checkpointed = load_model(path), load_model(path)
    checkpoint_blocks(checkpointed)
    ids = torch.randint(5, 300, (1, 12), generator=torch.Generator().manual_seed(0))
    assert torch.equal(checkpointed.generate(ids, max_new_tokens=6), plain.generate(ids, max_new_tokens=6))
