"""Pruning and quantizing in one pass: what must hold exactly, whatever the numbers are."""

from dataclasses import replace

import pytest
import torch
from solver_reference import correlated_problem, output_error

from ctp_cli.compression.grid import GridRule
from ctp_cli.compression.masks import MaskRule
from ctp_cli.compression.solver import Solution, SolverRule, solve

INPUTS = 160  # a mask block of 128 inputs and one of 32
OUTPUTS = 24


def joint(
    sparsity: float | str, bits: int | None, symmetric: bool = True, *, inputs: int = INPUTS, **rule: object
) -> tuple[Solution, torch.Tensor]:
    W, H, _ = correlated_problem(OUTPUTS, inputs)
    grid = None if bits is None else GridRule(bits, 32, symmetric, mse_clip=True)
    (solution,) = solve([W], H, SolverRule(MaskRule.parse(sparsity), grid, **rule), layer="layer")  # type: ignore[arg-type]
    return solution, W


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("fraction", [0.3, 0.5, 0.71])
def test_a_fraction_is_pruned_exactly_and_stays_zero_once_quantized(
    fraction: float, bits: int, symmetric: bool
) -> None:
    solution, _ = joint(fraction, bits, symmetric)
    expected = sum(round(fraction * OUTPUTS * columns) for columns in (128, 32))
    assert int((~solution.keep_OI).sum()) == expected
    assert torch.equal(solution.weight_OI[~solution.keep_OI], torch.zeros(expected))
    assert int((solution.weight_OI == 0).sum()) >= expected  # a kept weight may round to zero as well
    # what a checkpoint stores gives the same zeros: the code of a pruned weight is the zero point
    stored = solution.codes
    zeros = stored.zeros_OG[:, stored.g_idx_I.long()]
    assert torch.equal(stored.codes_OI[~solution.keep_OI], zeros[~solution.keep_OI])


