"""Compress a model block by block, each with the inputs that the blocks before it, already compressed, produce.

T=tokens D=hidden width I=in_features O=out_features
"""

import contextlib
import functools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ctp_cli.compression.hessian import Hessian, all_finite
from ctp_cli.compression.solver import Solution, SolverRule, solve
from ctp_cli.compression.targets import Mismatch
from ctp_cli.errors import SolverError
from ctp_cli.models.activations import Tensors
from ctp_cli.models.blocks import Block, LinearLayer, SuspendedRun, WalkState, advance, flatten
from ctp_cli.models.processes import ALONE, Processes

_MEASURED_OUTPUTS = 512
"""Of a layer, for its relative error."""


@dataclass(frozen=True)
class LayerResult:
    """What became of one layer. `relative_error` is |X (W - W')|^2 / |X W|^2 on the calibration inputs.

    W are the weights handed to the solver: the old ones, or those corrected towards the full model's outputs. The
    solution's weights are those of the layer itself by now, in its dtype; `zeros` were counted before.
    """

    layer: LinearLayer
    solution: Solution
    zeros: int
    tokens: int
    relative_error: float | None
    solve_seconds: float


@dataclass(frozen=True)
class FullBlock:
    """A copy of the block from before its compression, on the hidden states that the full model has there."""

    block: Block
    state: WalkState
    writers: Sequence[str]
    """Names of the layers whose outputs are added to the residual stream (`residual_writers`)."""


@dataclass
class _Moments:
    hessian: Hessian
    mismatch: Mismatch | None

    def add_up(self, processes: Processes) -> None:
        processes.add_up(self.hessian.H_II)
        self.hessian.tokens = processes.total(self.hessian.tokens)
        if self.mismatch is not None:
            processes.add_up(self.mismatch.inputs_II)
            if self.mismatch.gap_OI is not None:
                processes.add_up(self.mismatch.gap_OI)
            self.mismatch.tokens = processes.total(self.mismatch.tokens)


@torch.no_grad()
def compress_block(
    block: Block,
    state: WalkState,
    rule: SolverRule,
    sets: Sequence[Sequence[LinearLayer]],
    *,
    true_sequential: bool,
    full: FullBlock | None = None,
    processes: Processes = ALONE,
) -> list[LayerResult]:
    """Compress every layer of a block in place and replace the hidden states by the compressed block's outputs.

    `sets` are the layers fed by the same tensor (`shared_inputs`): they share one Hessian and are solved together. With
    `true_sequential` each set sees inputs made by the sets before it in their compressed form. With `full`, which needs
    it, the layers aim at the full model's outputs instead of their own, and its hidden states move on as well.
    Of several `processes`, each with hidden states of its own, the main one solves, from the moments of all; the others
    get its weights, and an empty list.
    Raises: SolverError, naming the layer, where its equations cannot be solved or its inputs are not finite.
    """
    if not rule.needs_hessian:
        results = [result for layers in sets for result in _solve_set(layers, None, rule, processes)]
        advance(block, state)
        return results
    results, waiting = [], []
    with _calibration(block, state, sets, full) as calibration:
        for layers in sets:
            moments = calibration.moments(layers)
            moments.add_up(processes)
            if true_sequential:
                results += _solve_set(layers, moments, rule, processes)
            else:
                waiting.append((layers, moments))
        calibration.finish(with_outputs=true_sequential)
    if waiting:
        results = [result for layers, moments in waiting for result in _solve_set(layers, moments, rule, processes)]
        advance(block, state)
    return results


@contextlib.contextmanager
def _calibration(
    block: Block, state: WalkState, sets: Sequence[Sequence[LinearLayer]], full: FullBlock | None
) -> Iterator["_Calibration"]:
    stops = {layers[0].name for layers in sets}
    with contextlib.ExitStack() as stack:
        run = stack.enter_context(SuspendedRun(block, stops, state))
        if full is None:
            yield _Calibration(run, None, (), [])
            return
        full_run = stack.enter_context(SuspendedRun(full.block, stops, full.state))
        gaps = state.activations.new()
        for ours, theirs, keep in zip(state.hidden_BTD, full.state.hidden_BTD, state.keep_BT, strict=True):
            gaps.append(flatten(theirs, keep).float() - flatten(ours, keep).float())
        for members, of_run, sign in ((block, run, -1), (full.block, full_run, 1)):
            add = functools.partial(_add_to_gap, gaps, sign)
            for layer in members.layers:
                if layer.name in full.writers:
                    stack.enter_context(of_run.watching(layer, add))
        yield _Calibration(run, full_run, full.writers, gaps)


