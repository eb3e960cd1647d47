"""Compress a model block by block, each with the inputs that the blocks before it, already compressed, produce."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ctp_cli.compression.hessian import Hessian
from ctp_cli.compression.solver import Solution, SolverRule, solve
from ctp_cli.errors import SolverError
from ctp_cli.models.blocks import Block, LinearLayer, WalkState, shared_inputs, visit_inputs


@dataclass(frozen=True)
class LayerResult:
    """What became of one layer. `relative_error` is |X (W - W')|^2 / |X W|^2 on the calibration inputs."""

    layer: LinearLayer
    solution: Solution
    tokens: int
    relative_error: float | None
    solve_seconds: float


def compress_block(
    block: Block,
    state: WalkState,
    rule: SolverRule,
    *,
    true_sequential: bool,
    on_layers: Callable[[Sequence[LinearLayer]], None] = lambda layers: None,
) -> list[LayerResult]:
    """Compress every layer of a block in place; the block's inputs are `state.hidden_BTD`.

    Layers fed by the same tensor share one Hessian and are solved together. With `true_sequential` each such set sees
    inputs made by the sets before it in their compressed form.
    Raises: SolverError, naming the layer, where its equations cannot be solved or its inputs are not finite.
    """
    sets = shared_inputs(block, state)
    hessians: dict[str, Hessian] = {}
    if rule.needs_hessian and not true_sequential:
        hessians = _accumulate(block, sets, state)
    results: list[LayerResult] = []
    for layers in sets:
        if rule.needs_hessian and true_sequential:
            hessians = _accumulate(block, [layers], state)
        results += _solve_set(layers, hessians.get(layers[0].name), rule)
        on_layers(layers)
    return results


def _accumulate(block: Block, sets: list[list[LinearLayer]], state: WalkState) -> dict[str, Hessian]:
    """One Hessian per set of layers, under the name of its first layer."""
    first = [layers[0] for layers in sets]
    hessians = {layer.name: Hessian.zeros(layer.weight_OI.shape[1], device=layer.weight_OI.device) for layer in first}
    visit_inputs(block, first, state, lambda layer, x_TI: hessians[layer.name].add(x_TI))
    return hessians


def _solve_set(layers: list[LinearLayer], hessian: Hessian | None, rule: SolverRule) -> list[LayerResult]:
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
        layer.set_weight(solution.weight_OI)
        error = None if H_II is None else _relative_error(weight_OI, solution.weight_OI, H_II)
        results.append(LayerResult(layer, solution, hessian.tokens if hessian else 0, error, seconds))
    return results


def _relative_error(W_OI: Tensor, Q_OI: Tensor, H_II: Tensor) -> float:
    D_OI = W_OI - Q_OI
    lost, whole = ((D_OI @ H_II) * D_OI).sum(), ((W_OI @ H_II) * W_OI).sum()
    return (lost / whole.clamp(min=1e-30)).item()
