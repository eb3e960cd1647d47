"""Compress a model block by block, each with the inputs that the blocks before it, already compressed, produce."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ctp_cli.compression.hessian import Hessian
from ctp_cli.compression.solver import Solution, SolverRule, solve
from ctp_cli.errors import SolverError
from ctp_cli.models.blocks import Block, LinearLayer, SuspendedRun, WalkState, advance, visit_inputs


@dataclass(frozen=True)
class LayerResult:
    """What became of one layer. `relative_error` is |X (W - W')|^2 / |X W|^2 on the calibration inputs."""

    layer: LinearLayer
    solution: Solution
    tokens: int
    relative_error: float | None
    solve_seconds: float


def compress_block(
    block: Block, state: WalkState, rule: SolverRule, sets: Sequence[Sequence[LinearLayer]], *, true_sequential: bool
) -> list[LayerResult]:
    """Compress every layer of a block in place and replace the hidden states by the compressed block's outputs.

    `sets` are the layers fed by the same tensor (`shared_inputs`): they share one Hessian and are solved together. With
    `true_sequential` each set sees inputs made by the sets before it in their compressed form.
    Raises: SolverError, naming the layer, where its equations cannot be solved or its inputs are not finite.
    """
    if not rule.needs_hessian:
        results = [result for layers in sets for result in _solve_set(layers, None, rule)]
        advance(block, state)
        return results
    if true_sequential:
        return _in_sequence(block, state, rule, sets)
    hessians = {layers[0].name: _empty_hessian(layers[0]) for layers in sets}
    visit_inputs(block, [layers[0] for layers in sets], state, lambda layer, x_TI: hessians[layer.name].add(x_TI))
    results = [result for layers in sets for result in _solve_set(layers, hessians[layers[0].name], rule)]
    advance(block, state)
    return results


@torch.no_grad()
def _in_sequence(
    block: Block, state: WalkState, rule: SolverRule, sets: Sequence[Sequence[LinearLayer]]
) -> list[LayerResult]:
    results = []
    run = SuspendedRun(block, [layers[0] for layers in sets], state)
    try:
        for layers in sets:
            hessian = _empty_hessian(layers[0])
            for x_TI in run.inputs(layers[0]):
                hessian.add(x_TI)
            results += _solve_set(layers, hessian, rule)
        run.finish()
    finally:
        run.close()
    return results


def _empty_hessian(layer: LinearLayer) -> Hessian:
    return Hessian.zeros(layer.weight_OI.shape[1], device=layer.weight_OI.device)


def _solve_set(layers: Sequence[LinearLayer], hessian: Hessian | None, rule: SolverRule) -> list[LayerResult]:
    started = time.perf_counter()
    before = [layer.weight_OI.float() for layer in layers]
    for layer, weight_OI in zip(layers, before, strict=True):
        if not torch.isfinite(weight_OI).all():
            raise SolverError(f"{layer.name}: its weights hold NaN or infinity", hint="is the checkpoint damaged?")
    H_II = None if hessian is None else hessian.mean()
    solutions = solve(before, H_II, rule, layer=layers[0].name)
    seconds = (time.perf_counter() - started) / len(layers)
    results = []
    for layer, weight_OI, solution in zip(layers, before, solutions, strict=True):
        # before set_weight: of a float32 layer, weight_OI is a view of the weight itself
        error = None if H_II is None else _relative_error(weight_OI, solution.weight_OI, H_II)
        layer.set_weight(solution.weight_OI)
        results.append(LayerResult(layer, solution, hessian.tokens if hessian else 0, error, seconds))
    return results


def _relative_error(W_OI: Tensor, Q_OI: Tensor, H_II: Tensor) -> float:
    D_OI = W_OI - Q_OI
    lost, whole = ((D_OI @ H_II) * D_OI).sum(), ((W_OI @ H_II) * W_OI).sum()
    return (lost / whole.clamp(min=1e-30)).item()
