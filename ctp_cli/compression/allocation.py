"""How much each block is pruned where not all are pruned alike: less of those with more outliers.

A weight is an outlier if |w| times the norm of its input is far above its block's mean. Blocks with many of them lose
more by pruning.

Source: OWL (arXiv:2310.05175). I=in_features
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ctp_cli.models.blocks import Block, LinearLayer, SuspendedRun, WalkState
from ctp_cli.models.processes import ALONE, Processes

OUTLIER = 5.0
"""Times its block's mean (M in OWL)."""
REACH = 0.08
"""Half the distance between the most and the least pruned block (lambda in OWL)."""


@torch.no_grad()
def outlier_share(
    block: Block, state: WalkState, sets: Sequence[Sequence[LinearLayer]], processes: Processes = ALONE
) -> float:
    """The share of a block's weights that are outliers; the hidden states become the block's outputs.

    `sets` are the layers fed by the same tensor. Inputs are those of all `processes`, which get the same share.
    Memory: a layer's weights twice in float32, beside what a block holds for all batches.
    """
    norms: list[tuple[LinearLayer, Tensor]] = []
    with SuspendedRun(block, {layers[0].name for layers in sets}, state) as run:
        for layers in sets:
            weight_OI = layers[0].weight_OI
            squares_I = torch.zeros(weight_OI.shape[1], dtype=torch.float32, device=weight_OI.device)
            for _, x_TI in run.inputs(layers[0]):
                squares_I += x_TI.float().square().sum(0)
            processes.add_up(squares_I)
            norms += [(layer, squares_I.sqrt()) for layer in layers]
        run.finish()
    weights = sum(layer.weight_OI.numel() for layer, _ in norms)
    mean = sum(float(_scores(layer, norm_I).sum(dtype=torch.float64)) for layer, norm_I in norms) / weights
    return sum(int((_scores(layer, norm_I) > OUTLIER * mean).sum()) for layer, norm_I in norms) / weights


def _scores(layer: LinearLayer, norm_I: Tensor) -> Tensor:
    return layer.weight_OI.abs().float().mul_(norm_I)


def allocate(shares: Sequence[float], weights: Sequence[int], sparsity: float, *, reach: float = REACH) -> list[float]:
    """The sparsity of each block: those with a larger share of outliers get less.

    Their mean, each counted by its `weights`, is `sparsity`. The most and the least pruned are 2 x `reach` apart, or
    less where a block would otherwise keep less than half of what all keep on average, or lose less than half.
    """
    lowest, highest = min(shares), max(shares)
    if lowest == highest:
        return [sparsity] * len(shares)
    mean = sum(share * count for share, count in zip(shares, weights, strict=True)) / sum(weights)
    scale = min(
        2 * reach / (highest - lowest),
        (1 - sparsity) / 2 / (mean - lowest),
        sparsity / 2 / (highest - mean),
    )
    return [sparsity + scale * (mean - share) for share in shares]
