"""The alternating pruner: sparsity kept, errors lower with every round, and lower than SparseGPT's."""

import pytest
import torch
from ctp_kernels import descent
from ctp_kernels.descent import Quadratic

from ctp_cli.compression import alternating
from ctp_cli.compression.alternating import prune_by_turns
from ctp_cli.compression.grid import GridRule
from ctp_cli.compression.masks import MaskRule
from ctp_cli.compression.solver import SolverRule, solve


def problem(outputs: int = 64, inputs: int = 96, tokens: int = 2000) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(outputs + inputs)
    mixing = torch.randn(inputs, inputs, generator=generator) * torch.logspace(0, -1, inputs)
    x_TI = torch.randn(tokens, inputs, generator=generator) @ mixing
    return torch.randn(outputs, inputs, generator=generator), x_TI.T @ x_TI / tokens


def damped(H: torch.Tensor, share: float) -> torch.Tensor:
    return H + torch.eye(len(H)) * (share * H.diagonal().mean()).clamp(min=1e-30)


def error(W: torch.Tensor, V: torch.Tensor, H: torch.Tensor) -> float:
    D = (W - V).double()
    return float(((D @ H.double()) * D).sum())


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("sparsity", [0.5, 0.75, "2:4", "8:16"])
def test_every_round_lowers_the_error(sparsity: float | str, compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not compiled:
        monkeypatch.setattr(descent, "_library", lambda: None)
    W, H = problem()
    rule = MaskRule.parse(sparsity)
    errors = []
    for rounds in (1, 2, 3, 8):
        V = prune_by_turns(W, Quadratic(damped(H, 0.01)), rule, rounds=rounds)
        if rule.m:
            assert ((V.view(64, -1, rule.m) != 0).sum(2) == rule.n).all()
        else:
            assert (V == 0).sum() == round(rule.fraction * V.numel())
        errors.append(error(W, V, H))
    assert errors == sorted(errors, reverse=True)
    assert errors[2] < 0.95 * errors[0]
    plain = solve([W], H, SolverRule(rule, None, pruner="sparsegpt", act_order="group"), layer="fc1")[0]
    assert errors[2] < 0.9 * error(W, plain.weight_OI, H)


def test_parts_of_a_large_layer_are_layers_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    W, H = problem()
    quadratic, rule = Quadratic(damped(H, 0.01)), MaskRule.parse(0.5)
    whole = prune_by_turns(W, quadratic, rule, rounds=3)
    alone = [prune_by_turns(part, quadratic, rule, rounds=3) for part in W.split(22)]
    monkeypatch.setattr(alternating, "PART", W.numel() // 2 - 1)
    V = prune_by_turns(W, quadratic, rule, rounds=3)
    assert torch.equal(V, torch.cat(alone)) and not torch.equal(V, whole)
    assert error(W, V, H) < 1.03 * error(W, whole, H)


def test_inputs_that_never_fire_are_pruned_first_and_cost_nothing() -> None:
    W, H = problem()
    dead = torch.arange(0, 96, 3)
    H[dead], H[:, dead] = 0, 0
    V = prune_by_turns(W, Quadratic(damped(H, 0.01)), MaskRule.parse(0.25), rounds=3)
    assert torch.isfinite(V).all()
    # a quarter of the weights is to go, a third of them does nothing
    assert error(W, V, H) < 1e-3 * error(W, torch.zeros_like(W), H)
    still = Quadratic(damped(torch.zeros_like(H), 0.01))
    nothing = prune_by_turns(W, still, MaskRule.parse(0.5), rounds=2)
    assert torch.isfinite(nothing).all()


@pytest.mark.parametrize("sparsity", [0.5, "2:4"])
@pytest.mark.parametrize("quantizer", ["gptq", "rtn"])
def test_quantization_follows_on_the_mask(sparsity: float | str, quantizer: str) -> None:
    W, H = problem()
    grid = GridRule(4, 32, True, mse_clip=True)
    mask = MaskRule.parse(sparsity)
    both, other = solve([W, 2 * W], H, SolverRule(mask, grid, "alternating", 3, quantizer=quantizer), layer="fc1")
    before, after = solve([W], H, SolverRule(mask, grid, "sparsegpt", quantizer=quantizer), layer="fc1")[0], both
    assert both.codes is not None
    assert both.keep_OI is not None
    assert (~both.keep_OI).sum() == both.keep_OI.numel() // 2
    assert not both.weight_OI[~both.keep_OI].any()
    assert error(W, after.weight_OI, H) < error(W, before.weight_OI, H)
    # every layer of a set is pruned for itself
    assert (~other.keep_OI).sum() == other.keep_OI.numel() // 2
