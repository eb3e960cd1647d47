"""Masked least squares against each row's own problem solved in float64, compiled and not."""

import numpy as np
import pytest
import torch
from ctp_kernels import descent
from ctp_kernels.descent import Fit, Quadratic


def problem(outputs: int, inputs: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(outputs * inputs)
    x_TI = torch.randn(20 * inputs, inputs, generator=generator) * torch.logspace(0, -1, inputs)
    H = x_TI.T @ x_TI / len(x_TI) + 0.02 * torch.eye(inputs)
    keep = torch.rand(outputs, inputs, generator=generator) < 0.5
    keep[0], keep[-1] = False, True
    return torch.randn(outputs, inputs, generator=generator), keep, H


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize(("outputs", "inputs"), [(2, 16), (5, 40), (9, 67)])
@pytest.mark.parametrize("threads", [1, 2])
def test_steps_come_near_the_solution_and_keep_the_residual(
    outputs: int, inputs: int, threads: int, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not compiled:
        monkeypatch.setattr(descent, "_library", lambda: None)
    elif descent._library() is None:
        pytest.skip("this processor has no AVX-512 BF16, or there is no C++ compiler")
    W, keep, H = problem(outputs, inputs)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    quadratic = Quadratic(H)
    start = W * keep
    fit = Fit(start.clone(), quadratic.product(W - start))
    quadratic.descend(fit, keep, steps=4)
    exact = np.zeros((outputs, inputs))
    H64, W64 = H.double().numpy(), W.double().numpy()
    for row in range(outputs):
        kept = keep[row].numpy()
        if kept.any():
            exact[row, kept] = np.linalg.solve(H64[np.ix_(kept, kept)], (H64 @ W64[row])[kept])
    assert torch.equal(fit.values_OI[~keep], start[~keep])
    before, after, best = (
        np.einsum("oi,ij,oj->o", W64 - V, H64, W64 - V) for V in (start.numpy(), fit.values_OI.double().numpy(), exact)
    )
    # at least nine tenths of what there is to gain; what rounding directions to bfloat16 costs is far below that
    assert (after - best <= 0.1 * (before - best) + 1e-6).all()
    residual = (W64 - fit.values_OI.double().numpy()) @ H64
    assert np.abs(fit.residual_OI.numpy() - residual).max() <= (0.02 if compiled else 1e-4) * np.abs(W64 @ H64).max()


@pytest.mark.parametrize("compiled", [True, False])
def test_inputs_that_hardly_differ_are_no_obstacle(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not compiled:
        monkeypatch.setattr(descent, "_library", lambda: None)
    W, keep, H = problem(9, 67)
    H = 1e-3 * H + torch.outer(1 + H[0], 1 + H[0])  # rounding these entries to bfloat16 would make H indefinite
    quadratic = Quadratic(H)
    start = W * keep
    fit = Fit(start, quadratic.product(W - start))
    quadratic.descend(fit, keep, steps=4)
    D, H64 = (W - fit.values_OI).double(), H.double()
    for row in range(9):
        kept = keep[row]
        lost = D[row] @ H64 @ D[row]
        free, tied = H64[~kept][:, ~kept], H64[~kept][:, kept]
        if kept.any():
            # the Schur complement: what is lost when the kept weights make up for the pruned ones as well as they can
            free = free - tied @ torch.linalg.solve(H64[kept][:, kept], tied.T)
        assert lost <= 1.05 * (W[row, ~kept].double() @ free @ W[row, ~kept].double()) + 1e-9


@pytest.mark.parametrize("width", [1, 2, 3])
def test_narrow_problems_are_solved(width: int) -> None:
    H = torch.eye(width) + 0.5
    W, keep = torch.ones(4, width), torch.ones(4, width, dtype=torch.bool)
    quadratic = Quadratic(H)
    fit = Fit(torch.zeros(4, width), quadratic.product(W))
    quadratic.descend(fit, keep, steps=3)
    torch.testing.assert_close(fit.values_OI, W, rtol=0.01, atol=0.01)


def test_what_the_kernel_would_misread_is_refused() -> None:
    W, keep, H = problem(5, 40)
    quadratic = Quadratic(H)
    good = Fit(W.clone(), W.clone())
    transposed = W.T.contiguous().T
    for values, residual, mask in (
        (transposed, W, keep),
        (W, W[:4], keep),
        (W.double(), W, keep),
        (W, W, keep.float()),
    ):
        with pytest.raises(ValueError, match="not a contiguous"):
            quadratic.descend(Fit(values, residual), mask, steps=1)
    quadratic.descend(good, keep, steps=1)
