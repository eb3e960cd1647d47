"""Taking inputs in another order changes which errors are made up for, never what a stored number means."""

import numpy as np
import pytest
import torch
from solver_reference import correlated_problem, output_error, solve_reference

from ctp_cli.compression.grid import GridRule
from ctp_cli.compression.masks import MaskRule
from ctp_cli.compression.solver import Codes, SolverRule, solve


def dequantize(codes: Codes) -> np.ndarray:
    """GPTQ's formula, weight by weight."""
    outputs, inputs = codes.codes_OI.shape
    weight = np.zeros((outputs, inputs))
    for o in range(outputs):
        for i in range(inputs):
            g = int(codes.g_idx_I[i])
            weight[o, i] = float(codes.scales_OG[o, g]) * (int(codes.codes_OI[o, i]) - int(codes.zeros_OG[o, g]))
    return weight


@pytest.mark.parametrize("sparsity", [None, 0.5])
@pytest.mark.parametrize("group", [16, 32, None])
@pytest.mark.parametrize("act_order", ["none", "column", "group", "static"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_stored_codes_mean_the_weight_whatever_the_order(
    symmetric: bool, act_order: str, group: int | None, sparsity: float | None
) -> None:
    W, H, x = correlated_problem(8, 96)
    mask = None if sparsity is None else MaskRule(sparsity)
    rule = SolverRule(mask, GridRule(4, group, symmetric, mse_clip=True), act_order=act_order)
    (solution,) = solve([W], H, rule, layer="layer")
    # one float32 multiplication of an integer and a scale
    np.testing.assert_allclose(dequantize(solution.codes), solution.weight_OI.numpy(), rtol=1e-6, atol=0)
    np.testing.assert_allclose(solution.codes.values().numpy(), solution.weight_OI.numpy(), rtol=0, atol=0)
    assert output_error(x, W, solution.weight_OI) < (0.02 if sparsity is None else 0.25)
    counts = torch.bincount(solution.codes.g_idx_I.long())
    assert torch.equal(counts, torch.full_like(counts, group or 96))
    assert torch.equal(solution.codes.scales_OG, solution.codes.scales_OG.half().float())


@pytest.mark.parametrize("quantizer", ["gptq", "rtn"])
@pytest.mark.parametrize("act_order", ["none", "group", "static"])
def test_groups_lie_where_they_lay_unless_columns_are_ordered_freely(act_order: str, quantizer: str) -> None:
    W, H, _ = correlated_problem(8, 96)
    rule = SolverRule(MaskRule(0.5), GridRule(4, 16, True, mse_clip=True), quantizer=quantizer, act_order=act_order)
    (solution,) = solve([W], H, rule, layer="layer")
    assert solution.codes.g_idx_I.tolist() == [i // 16 for i in range(96)]
    assert solution.codes.g_idx_I.dtype == torch.int32


def test_column_order_is_the_published_algorithm_on_inputs_sorted_by_second_moment() -> None:
    W, H, _ = correlated_problem(8, 96)
    order = np.argsort(-np.diag(H.numpy()), kind="stable")
    (ours,) = solve([W], H, SolverRule(None, GridRule(4, 32, True, mse_clip=False), act_order="column"), layer="layer")
    reference = solve_reference(W.numpy()[:, order], H.numpy()[order][:, order], bits=4, group=32)
    # codes at rounding boundaries may differ in float32, see test_solver_reference.py
    assert np.mean(ours.codes.codes_OI.numpy()[:, order] == reference.codes) > 0.985
    assert ours.codes.g_idx_I.numpy()[order].tolist() == [i // 32 for i in range(96)]


def test_group_order_takes_the_strongest_group_first_and_within_it_the_strongest_inputs() -> None:
    W, H, _ = correlated_problem(8, 96, spread=2.0)
    energy = np.diag(H.numpy()).astype(np.float64)
    groups = sorted(range(3), key=lambda g: -energy[32 * g : 32 * g + 32].sum())
    order = np.concatenate([32 * g + np.argsort(-energy[32 * g : 32 * g + 32], kind="stable") for g in groups])
    assert order.tolist() != list(range(96))
    (ours,) = solve([W], H, SolverRule(None, GridRule(4, 32, True, mse_clip=False), act_order="group"), layer="layer")
    reference = solve_reference(W.numpy()[:, order], H.numpy()[order][:, order], bits=4, group=32)
    assert np.mean(ours.codes.codes_OI.numpy()[:, order] == reference.codes) > 0.985


def test_static_order_takes_the_strongest_inputs_first_and_keeps_the_scales_of_the_weights_as_given() -> None:
    W, H, _ = correlated_problem(8, 96, spread=2.0)
    order = np.argsort(-np.diag(H.numpy()), kind="stable")
    rule = SolverRule(None, GridRule(4, 32, True, mse_clip=False), act_order="static")
    (ours,) = solve([W], H, rule, layer="layer")
    reference = solve_reference(W.numpy()[:, order], H.numpy()[order][:, order], bits=4, static=order // 32)
    assert np.mean(ours.codes.codes_OI.numpy()[:, order] == reference.codes) > 0.985
    largest = W.view(8, 3, 32).abs().amax(-1)
    np.testing.assert_allclose(ours.codes.scales_OG.numpy(), 2 * largest.numpy() / 15, rtol=1e-3)


@pytest.mark.parametrize("act_order", ["column", "group", "static"])
def test_ordering_lowers_the_error_where_inputs_differ_in_strength(act_order: str) -> None:
    """Summed over seeds: a single draw may go the other way."""
    errors = {"none": 0.0, act_order: 0.0}
    for seed in range(6):
        W, H, x = correlated_problem(16, 128, seed=seed, spread=3.0)
        for order in errors:
            rule = SolverRule(None, GridRule(3, 32, True, mse_clip=True), act_order=order)
            (solution,) = solve([W], H, rule, layer="layer")
            errors[order] += output_error(x, W, solution.weight_OI)
    assert errors[act_order] < errors["none"]
