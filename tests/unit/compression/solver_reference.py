"""GPTQ and SparseGPT as the papers state them, in float64, one input after the other, without blocks or Cholesky.

The oracle of the solver tests: the inverse Hessian is made in full and shrunk by explicit elimination after every
input (GPTQ, arXiv:2210.17323, equations 2 and 3), so it shares neither the factorization nor the blocking of the
code under test. Weights are numpy (out, in) here.
"""

from dataclasses import dataclass

import numpy as np
import torch

MASK_SPAN = 128  # SparseGPT's block: the span over which a mask is chosen


@dataclass
class Reference:
    weight: np.ndarray
    codes: np.ndarray
    keep: np.ndarray


def correlated_problem(
    outputs: int, inputs: int, *, tokens: int = 512, seed: int = 0, spread: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """W (O, I), H (I, I) = mean x x^T and x (T, I): few directions carry most of the inputs' energy."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(max(2, inputs // 4), inputs, generator=generator)
    x = torch.randn(tokens, mixing.shape[0], generator=generator) @ mixing / mixing.shape[0] ** 0.5
    x = x + 0.2 * torch.randn(tokens, inputs, generator=generator)
    x = x * torch.exp(spread * 0.5 * torch.randn(inputs, generator=generator))
    W = torch.randn(outputs, inputs, generator=generator) * torch.exp(torch.randn(outputs, 1, generator=generator) / 4)
    return W, (x.double().T @ x.double() / tokens).float(), x


def elimination(H: np.ndarray, dampening: float) -> tuple[np.ndarray, np.ndarray]:
    """For each input i: what its update divides by, and the row that spreads its error over inputs i, i + 1, ..."""
    damped = H.astype(np.float64) + dampening * np.mean(np.diag(H)) * np.eye(len(H))
    inverse = np.linalg.inv(damped)
    divisors, rows = np.zeros(len(H)), np.zeros_like(inverse)
    for i in range(len(H)):
        divisors[i], rows[i] = inverse[i, i], inverse[i]
        inverse = inverse - np.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    return divisors, rows


def row_grid(w: np.ndarray, bits: int, symmetric: bool) -> tuple[float, float]:
    """Scale and zero point of one output's group: min and max with 0 between them, zero point in [1, max]."""
    top = 2**bits - 1
    low, high = min(w.min(), 0.0), max(w.max(), 0.0)
    if symmetric:
        high = max(high, -low)
        low = -high
    scale = float(np.float16((high - low) / top)) or 1.0
    zero = (top + 1) / 2 if symmetric else min(max(np.round(-low / scale), 1), top)
    return scale, zero


def solve_reference(
    W: np.ndarray,
    H: np.ndarray,
    *,
    bits: int | None = None,
    group: int | None = None,
    symmetric: bool = True,
    fraction: float | None = None,
    n_of_m: tuple[int, int] | None = None,
    dampening: float = 0.01,
    static: np.ndarray | None = None,
) -> Reference:
    """One layer, inputs in their given order; group None: one grid per output, fitted on the untouched weights.

    `static` holds the group of each input: grids of those groups, fitted on the untouched weights.
    """
    W = W.astype(np.float64).copy()
    outputs, inputs = W.shape
    divisors, rows = elimination(H, dampening)
    codes, keep = np.zeros((outputs, inputs)), np.ones((outputs, inputs), dtype=bool)
    grids = [row_grid(W[o], bits, symmetric) for o in range(outputs)] if bits and group is None else []
    groups = set() if static is None else set(static.tolist())
    fixed = {g: [row_grid(w, bits, symmetric) for w in W[:, static == g]] for g in groups}
    for i in range(inputs):
        if static is not None:
            grids = fixed[static[i]]
        if i % MASK_SPAN == 0 and (fraction is not None or n_of_m is not None):
            span = slice(i, min(i + MASK_SPAN, inputs))
            keep[:, span] = _mask(W[:, span] ** 2 / divisors[span], fraction, n_of_m)
        if bits and group is not None and i % group == 0:
            here = slice(i, i + group)
            grids = [row_grid(W[o, here] * keep[o, here], bits, symmetric) for o in range(outputs)]
        for o in range(outputs):
            taken = W[o, i]
            if bits:
                scale, zero = grids[o]
                codes[o, i] = min(max(np.round(taken / scale) + zero, 0), 2**bits - 1)
                taken = scale * (codes[o, i] - zero)
            if not keep[o, i]:
                taken = 0.0
                codes[o, i] = grids[o][1] if bits else 0
            error = (W[o, i] - taken) / divisors[i]
            W[o, i + 1 :] -= error * rows[i, i + 1 :]
            W[o, i] = taken
    return Reference(W, codes, keep)


def _mask(score: np.ndarray, fraction: float | None, n_of_m: tuple[int, int] | None) -> np.ndarray:
    keep = np.ones(score.size, dtype=bool)
    if n_of_m is None:
        assert fraction is not None
        keep[np.argsort(score, axis=None, kind="stable")[: round(fraction * score.size)]] = False
        return keep.reshape(score.shape)
    n, m = n_of_m
    for start in range(0, score.size, m):
        run = np.argsort(score.reshape(-1)[start : start + m], kind="stable")
        keep[start + run[: m - n]] = False
    return keep.reshape(score.shape)


def output_error(x: torch.Tensor, before: torch.Tensor, after: torch.Tensor) -> float:
    """|X (W - W')|^2 / |X W|^2 in float64, on the inputs themselves rather than through their Hessian."""
    lost, whole = (x.double() @ (before - after).double().T), (x.double() @ before.double().T)
    return (lost.square().sum() / whole.square().sum()).item()
