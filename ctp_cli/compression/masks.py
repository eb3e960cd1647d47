"""Which weights to prune: a fraction of a layer, or n:m, by a score per weight.

I=in_features O=out_features C=columns (inputs) of one block; True means kept
"""

import re
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class MaskRule:
    """fraction: share pruned; or keep `n` of every `m` consecutive inputs."""

    fraction: float | None = None
    n: int = 0
    m: int = 0

    @classmethod
    def parse(cls, sparsity: float | str) -> "MaskRule":
        """0.5 or '2:4'; values were checked by the recipe."""
        if isinstance(sparsity, str) and (match := re.match(r"^(\d+):(\d+)$", sparsity)):
            return cls(n=int(match[1]), m=int(match[2]))
        return cls(fraction=float(sparsity))


def keep_largest(score_CO: Tensor, rule: MaskRule) -> Tensor:
    """Keep the highest scores: over the whole of score_CO for a fraction, in every m inputs of each output for n:m.

    Shapes: score_CO (C, O); C is a multiple of m for n:m.
    """
    if rule.fraction is not None:
        return _keep_over_all(score_CO, rule.fraction)
    columns, outputs = score_CO.shape
    runs = score_CO.view(columns // rule.m, rule.m, outputs)
    dropped = torch.topk(runs, rule.m - rule.n, dim=1, largest=False, sorted=False).indices
    keep = torch.ones_like(runs, dtype=torch.bool).scatter_(1, dropped, False)
    return keep.view(columns, outputs)


def _keep_over_all(score_CO: Tensor, fraction: float) -> Tensor:
    pruned = round(fraction * score_CO.numel())
    if pruned == 0:
        return torch.ones_like(score_CO, dtype=torch.bool)
    threshold = torch.kthvalue(score_CO.flatten(), pruned).values
    keep = score_CO > threshold
    # bfloat16 weights often share a magnitude: of those at the threshold, only as many go as are still to be pruned
    kept_at_threshold = score_CO.numel() - pruned - int(keep.sum())
    if kept_at_threshold > 0:
        ties = torch.nonzero((score_CO == threshold).flatten()).flatten()
        keep.view(-1)[ties[-kept_at_threshold:]] = True
    return keep


def keep_per_output(score_CO: Tensor, rule: MaskRule) -> Tensor:
    """As `keep_largest`, but a fraction is taken in each output row on its own (Wanda's comparison group)."""
    if rule.fraction is None:
        return keep_largest(score_CO, rule)
    pruned = round(rule.fraction * score_CO.shape[0])
    dropped = torch.topk(score_CO, pruned, dim=0, largest=False, sorted=False).indices
    return torch.ones_like(score_CO, dtype=torch.bool).scatter_(0, dropped, False)
