"""The blocked float32 solver against the published algorithm in float64 (solver_reference.py)."""

import numpy as np
import pytest
import torch
from solver_reference import Reference, correlated_problem, output_error, solve_reference

from ctp_cli.compression.grid import GridRule
from ctp_cli.compression.masks import MaskRule
from ctp_cli.compression.solver import Solution, SolverRule, solve

# A float32 sum may fall on the other side of a rounding boundary; that code then shifts the corrections of the row's
# later inputs a little. Well under 1% of codes differ in practice, and a wrong algorithm changes a third of them.
SAME_SHARE = 0.985


def assert_same_solution(ours: Solution, reference: Reference, W: torch.Tensor, x: torch.Tensor) -> None:
    if ours.codes is not None:
        assert np.mean(ours.codes.codes_OI.numpy() == reference.codes) > SAME_SHARE
    if ours.keep_OI is not None:
        assert np.mean(ours.keep_OI.numpy() == reference.keep) > SAME_SHARE
    expected = output_error(x, W, torch.from_numpy(reference.weight))
    assert output_error(x, W, ours.weight_OI) == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [None, 32])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_takes_the_same_codes_as_the_published_algorithm(bits: int, group: int | None, symmetric: bool) -> None:
    W, H, x = correlated_problem(12, 160)  # 160 inputs: one block of 128 and a shorter one
    rule = SolverRule(None, GridRule(bits, group, symmetric, mse_clip=False))
    (ours,) = solve([W], H, rule, layer="layer")
    reference = solve_reference(W.numpy(), H.numpy(), bits=bits, group=group, symmetric=symmetric)
    assert_same_solution(ours, reference, W, x)
    assert ours.keep_OI is None


@pytest.mark.parametrize("sparsity", [0.5, 0.75, "2:4", "4:8"])
def test_sparsegpt_prunes_the_same_weights_and_leaves_the_same_values(sparsity: float | str) -> None:
    W, H, x = correlated_problem(12, 160)
    mask = MaskRule.parse(sparsity)
    (ours,) = solve([W], H, SolverRule(mask, None), layer="layer")
    n_of_m = (mask.n, mask.m) if mask.m else None
    reference = solve_reference(W.numpy(), H.numpy(), fraction=mask.fraction, n_of_m=n_of_m)
    assert_same_solution(ours, reference, W, x)
    assert ours.codes is None
    agree = torch.from_numpy(np.array(ours.keep_OI.numpy() == reference.keep).all(axis=1))  # rows without a tie
    assert agree.float().mean() > 0.9
    # corrections add up over 160 inputs, so float32 keeps about four digits
    torch.testing.assert_close(
        ours.weight_OI[agree], torch.from_numpy(reference.weight).float()[agree], rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("sparsity", [0.5, "2:4"])
def test_the_joint_form_prunes_and_rounds_as_one_published_pass(
    sparsity: float | str, bits: int, symmetric: bool
) -> None:
    W, H, x = correlated_problem(12, 160, seed=1)
    mask = MaskRule.parse(sparsity)
    (ours,) = solve([W], H, SolverRule(mask, GridRule(bits, 32, symmetric, mse_clip=False)), layer="layer")
    n_of_m = (mask.n, mask.m) if mask.m else None
    reference = solve_reference(
        W.numpy(), H.numpy(), bits=bits, group=32, symmetric=symmetric, fraction=mask.fraction, n_of_m=n_of_m
    )
    assert_same_solution(ours, reference, W, x)


def test_more_dampening_is_the_reference_with_more_dampening() -> None:
    W, H, x = correlated_problem(8, 64)
    solutions = {}
    for dampening in (0.01, 0.5):
        rule = SolverRule(None, GridRule(3, 32, True, mse_clip=False), dampening=dampening)
        (solutions[dampening],) = solve([W], H, rule, layer="layer")
        reference = solve_reference(W.numpy(), H.numpy(), bits=3, group=32, dampening=dampening)
        assert_same_solution(solutions[dampening], reference, W, x)
        assert solutions[dampening].dampening == dampening
    assert not torch.equal(solutions[0.01].weight_OI, solutions[0.5].weight_OI)


@pytest.mark.parametrize("reach", ["within a block", "into the next block"])
def test_a_groups_scale_is_fitted_on_weights_that_carry_the_corrections(reach: str) -> None:
    """Input j's twin stands `distance` later. One outlier makes group 0's grid so coarse that its other weights round
    to zero, and their twins take over: 0.5 + 0.5 = 1. A scale from the stale weights would be half as large."""
    distance = 32 if reach == "within a block" else 128
    H = torch.eye(2 * distance)
    twins = torch.arange(1, 32)
    H[twins, twins + distance] = H[twins + distance, twins] = 1.0
    W = torch.zeros(1, 2 * distance)
    W[0, 0] = 10.0
    W[0, twins], W[0, twins + distance] = 0.5, 0.5
    rule = SolverRule(None, GridRule(4, 32, True, mse_clip=False), dampening=1e-4)
    (solution,) = solve([W], H, rule, layer="layer")
    scale = solution.codes.scales_OG[0, distance // 32].item()
    # the dampening takes 1e-4 off the correction, float16 about 5e-4 off the scale
    assert scale == pytest.approx(2 * 1.0 / 15, rel=2e-3)
    assert solution.codes.scales_OG[0, 0].item() == pytest.approx(2 * 10 / 15, rel=2e-3)


@pytest.mark.parametrize("act_order", ["none", "column", "group"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_error_feedback_beats_rounding_on_correlated_inputs(bits: int, act_order: str) -> None:
    W, H, x = correlated_problem(32, 128)
    grid = GridRule(bits, 32, True, mse_clip=True)
    (fed_back,) = solve([W], H, SolverRule(None, grid, act_order=act_order), layer="layer")
    (rounded,) = solve([W], None, SolverRule(None, grid, quantizer="rtn"), layer="layer")
    assert output_error(x, W, fed_back.weight_OI) < 0.8 * output_error(x, W, rounded.weight_OI)


def test_sparsegpt_beats_magnitude_and_wanda_on_correlated_inputs() -> None:
    W, H, x = correlated_problem(32, 128)
    error = {}
    for pruner in ("sparsegpt", "wanda", "magnitude"):
        (solution,) = solve([W], H, SolverRule(MaskRule(0.5), None, pruner=pruner), layer="layer")
        error[pruner] = output_error(x, W, solution.weight_OI)
    assert error["sparsegpt"] < 0.8 * error["wanda"] < 0.8 * error["magnitude"]


@pytest.mark.parametrize("act_order", ["none", "column", "group"])
@pytest.mark.parametrize("mask", [None, MaskRule(0.5)])
def test_layers_that_share_inputs_come_out_as_if_solved_alone(mask: MaskRule | None, act_order: str) -> None:
    H = correlated_problem(1, 96)[1]
    weights = [correlated_problem(outputs, 96, seed=outputs)[0] for outputs in (8, 24, 16)]
    rule = SolverRule(mask, GridRule(4, 32, False, mse_clip=True), act_order=act_order)
    together = solve(weights, H, rule, layer="layer")
    for weight, shared in zip(weights, together, strict=True):
        (alone,) = solve([weight], H, rule, layer="layer")
        assert shared.weight_OI.shape == weight.shape
        # matrix products of other widths may sum in another order; an odd code may round the other way
        assert (shared.codes.codes_OI == alone.codes.codes_OI).float().mean() > SAME_SHARE
        assert torch.equal(shared.codes.g_idx_I, alone.codes.g_idx_I)
        if mask is not None:
            assert torch.equal(shared.keep_OI.sum(), alone.keep_OI.sum())
