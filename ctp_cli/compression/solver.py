"""One column solver: GPTQ, SparseGPT and their joint form are the same update, pruning being rounding to zero.

Inputs are taken one after the other. Each is pruned or rounded, and its error is made up for by the inputs not yet
taken, by the inverse factor U of the layer's Hessian. A mask rule and a grid rule are the two optional parts. The
baselines (round-to-nearest, magnitude, Wanda) are the same interface without the correction.

O=out_features I=in_features C=columns (inputs) of one block G=groups; weights are held input-major here, so that one
input's weights are contiguous
"""

import functools
import itertools
import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from ctp_kernels.descent import Quadratic
from ctp_kernels.sweep import Grids, improve_codes, sweep_columns
from torch import Tensor

from ctp_cli.compression.alternating import prune_by_turns
from ctp_cli.compression.grid import Grid, GridRule, fit_grid
from ctp_cli.compression.hessian import all_finite, dampened, inverse_factor, refuse_not_finite
from ctp_cli.compression.masks import MaskRule, keep_largest, keep_per_output
from ctp_cli.errors import SolverError

BLOCK = 128
"""Inputs whose corrections are applied to all later inputs at once; also the span over which a mask is chosen."""


@dataclass(frozen=True)
class SolverRule:
    """What to do with a layer. mask None: no pruning; grid None: no quantization."""

    mask: MaskRule | None
    grid: GridRule | None
    pruner: Literal["alternating", "sparsegpt", "wanda", "magnitude"] = "sparsegpt"
    rounds: int = 1
    """Of the alternating pruner."""
    quantizer: Literal["gptq", "rtn"] = "gptq"
    act_order: Literal["none", "column", "group", "static"] = "none"
    dampening: float = 0.01
    refine: int = 0
    """Sweeps of coordinate descent over GPTQ's codes."""
    keep_zeros: bool = False
    """Weights that are zero stay zero; for a model that is pruned already, with no mask of its own."""

    @property
    def needs_hessian(self) -> bool:
        prunes = self.mask is not None and self.pruner != "magnitude"
        return prunes or (self.grid is not None and self.quantizer == "gptq")

    @property
    def moves_weights(self) -> bool:
        """Whether kept weights move to make up for what is lost, so that another output can be aimed at."""
        return self.feeds_back or (self.mask is not None and self.pruner == "alternating")

    @property
    def feeds_back(self) -> bool:
        """Whether later inputs make up for the error of earlier ones."""
        prunes = self.mask is not None and self.pruner == "sparsegpt"
        return prunes or (self.grid is not None and self.quantizer == "gptq")

    @property
    def static_grids(self) -> bool:
        """Whether all groups' grids are fitted before the first input is taken."""
        grouped = self.grid is not None and self.grid.group_size is not None
        return self.act_order == "static" and grouped and self.quantizer == "gptq"


@dataclass(frozen=True)
class Codes:
    """Quantized form of one layer: value[o, i] = scales[o, g_idx[i]] * (codes[o, i] - zeros[o, g_idx[i]])."""

    codes_OI: Tensor
    """uint8"""
    scales_OG: Tensor
    """float32, exact in float16"""
    zeros_OG: Tensor
    """uint8"""
    g_idx_I: Tensor
    """int32"""

    def values(self) -> Tensor:
        """(O, I) float32; pruned weights are exactly zero."""
        values_OI, zeros_OG = self.codes_OI.float(), self.zeros_OG.float()
        groups = zeros_OG.shape[1]
        size = values_OI.shape[1] // groups
        if torch.equal(self.g_idx_I, torch.arange(groups, device=self.g_idx_I.device).int().repeat_interleave(size)):
            grouped_OGC = values_OI.view(-1, groups, size)  # as they lie: nothing of the layer's size is gathered
            grouped_OGC.sub_(zeros_OG[..., None]).mul_(self.scales_OG[..., None])
            return values_OI
        index = self.g_idx_I.long()
        return values_OI.sub_(zeros_OG[:, index]).mul_(self.scales_OG[:, index])


@dataclass(frozen=True)
class Solution:
    """A compressed layer. `dampening` is what the factorization needed, None where none was made."""

    weight_OI: Tensor
    codes: Codes | None
    keep_OI: Tensor | None
    dampening: float | None