@pytest.mark.parametrize("act_order", ["none", "group"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [None, 2, 3, 4, 8])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (8, 16)])
def test_every_run_of_m_inputs_keeps_n_in_the_layers_own_order(
    n: int, m: int, bits: int | None, symmetric: bool, act_order: str
) -> None:
    solution, _ = joint(f"{n}:{m}", bits, symmetric, act_order=act_order)
    kept = solution.keep_OI.view(OUTPUTS, INPUTS // m, m).sum(-1)
    assert torch.equal(kept, torch.full_like(kept, n))
    nonzero = (solution.weight_OI != 0).view(OUTPUTS, INPUTS // m, m).sum(-1)
    assert int(nonzero.max()) <= n
    assert torch.equal(solution.weight_OI * solution.keep_OI, solution.weight_OI)


@pytest.mark.parametrize("act_order", ["none", "group"])
@pytest.mark.parametrize(("n", "m", "group"), [(8, 32, 16), (2, 4, 8), (16, 32, 32), (4, 16, None)])
def test_runs_and_groups_of_any_nesting_fit(n: int, m: int, group: int | None, act_order: str) -> None:
    W, H, x = correlated_problem(OUTPUTS, INPUTS)
    rule = SolverRule(MaskRule(n=n, m=m), GridRule(8, group, True, mse_clip=False), act_order=act_order)
    (solution,) = solve([W], H, rule, layer="layer")
    kept = solution.keep_OI.view(OUTPUTS, INPUTS // m, m).sum(-1)
    assert torch.equal(kept, torch.full_like(kept, n))
    natural = torch.arange(INPUTS) // (group or INPUTS)
    assert torch.equal(solution.codes.g_idx_I.long(), natural)
    # 8 bits cost next to nothing beside the pruning; groups change the order of inputs, and so the luck, a little
    (pruned,) = solve([W], H, SolverRule(MaskRule(n=n, m=m), None, act_order=act_order), layer="layer")
    assert output_error(x, W, solution.weight_OI) < 1.5 * output_error(x, W, pruned.weight_OI)


def test_kept_weights_make_up_for_pruned_ones_across_blocks() -> None:
    """Input 128 is the only weight of the second block and a twin of the pruned input 0 of the first."""
    H = torch.eye(160)
    H[0, 128] = H[128, 0] = 1.0
    W = torch.full((1, 160), 3.0)
    W[0, 0] = 0.1  # by far the smallest loss
    W[0, 129:] = 0.0
    (solution,) = solve([W], H, SolverRule(MaskRule(fraction=1 / 160), None, dampening=1e-4), layer="layer")
    assert solution.weight_OI[0, 0] == 0
    assert solution.weight_OI[0, 128].item() == pytest.approx(3.1, abs=1e-3)  # dampening takes 1e-4 of 0.1


def test_quantizing_with_the_mask_beats_quantizing_after_it() -> None:
    """The joint pass corrects rounding errors with weights that may move; a second pass over a fixed mask rounds."""
    W, H, x = correlated_problem(OUTPUTS, INPUTS)
    mask, grid = MaskRule(0.5), GridRule(3, 32, True, mse_clip=True)
    (one_pass,) = solve([W], H, SolverRule(mask, grid), layer="layer")
    (rounded_after,) = solve([W], H, SolverRule(mask, grid, quantizer="rtn"), layer="layer")
    assert output_error(x, W, one_pass.weight_OI) < output_error(x, W, rounded_after.weight_OI)


@pytest.mark.parametrize("bits", [None, 4])
def test_weights_are_not_changed_by_the_solver(bits: int | None) -> None:
    W, H, _ = correlated_problem(8, 64)
    before_W, before_H = W.clone(), H.clone()
    grid = None if bits is None else GridRule(bits, 32, True, mse_clip=True)
    solve([W], H, SolverRule(MaskRule(0.5), grid, act_order="group"), layer="layer")
    assert torch.equal(W, before_W)
    assert torch.equal(H, before_H)


def test_an_input_that_never_fires_costs_nothing_and_breaks_nothing() -> None:
    W, H, x = correlated_problem(OUTPUTS, 64)
    dead = torch.tensor([3, 40])
    H[dead], H[:, dead], x[:, dead] = 0.0, 0.0, 0.0
    (solution,) = solve([W], H, SolverRule(MaskRule(0.5), GridRule(4, 32, True, mse_clip=True)), layer="layer")
    assert torch.isfinite(solution.weight_OI).all()
    # pruning what is never used costs only its share of the dampening, so it goes first
    assert solution.keep_OI[:, dead].float().mean() < 0.1
    assert output_error(x, W, solution.weight_OI) < 0.5


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("act_order", ["none", "group", "column", "static"])
@pytest.mark.parametrize("pruner", [None, "sparsegpt", "alternating"])
def test_refined_codes_lose_less_and_keep_what_is_pruned(bits: int, act_order: str, pruner: str | None) -> None:
    generator = torch.Generator().manual_seed(bits)
    x_TI = torch.randn(600, 64, generator=generator) @ torch.randn(64, 64, generator=generator)
    H, W = x_TI.T @ x_TI / 600, torch.randn(48, 64, generator=generator)
    rule = SolverRule(
        None if pruner is None else MaskRule(0.5),
        GridRule(bits, 16, False, mse_clip=True),
        pruner=pruner or "sparsegpt",
        act_order=act_order,
    )
    plain, refined = (solve([W], H, replace(rule, refine=sweeps), layer="fc1")[0] for sweeps in (0, 3))
    errors = [float((((W - s.weight_OI) @ H) * (W - s.weight_OI)).sum()) for s in (plain, refined)]
    assert errors[1] < errors[0]
    assert refined.codes is not None and torch.equal(refined.weight_OI, refined.codes.values())
    if refined.keep_OI is not None:
        assert torch.equal(plain.keep_OI, refined.keep_OI)
        assert not refined.weight_OI[~refined.keep_OI].any()