def _add_to_gap(gaps_TD: Tensors, sign: int, batch: int, y_TD: Tensor) -> None:
    gaps_TD[batch] = gaps_TD[batch].add_(y_TD, alpha=sign)


@dataclass
class _Calibration:
    """The block's run, the full model's beside it, and what the residual stream lacks so far, for every batch."""

    run: SuspendedRun
    full_run: SuspendedRun | None
    writers: Sequence[str]
    gaps_TD: Tensors

    def moments(self, layers: Sequence[LinearLayer]) -> _Moments:
        O, I = layers[0].weight_OI.shape
        device = layers[0].weight_OI.device
        hessian = Hessian.zeros(I, device=device)
        if self.full_run is None:
            for _, x_TI in self.run.inputs(layers[0]):
                hessian.add(x_TI)
            return _Moments(hessian, None)
        writes = layers[0].name in self.writers
        mismatch = Mismatch.zeros(I, O if writes else None, device)
        pairs = zip(self.run.inputs(layers[0]), self.full_run.inputs(layers[0]), strict=True)
        for (batch, x_TI), (_, x_full_TI) in pairs:
            hessian.add(x_TI)
            mismatch.add(x_full_TI, x_TI, self.gaps_TD[batch] if writes else None)
        return _Moments(hessian, mismatch)

    def finish(self, *, with_outputs: bool) -> None:
        if with_outputs:
            self.run.finish()
        if self.full_run is not None:
            self.full_run.finish()


def _solve_set(
    layers: Sequence[LinearLayer], moments: _Moments | None, rule: SolverRule, processes: Processes
) -> list[LayerResult]:
    results = _solved(layers, moments, rule) if processes.is_main else []
    if processes.count > 1:
        for layer in layers:
            weight_OI = layer.weight_OI.contiguous()
            processes.tell(weight_OI)
            layer.set_weight(weight_OI)
    return results


def _solved(layers: Sequence[LinearLayer], moments: _Moments | None, rule: SolverRule) -> list[LayerResult]:
    started = time.perf_counter()
    before = [layer.weight_OI for layer in layers]
    for layer, weight_OI in zip(layers, before, strict=True):
        if not all_finite(weight_OI):
            raise SolverError(f"{layer.name}: its weights hold NaN or infinity", hint="is the checkpoint damaged?")
    H_II = None if moments is None else moments.hessian.mean()
    if moments is not None and moments.mismatch is not None and H_II is not None:
        wide = [weight_OI.float() for weight_OI in before]
        before = moments.mismatch.corrected(wide, H_II, dampening=rule.dampening, layer=layers[0].name)
    solutions = solve(before, H_II, rule, layer=layers[0].name)
    seconds = (time.perf_counter() - started) / len(layers)
    results = []
    for layer, weight_OI, solution in zip(layers, before, solutions, strict=True):
        # before set_weight: weight_OI may be a view of the weight itself
        error = None if H_II is None else _relative_error(weight_OI, solution.weight_OI, H_II)
        layer.set_weight(solution.weight_OI)
        zeros = int((solution.weight_OI == 0).sum())
        kept = replace(solution, weight_OI=layer.weight_OI, keep_OI=None)
        results.append(LayerResult(layer, kept, zeros, moments.hessian.tokens if moments else 0, error, seconds))
    return results


def _relative_error(W_OI: Tensor, Q_OI: Tensor, H_II: Tensor) -> float:
    """Of a layer with many outputs, on some, evenly spread: all of them would take as long as solving."""
    step = -(-W_OI.shape[0] // _MEASURED_OUTPUTS)
    W_OI = W_OI[::step].float()
    lost_OI = W_OI - Q_OI[::step]
    whole, lost = (((weight_OI @ H_II) * weight_OI).sum() for weight_OI in (W_OI, lost_OI))
    return (lost / whole.clamp(min=1e-30)).item()