def solve(weights_OI: list[Tensor], H_II: Tensor | None, rule: SolverRule, *, layer: str) -> list[Solution]:
    """Compress layers that share their input, and so H, in one pass over the inputs.

    Shapes: each weight (O_k, I), any float dtype; H_II (I, I) float32, the mean of x x^T, or None for baselines that
        need no calibration.
    Raises: SolverError, naming `layer`, if H holds NaN or infinity or cannot be factorized, or if weights are too large
        for scales of the grid's dtype.
    Source: GPTQ (arXiv:2210.17323), SparseGPT (arXiv:2301.00774); the grid of a group is fitted when the solver arrives
        at it, on weights that already carry all corrections. With act_order "static" inputs of all groups take turns,
        so every group's grid is fitted before the first of them, on the weights given (static_groups in GPTQ).
    """
    if H_II is not None:
        refuse_not_finite(H_II, layer=layer)
    given_OI = weights_OI
    if rule.mask is not None and rule.pruner == "alternating":
        assert H_II is not None, "fits need a Hessian"
        with dampened(H_II, rule.dampening):
            quadratic = Quadratic(H_II)
            weights_OI = [prune_by_turns(w.float(), quadratic, rule.mask, rounds=rule.rounds) for w in weights_OI]
            del quadratic
        if rule.grid is None:
            return [Solution(w, None, w != 0, rule.dampening) for w in weights_OI]
        rule = replace(rule, mask=None, keep_zeros=True)
    spans = _spans([w.shape[0] for w in weights_OI])
    feedback = rule.feeds_back
    order_I = _order(H_II, rule, weights_OI[0].shape[1])
    W_IO = _side_by_side(weights_OI, spans)[order_I]
    U_II, dampening = None, None
    if feedback:
        assert H_II is not None, "error feedback needs a Hessian"
        U_II, dampening = inverse_factor(H_II, dampening=rule.dampening, layer=layer, order_I=order_I)
        U_II = U_II.contiguous()
    fixed_keep_IO = _fixed_mask(W_IO, H_II, order_I, rule, spans)
    if rule.mask is not None and rule.grid is not None and rule.pruner == "sparsegpt" and rule.quantizer == "rtn":
        # rounding without feedback comes after pruning with it, or the corrections would be rounded away unseen
        pruned = _sweep(W_IO.clone(), U_II, rule.mask, None, None, spans)
        done = _sweep(pruned.values_IO, None, None, rule.grid, pruned.keep_IO, spans)
    else:
        mask = None if fixed_keep_IO is not None else rule.mask
        static = _StaticGrids.fit(W_IO, rule.grid, fixed_keep_IO, order_I) if rule.static_grids else None
        done = _sweep(W_IO, U_II, mask, rule.grid, fixed_keep_IO, spans, static)
    solutions = [_solution(done, span, order_I, rule, dampening) for span in spans]
    if rule.grid is not None and not all(s.codes is None or all_finite(s.codes.scales_OG) for s in solutions):
        raise SolverError(
            f"{layer}, or one with the same inputs: its weights are too large for {rule.grid.scale_dtype} scales",
            hint="compress a checkpoint whose weights are of usual size",
        )
    if rule.refine and rule.grid is not None and rule.quantizer == "gptq":
        assert H_II is not None
        del W_IO, U_II, done
        with dampened(H_II, rule.dampening):
            solutions = [_refined(w, s, H_II, rule) for w, s in zip(given_OI, solutions, strict=True)]
    return solutions


def _refined(W_OI: Tensor, solution: Solution, H_II: Tensor, rule: SolverRule) -> Solution:
    codes = solution.codes
    assert codes is not None and rule.grid is not None
    codes_OI = codes.codes_OI.clone()
    improve_codes(
        codes_OI,
        (W_OI.float() - solution.weight_OI) @ H_II,
        H_II,
        codes.scales_OG.contiguous(),
        codes.zeros_OG.float().contiguous(),
        codes.g_idx_I,
        keep_OI=solution.keep_OI,
        max_code=rule.grid.max_code,
        sweeps=rule.refine,
    )
    better = replace(codes, codes_OI=codes_OI)
    return replace(solution, weight_OI=better.values(), codes=better)


