"""Quantization grids: b-bit codes, a scale and an integer zero point per output and group.

O=out_features C=columns (inputs of one group) K=candidate grids; value = scale * (code - zero)
"""

from dataclasses import dataclass

import torch
from ctp_kernels.sweep import rounding_errors
from torch import Tensor

# Ranges tried by the clip search, as shares of the full range, which is the first. Above 1 only a symmetric grid gains:
# its negative side has one code more than its positive side.
_SHARES = torch.cat([torch.tensor([1.0]), torch.arange(0.30, 1.0, 0.05), torch.tensor([1.08, 1.16, 1.25])])


@dataclass(frozen=True)
class GridRule:
    """How grids are made. group_size None: one grid per output row."""

    bits: int
    group_size: int | None
    symmetric: bool
    mse_clip: bool
    scale_dtype: torch.dtype = torch.float16
    """Scales are exact in it: that of a checkpoint's scales, or what a reader makes of them."""

    @property
    def max_code(self) -> int:
        return 2**self.bits - 1


@dataclass(frozen=True)
class Grid:
    """scale_O and zero_O of one group. Scales are float32, exact in the rule's `scale_dtype`."""

    scale_O: Tensor
    zero_O: Tensor
    max_code: int

    def codes(self, w_CO: Tensor) -> Tensor:
        """Nearest codes, as floats, for values (..., O)."""
        return torch.div(w_CO, self.scale_O).round_().add_(self.zero_O).clamp_(0, self.max_code)

    def values(self, codes_CO: Tensor) -> Tensor:
        return torch.sub(codes_CO, self.zero_O).mul_(self.scale_O)

    def round(self, w_CO: Tensor) -> Tensor:
        return self.values(self.codes(w_CO))


def fit_grid(w_CO: Tensor, rule: GridRule, *, keep_CO: Tensor | None = None) -> Grid:
    """The grid of one group for weights (C, O); weights where keep_CO is False (pruned) do not count.

    Zero is always on the grid, so a pruned weight is exactly representable. Asymmetric zero points lie in
    [1, max_code], because GPTQ v1 files store zero - 1 and 0 would wrap.
    Source: the round-to-nearest grid and clip search of GPTQ (arXiv:2210.17323) and its reference implementation.
    """
    if keep_CO is not None:
        w_CO = w_CO * keep_CO
    low_O, high_O = w_CO.amin(0).clamp(max=0), w_CO.amax(0).clamp(min=0)
    if rule.symmetric:
        high_O = torch.maximum(-low_O, high_O)
        low_O = -high_O
    if not rule.mse_clip:
        return _grids(low_O, high_O, rule)
    shares_K1 = _SHARES.to(w_CO.device)[:, None]
    tried = _grids(low_O * shares_K1, high_O * shares_K1, rule)
    # pruned weights are zeros here and zero is on every grid, so they add nothing
    errors_KO = rounding_errors(w_CO.contiguous(), tried.scale_O, tried.zero_O, rule.max_code)
    # the widest candidate's scale can overflow float16, and its error is NaN then
    best_1O = errors_KO.nan_to_num(nan=torch.inf).argmin(0, keepdim=True)
    return Grid(tried.scale_O.gather(0, best_1O)[0], tried.zero_O.gather(0, best_1O)[0], rule.max_code)


def _grids(low_O: Tensor, high_O: Tensor, rule: GridRule) -> Grid:
    """Of ranges (O,) or, of several at once, (K, O)."""
    steps_O: Tensor | int = rule.max_code
    if not rule.symmetric:
        # the zero point is at least 1, so without negative weights one code below zero goes unused
        steps_O = torch.where(low_O < 0, rule.max_code, rule.max_code - 1)
    scale_O = ((high_O - low_O) / steps_O).to(rule.scale_dtype).float()
    # an all-zero group, or one too small for float16, still needs a usable scale
    scale_O = torch.where(scale_O > 0, scale_O, torch.ones_like(scale_O))
    if rule.symmetric:
        zero_O = torch.full_like(scale_O, (rule.max_code + 1) // 2)
    else:
        zero_O = torch.round(-low_O / scale_O).clamp_(1, rule.max_code)
    return Grid(scale_O, zero_O, rule.max_code)
