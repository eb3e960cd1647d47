"""Quantization grids against values worked out by hand and a brute-force search in numpy."""

import numpy as np
import pytest
import torch

from ctp_cli.compression.grid import GridRule, fit_grid


def test_grids_worked_out_by_hand() -> None:
    w_CO = torch.tensor([[-1.0, 0.5], [2.0, 1.0], [0.0, 3.5]])  # two outputs: [-1, 2, 0] and [0.5, 1, 3.5]
    symmetric = fit_grid(w_CO, GridRule(4, 32, True, mse_clip=False))
    assert symmetric.zero_O.tolist() == [8, 8]
    # steps of 4/15 and 7/15, as float16 holds them: half a step of float16 near 0.4 is 2^-13
    torch.testing.assert_close(symmetric.scale_O, torch.tensor([4 / 15, 7 / 15]), rtol=0, atol=2**-13)
    asymmetric = fit_grid(w_CO, GridRule(2, 32, False, mse_clip=False))
    # [-1, 2] in three steps of 1 with zero at code 1; [0, 3.5] would have zero at code 0, which v1 files cannot hold
    assert asymmetric.zero_O.tolist() == [1, 1]
    assert asymmetric.scale_O[0].item() == 1.0
    assert asymmetric.codes(w_CO)[:, 0].tolist() == [0, 3, 1]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_scales_are_float16_zero_is_on_the_grid_and_zero_points_can_be_stored(bits: int, symmetric: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    w_CO = torch.randn(32, 64, generator=generator) + torch.linspace(-4, 4, 64)  # groups of one sign, too
    grid = fit_grid(w_CO, GridRule(bits, 32, symmetric, mse_clip=True))
    assert torch.equal(grid.scale_O, grid.scale_O.half().float())
    assert grid.zero_O.min() >= 1
    assert grid.zero_O.max() <= 2**bits - 1
    assert torch.equal(grid.zero_O, grid.zero_O.round())
    assert torch.equal(grid.round(torch.zeros(1, 64)), torch.zeros(1, 64))
    codes = grid.codes(w_CO)
    assert codes.min() >= 0
    assert codes.max() <= 2**bits - 1


@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize("symmetric", [True, False])
def test_clipping_lowers_the_weight_error_at_few_bits(symmetric: bool, bits: int) -> None:
    w_CO = torch.randn(64, 100, generator=torch.Generator().manual_seed(0))
    error = {}
    for clip in (True, False):
        grid = fit_grid(w_CO, GridRule(bits, 64, symmetric, mse_clip=clip))
        error[clip] = (grid.round(w_CO) - w_CO).square().sum(0)
    assert (error[True] <= error[False] * (1 + 1e-6)).all()  # the full range is among the candidates
    assert error[True].sum() < 0.9 * error[False].sum()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_clipping_comes_close_to_the_best_of_a_fine_search(bits: int) -> None:
    w_CO = torch.randn(32, 20, generator=torch.Generator().manual_seed(1))
    grid = fit_grid(w_CO, GridRule(bits, 32, True, mse_clip=True))
    ours = (grid.round(w_CO) - w_CO).square().sum(0).numpy()
    zero = 2 ** (bits - 1)
    best = np.full(20, np.inf)
    w = w_CO.numpy().astype(np.float64)
    for share in np.arange(0.3, 1.3, 0.005):
        scale = 2 * np.abs(w).max(0) * share / (2**bits - 1)
        error = ((np.clip(np.round(w / scale) + zero, 0, 2**bits - 1) - zero) * scale - w) ** 2
        best = np.minimum(best, error.sum(0))
    # 18 candidates against 200: within a tenth over all, and no group far off
    assert ours.sum() < 1.1 * best.sum()


def test_pruned_weights_do_not_widen_the_grid() -> None:
    w_CO = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
    outliers = w_CO.clone()
    outliers[5] = 100.0
    keep_CO = torch.ones(32, 4, dtype=torch.bool)
    keep_CO[5] = False
    for clip in (True, False):
        rule = GridRule(4, 32, False, mse_clip=clip)
        without = fit_grid(w_CO * keep_CO, rule)
        masked = fit_grid(outliers, rule, keep_CO=keep_CO)
        assert torch.equal(masked.scale_O, without.scale_O)
        assert torch.equal(masked.zero_O, without.zero_O)


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_group_of_zeros_or_of_vanishing_weights_still_has_a_usable_scale(symmetric: bool) -> None:
    w_CO = torch.zeros(32, 2)
    w_CO[:, 1] = 1e-12  # below the smallest float16
    grid = fit_grid(w_CO, GridRule(4, 32, symmetric, mse_clip=True))
    assert (grid.scale_O > 0).all()
    assert torch.equal(grid.round(w_CO), torch.zeros(32, 2))
