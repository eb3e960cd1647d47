"""Prune by turns: fit the kept weights by least squares, then swap some of them for pruned ones that are worth more.

Given a mask, min |X (V - W)|^2 over the V that is zero where the mask is, is a least-squares problem per output, and a
few steps of preconditioned conjugate gradients come near its solution. The gradient there says what each pruned weight
would be worth: r^2 / 2 H_ii, and each kept one costs v^2 H_ii / 2 to lose, if all others stayed. So pruned weights that
are worth more take the places of kept ones that cost less, as many as there are, and the next round begins. The first
mask is equally sparse for every output; swaps may change that.

Source: conjugate gradients on a mask are the last step of ALPS (arXiv:2406.07831); the first mask is Wanda's
(arXiv:2306.11695).

O=out_features I=in_features
"""

import torch
from ctp_kernels.descent import Fit, Quadratic
from torch import Tensor

from ctp_cli.compression.masks import MaskRule, keep_per_output

_STEPS = 2
"""Conjugate-gradient steps of a round; with one, swaps are noticeably worse chosen (docs/compression.md)."""
PART = 1 << 24
"""Weights of a layer that are pruned at once: they are held about ten times meanwhile."""
_SAMPLED = 1 << 13
"""Weights from which the price of a swap is estimated."""


def prune_by_turns(W_OI: Tensor, quadratic: Quadratic, rule: MaskRule, *, rounds: int) -> Tensor:
    """(O, I) float32: W pruned as `rule` says, and what is kept changed to make up for it.

    Shapes: W_OI (O, I) float32; the quadratic is that of the inputs' second moments, dampened.
    A round that does not lower the error ends the search. Outputs of a large layer are pruned in equal parts, as if
    each were a layer of its own. Memory: about ten times a part and the layer once, in float32.
    """
    parts = -(-W_OI.numel() // PART)
    pruned_OI = torch.empty(W_OI.shape, dtype=torch.float32, device=W_OI.device)
    for W, pruned in zip(W_OI.chunk(parts), pruned_OI.chunk(parts), strict=True):
        pruned.copy_(_prune(W.contiguous(), quadratic, rule, rounds))  # of GPT-2's layers it is a transposed view
    return pruned_OI


def _prune(W_OI: Tensor, quadratic: Quadratic, rule: MaskRule, rounds: int) -> Tensor:
    diagonal_I = quadratic.diagonal_I
    keep_OI = keep_per_output((W_OI.square() * diagonal_I).T, rule).T.contiguous()
    values_OI = W_OI * keep_OI
    best = Fit(values_OI, quadratic.product(W_OI - values_OI))
    quadratic.descend(best, keep_OI, steps=_STEPS)
    error = _error(W_OI, best)
    for _ in range(rounds - 1):
        swapped_OI = _swapped(best, keep_OI, diagonal_I, rule)
        dropped_OI = best.values_OI * (keep_OI & ~swapped_OI)
        found = Fit(best.values_OI - dropped_OI, best.residual_OI + quadratic.product(dropped_OI))
        quadratic.descend(found, swapped_OI, steps=_STEPS)
        if (found_error := _error(W_OI, found)) >= error:
            break
        best, keep_OI, error = found, swapped_OI, found_error
    return best.values_OI


def _error(W_OI: Tensor, fit: Fit) -> float:
    return float(((W_OI - fit.values_OI) * fit.residual_OI).sum())


def _swapped(fit: Fit, keep_OI: Tensor, diagonal_I: Tensor, rule: MaskRule) -> Tensor:
    """The mask after all swaps that lower the error, each taken alone; within runs of m inputs for n:m."""
    gain_OI = (fit.residual_OI.square() / diagonal_I).mul_(~keep_OI)
    loss_OI = fit.values_OI.square() * diagonal_I
    if rule.fraction is None:
        runs = (keep_OI.shape[0], -1, rule.m)
        gain = gain_OI.masked_fill_(keep_OI, -1).view(runs).max(2, keepdim=True)
        loss = loss_OI.masked_fill_(~keep_OI, torch.inf).view(runs).min(2, keepdim=True)
        better = gain.values > loss.values
        kept = keep_OI.view(runs).scatter(2, gain.indices, better).scatter(2, loss.indices, ~better)
        return kept.view(keep_OI.shape)
    keep_N, gain_N, loss_N = keep_OI.flatten(), gain_OI.flatten(), loss_OI.flatten()
    price = _price(keep_N, gain_N, loss_N)
    joining, leaving = (gain_N > price).nonzero()[:, 0], ((loss_N < price) & keep_N).nonzero()[:, 0]
    count = min(joining.numel(), leaving.numel())
    kept_N = keep_N.clone()
    kept_N[joining[gain_N[joining].topk(count, sorted=False).indices]] = True
    kept_N[leaving[loss_N[leaving].topk(count, largest=False, sorted=False).indices]] = False
    return kept_N.view(keep_OI.shape)


def _price(keep_N: Tensor, gain_N: Tensor, loss_N: Tensor) -> Tensor:
    """About where as many pruned weights gain more as kept ones cost less; on a sample, evenly spread."""
    stride = max(1, gain_N.numel() // _SAMPLED)
    gains = gain_N[::stride].sort(descending=True).values
    losses = loss_N[::stride].masked_fill(~keep_N[::stride], torch.inf).sort().values
    crossing = int((gains > losses).sum())  # both sorted, so these come first
    return losses[min(crossing, losses.numel() - 1)]
