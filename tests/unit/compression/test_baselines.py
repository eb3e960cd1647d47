"""The baselines against numpy: magnitude, Wanda, round-to-nearest, and how they combine with the solver."""

import numpy as np
import pytest
import torch
from solver_reference import correlated_problem, output_error, row_grid

from ctp_cli.compression.grid import GridRule
from ctp_cli.compression.masks import MaskRule, keep_largest
from ctp_cli.compression.solver import SolverRule, solve


def smallest(scores: np.ndarray, count: int) -> np.ndarray:
    """True at all but the `count` lowest of a flat array."""
    keep = np.ones(scores.size, dtype=bool)
    keep[np.argsort(scores, kind="stable")[:count]] = False
    return keep


def test_magnitude_prunes_the_smallest_weights_of_each_layer() -> None:
    first = correlated_problem(12, 96)[0]
    second = 10 * correlated_problem(20, 96, seed=1)[0]  # another scale: layers must not compete with each other
    solutions = solve([first, second], None, SolverRule(MaskRule(0.4), None, pruner="magnitude"), layer="layer")
    for W, solution in zip((first, second), solutions, strict=True):
        keep = smallest(np.abs(W.numpy()).ravel(), round(0.4 * W.numel())).reshape(W.shape)
        assert np.array_equal(solution.keep_OI.numpy(), keep)
        assert torch.equal(solution.weight_OI, W * torch.from_numpy(keep))


def test_magnitude_n_of_m_is_numpys_choice_in_every_run() -> None:
    W = correlated_problem(12, 96)[0]
    (solution,) = solve([W], None, SolverRule(MaskRule(n=2, m=4), None, pruner="magnitude"), layer="layer")
    keep = np.stack([smallest(run, 2) for run in np.abs(W.numpy()).reshape(-1, 4)]).reshape(W.shape)
    assert np.array_equal(solution.keep_OI.numpy(), keep)


@pytest.mark.parametrize("sparsity", [0.5, "2:4", "4:8"])
def test_wanda_compares_weight_times_input_norm_within_each_output(sparsity: float | str) -> None:
    W, H, x = correlated_problem(12, 96)
    mask = MaskRule.parse(sparsity)
    (solution,) = solve([W], H, SolverRule(mask, None, pruner="wanda"), layer="layer")
    score = np.abs(W.numpy().astype(np.float64)) * np.linalg.norm(x.numpy().astype(np.float64), axis=0)
    width, count = (mask.m, mask.m - mask.n) if mask.m else (96, 48)
    keep = np.stack([smallest(run, count) for run in score.reshape(-1, width)]).reshape(W.shape)
    assert np.array_equal(solution.keep_OI.numpy(), keep)
    assert torch.equal(solution.weight_OI, W * torch.from_numpy(keep))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [32, None])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_rtn_takes_the_nearest_point_of_each_groups_grid(bits: int, group: int | None, symmetric: bool) -> None:
    W = correlated_problem(6, 96)[0]
    rule = SolverRule(None, GridRule(bits, group, symmetric, mse_clip=False), quantizer="rtn")
    (solution,) = solve([W], None, rule, layer="layer")
    assert solution.dampening is None
    for o in range(6):
        for start in range(0, 96, group or 96):
            w = W[o, start : start + (group or 96)].numpy().astype(np.float64)
            scale, zero = row_grid(w, bits, symmetric)
            points = scale * (np.arange(2**bits) - zero)
            nearest = np.abs(w[:, None] - points).min(axis=1)
            ours = np.abs(w - solution.weight_OI[o, start : start + (group or 96)].numpy())
            # float32 against float64: as near as the nearest point, to float32's precision of the weights themselves
            np.testing.assert_allclose(ours, nearest, atol=2e-6)


@pytest.mark.parametrize("pruner", ["magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize("quantizer", ["gptq", "rtn"])
@pytest.mark.parametrize("sparsity", [0.5, "2:4"])
def test_every_pruner_goes_with_every_quantizer(sparsity: float | str, quantizer: str, pruner: str) -> None:
    W, H, x = correlated_problem(16, 160)
    mask, grid = MaskRule.parse(sparsity), GridRule(4, 32, True, mse_clip=True)
    (pruned,) = solve([W], H, SolverRule(mask, None, pruner=pruner), layer="layer")
    (both,) = solve([W], H, SolverRule(mask, grid, pruner=pruner, quantizer=quantizer), layer="layer")
    assert int((both.weight_OI[~both.keep_OI] != 0).sum()) == 0
    assert int((~both.keep_OI).sum()) == int((~pruned.keep_OI).sum()) == W.numel() // 2
    if pruner != "sparsegpt" or quantizer == "rtn":  # the mask does not depend on what rounding did to the weights
        assert torch.equal(both.keep_OI, pruned.keep_OI)
    if quantizer == "rtn":  # rounding moves a kept weight by half a step at most, beside what clipping cuts off
        off = (both.weight_OI - pruned.weight_OI).abs()
        step = both.codes.scales_OG[:, both.codes.g_idx_I.long()]
        assert (off[both.keep_OI] > 0.501 * step[both.keep_OI]).float().mean() < 0.05
    if pruner == "wanda" and quantizer == "gptq":  # feedback starts from the pruned weights and makes up for both
        (rounded,) = solve([W], H, SolverRule(mask, grid, pruner=pruner, quantizer="rtn"), layer="layer")
        assert output_error(x, W, both.weight_OI) < 0.8 * output_error(x, W, rounded.weight_OI)


@pytest.mark.parametrize("pruner", ["magnitude", "sparsegpt"])
def test_ties_do_not_prune_more_than_asked(pruner: str) -> None:
    """bfloat16 weights have many equal magnitudes; a threshold alone would take all that share it."""
    W = torch.randn(16, 64, generator=torch.Generator().manual_seed(0)).mul(4).round().div(4)
    (solution,) = solve([W], torch.eye(64), SolverRule(MaskRule(0.5), None, pruner=pruner), layer="layer")
    assert int((~solution.keep_OI).sum()) == W.numel() // 2


def test_equal_scores_are_all_or_nothing_to_no_rule() -> None:
    keep = keep_largest(torch.ones(8, 6), MaskRule(0.25))
    assert int(keep.sum()) == 36