@dataclass(frozen=True)
class _StaticGrids:
    """Grids of the groups as they lie in the layer, and the group of every input in the order in which it is taken."""

    grids: list[Grid]
    group_of: list[int]

    @classmethod
    def fit(cls, W_IO: Tensor, rule: GridRule | None, keep_IO: Tensor | None, order_I: Tensor) -> "_StaticGrids":
        assert rule is not None and rule.group_size is not None
        back_I = torch.argsort(order_I)
        grids = [
            fit_grid(W_IO[members], rule, keep_CO=None if keep_IO is None else keep_IO[members])
            for members in back_I.split(rule.group_size)
        ]
        return cls(grids, (order_I // rule.group_size).tolist())


@dataclass
class _Swept:
    values_IO: Tensor
    keep_IO: Tensor | None
    codes_IO: Tensor | None
    grids: list[Grid]


def _spans(sizes: list[int]) -> list[slice]:
    ends = torch.tensor(sizes).cumsum(0).tolist()
    return [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]


def _side_by_side(weights_OI: list[Tensor], spans: list[slice]) -> Tensor:
    """(I, sum of O) float32, written in place: these are the largest tensors there are."""
    inputs, outputs = weights_OI[0].shape[1], spans[-1].stop
    W_IO = torch.empty(inputs, outputs, dtype=torch.float32, device=weights_OI[0].device)
    for w, span in zip(weights_OI, spans, strict=True):
        W_IO[:, span] = w.T
    return W_IO


def block_size(mask: MaskRule | None, grid: GridRule | None, in_features: int) -> int:
    """Whole groups and whole n:m runs, at least BLOCK inputs."""
    unit = math.lcm(grid.group_size or 1 if grid else 1, mask.m or 1 if mask else 1)
    return min(unit * math.ceil(BLOCK / unit), in_features)


def _order(H_II: Tensor | None, rule: SolverRule, in_features: int) -> Tensor:
    """The order in which inputs are taken: those with the largest second moment first."""
    if H_II is None or rule.act_order == "none" or not rule.feeds_back:
        return torch.arange(in_features)
    energy_I = torch.diagonal(H_II)
    if rule.act_order == "column" or rule.static_grids:
        return torch.argsort(energy_I, descending=True, stable=True)
    run = rule.mask.m if rule.mask is not None and rule.mask.m else 1
    group = rule.grid.group_size if rule.grid is not None and rule.grid.group_size else in_features
    # what must stay together: n:m runs within groups, or groups within longer runs, whose own inputs are then free
    sizes = (run, group, in_features) if run <= group else (1, group, run, in_features)
    positions = torch.arange(in_features, device=H_II.device)
    for unit, within in itertools.pairwise(sizes):
        blocks = positions.view(-1, within // unit, unit)
        rank = energy_I[blocks].sum(-1).argsort(dim=1, descending=True, stable=True)
        positions = torch.gather(blocks, 1, rank[..., None].expand_as(blocks)).flatten()
    return positions


def _fixed_mask(
    W_IO: Tensor, H_II: Tensor | None, order_I: Tensor, rule: SolverRule, spans: list[slice]
) -> Tensor | None:
    if rule.keep_zeros:
        return W_IO != 0
    if rule.mask is None or rule.pruner == "sparsegpt":
        return None
    if rule.pruner == "magnitude":
        return torch.cat([keep_largest(W_IO[:, span].abs().contiguous(), rule.mask) for span in spans], dim=1)
    assert H_II is not None, "Wanda needs input norms"
    norm_I = torch.diagonal(H_II)[order_I].sqrt()
    return torch.cat([keep_per_output(W_IO[:, span].abs() * norm_I[:, None], rule.mask) for span in spans], dim=1)


def _sweep(
    W_IO: Tensor,
    U_II: Tensor | None,
    mask: MaskRule | None,
    grid_rule: GridRule | None,
    fixed_keep_IO: Tensor | None,
    spans: list[slice],
    static: _StaticGrids | None = None,
) -> _Swept:
    """Take every input once, in the order given; W_IO is consumed and holds the result afterwards."""
    in_features = W_IO.shape[0]
    size = block_size(mask, grid_rule, in_features)
    keep_IO = fixed_keep_IO if mask is None else torch.ones_like(W_IO, dtype=torch.bool)
    swept = _Swept(W_IO, keep_IO, torch.empty_like(W_IO, dtype=torch.uint8) if grid_rule else None, [])
    if static is not None:
        swept.grids += static.grids
    elif grid_rule is not None and grid_rule.group_size is None:
        swept.grids.append(fit_grid(W_IO, grid_rule, keep_CO=fixed_keep_IO))
    for start in range(0, in_features, size):
        stop = min(start + size, in_features)
        if mask is not None and keep_IO is not None:
            keep_IO[start:stop] = _block_mask(W_IO[start:stop], U_II, start, stop, mask, spans)
        group_of = None if static is None else static.group_of[start:stop]
        errors_CO = _take_block(swept, U_II, grid_rule, start, stop, group_of)
        if U_II is not None and errors_CO is not None:
            W_IO[stop:].addmm_(U_II[start:stop, stop:].T, errors_CO, alpha=-1)
    return swept


def _block_mask(W_CO: Tensor, U_II: Tensor | None, start: int, stop: int, mask: MaskRule, spans: list[slice]) -> Tensor:
    """SparseGPT's saliency w^2 / U_ii^2: the loss a pruned weight leaves after its best correction."""
    assert U_II is not None
    score_CO = (W_CO / torch.diagonal(U_II)[start:stop, None]) ** 2
    return torch.cat([keep_largest(score_CO[:, span].contiguous(), mask) for span in spans], dim=1)


def _take_block(
    swept: _Swept,
    U_II: Tensor | None,
    grid_rule: GridRule | None,
    start: int,
    stop: int,
    group_of: list[int] | None = None,
) -> Tensor | None:
    """Round or prune inputs start..stop in place; the returned errors (C, O) are already divided by U_ii.

    `group_of` holds the inputs' places among the grids, where those are fitted already.
    """
    W_CO = swept.values_IO[start:stop]
    keep_CO = None if swept.keep_IO is None else swept.keep_IO[start:stop]
    if U_II is None:
        _round_block(swept, grid_rule, start, stop)
        return None
    errors_CO = torch.empty_like(W_CO)
    take = functools.partial(
        sweep_columns,
        W_CO,
        U_II[start:stop, start:stop],
        errors_CO,
        keep_CO=keep_CO,
        codes_CO=None if swept.codes_IO is None else swept.codes_IO[start:stop],
    )
    width = stop - start
    if grid_rule is None:
        take(range(width), grids=None)
    elif group_of is not None:
        take(range(width), grids=_stacked(swept.grids, group_of))
    elif grid_rule.group_size is None:
        take(range(width), grids=_stacked(swept.grids, [0] * width))
    else:
        for first in range(0, width, grid_rule.group_size):
            ahead = slice(first, first + grid_rule.group_size)
            swept.grids.append(fit_grid(W_CO[ahead], grid_rule, keep_CO=None if keep_CO is None else keep_CO[ahead]))
            take(range(width)[ahead], grids=_stacked(swept.grids[-1:], [0] * width))
    return errors_CO


def _stacked(grids: list[Grid], group_of: list[int]) -> Grids:
    return Grids(
        torch.stack([grid.scale_O for grid in grids]),
        torch.stack([grid.zero_O for grid in grids]),
        torch.tensor(group_of, dtype=torch.int32),
        grids[0].max_code,
    )


def _round_block(swept: _Swept, grid_rule: GridRule | None, start: int, stop: int) -> None:
    """Without feedback a block is pruned and rounded as it stands."""
    W_CO = swept.values_IO[start:stop]
    if swept.keep_IO is not None:
        W_CO.mul_(swept.keep_IO[start:stop])
    if grid_rule is None or swept.codes_IO is None:
        return
    group = grid_rule.group_size or stop - start
    for column in range(0, stop - start, group):
        part_CO = W_CO[column : column + group]
        if grid_rule.group_size is not None:
            swept.grids.append(fit_grid(part_CO, grid_rule))
        grid = swept.grids[-1]
        codes_CO = grid.codes(part_CO)
        swept.codes_IO[start + column : start + column + group] = codes_CO.to(torch.uint8)
        part_CO.copy_(grid.values(codes_CO))


def _solution(done: _Swept, span: slice, order_I: Tensor, rule: SolverRule, dampening: float | None) -> Solution:
    """Undo the order of inputs and cut one layer out of the stacked outputs."""
    back_I = torch.argsort(order_I)
    keep_OI = None if done.keep_IO is None else done.keep_IO[:, span][back_I].T.contiguous()
    if rule.grid is None or done.codes_IO is None:
        return Solution(done.values_IO[:, span][back_I].T.contiguous(), None, keep_OI, dampening)
    group = rule.grid.group_size or order_I.numel()
    if rule.static_grids:
        g_idx_I, first = (torch.arange(order_I.numel()) // group).int(), list(range(len(done.grids)))
    else:
        g_idx_I, first = _group_index(order_I, back_I, group)
    grids = [done.grids[i] for i in first]
    codes = Codes(
        codes_OI=done.codes_IO[:, span][back_I].T.contiguous(),
        scales_OG=torch.stack([g.scale_O[span] for g in grids], dim=1),
        zeros_OG=torch.stack([g.zero_O[span] for g in grids], dim=1).to(torch.uint8),
        g_idx_I=g_idx_I,
    )
    return Solution(codes.values(), codes, keep_OI, dampening)


def _group_index(order_I: Tensor, back_I: Tensor, group: int) -> tuple[Tensor, list[int]]:
    """Group of each input, and the order in which the fitted grids are stored.

    Groups that are contiguous in the layer are numbered as they lie there; scattered ones (column order) as fitted.
    """
    fitted_I = back_I // group
    natural_I = torch.arange(order_I.numel()) // group
    if torch.equal(order_I.view(-1, group).amin(1) // group, order_I.view(-1, group).amax(1) // group):
        return natural_I.int(), fitted_I[::group].tolist()
    return fitted_I.int().cpu(), list(range(order_I.numel() // group))
