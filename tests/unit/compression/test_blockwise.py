"""One block of a real (tiny, random) model, compressed in place."""

from pathlib import Path

import pytest
import torch
from tiny_models import VOCAB_SIZE, tiny_model
from transformers import AutoModelForCausalLM

from ctp_cli.compression.blockwise import compress_block
from ctp_cli.compression.grid import GridRule
from ctp_cli.compression.masks import MaskRule
from ctp_cli.compression.solver import SolverRule, solve
from ctp_cli.errors import SolverError
from ctp_cli.models.blocks import Block, WalkState, find_blocks, shared_inputs, start_walk

RULE = SolverRule(MaskRule(0.5), GridRule(4, 32, True, mse_clip=False))


@pytest.fixture(scope="module", params=["llama", "phi", "gpt2"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Usual wiring; attention and MLP side by side on one input; transposed and fused weights."""
    return tiny_model(request.param, tmp_path_factory.mktemp("models") / request.param)


def first_block(folder: Path, *, filler: int = 0) -> tuple[Block, WalkState]:
    """Three batches, the last shorter and padded; 24 * 5 - 14 - 7 tokens of text."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    blocks = find_blocks(model)
    ids = torch.randint(3, VOCAB_SIZE, (5, 24), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[4, 10:], mask[3, 17:] = 0, 0
    ids[mask == 0] = filler
    return blocks[0], start_walk(model, blocks, [(ids[part], mask[part]) for part in (slice(2), slice(2, 4), [4])])


def run(
    block: Block, state: WalkState, hidden: list[torch.Tensor]
) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
    """Each layer's inputs (T, I) without padding, by torch's own hooks in one run, and the block's outputs."""
    seen: dict[str, list[torch.Tensor]] = {layer.name: [] for layer in block.layers}
    outputs = []
    for batch, x in enumerate(hidden):
        hooks = []
        for layer in block.layers:

            def keep(_module: object, args: tuple[torch.Tensor, ...], name: str = layer.name, b: int = batch) -> None:
                seen[name].append(args[0][state.keep_BT[b]].double())

            hooks.append(layer.module.register_forward_pre_hook(keep))
        with torch.no_grad():
            outputs.append(state.calls[0][batch].run(block.module, x))
        for hook in hooks:
            hook.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}, outputs


@pytest.mark.parametrize("true_sequential", [True, False])
def test_the_reported_error_is_the_change_of_the_layers_outputs(folder: Path, true_sequential: bool) -> None:
    block, state = first_block(folder)
    hidden = list(state.hidden_BTD)
    before = {layer.name: layer.weight_OI.clone().double() for layer in block.layers}
    dense_inputs, _ = run(block, state, hidden)
    results = compress_block(block, state, RULE, shared_inputs(block, state), true_sequential=true_sequential)
    compressed_inputs, outputs = run(block, state, hidden)  # what the compressed layers hand to each other
    assert {r.layer.name for r in results} == set(before)
    for result in results:
        name = result.layer.name
        x = (compressed_inputs if true_sequential else dense_inputs)[name]
        assert result.tokens == 24 * 5 - 14 - 7
        lost = (x @ (before[name] - result.layer.weight_OI.double()).T).square().sum()
        expected = (lost / (x @ before[name].T).square().sum()).item()
        assert result.relative_error == pytest.approx(expected, rel=1e-3)  # float32 sums over 99 tokens
        assert torch.equal(result.layer.weight_OI, result.solution.weight_OI)
    last = block.layers[-1].name  # it has layers before it, so the two forms must differ
    assert not torch.allclose(dense_inputs[last], compressed_inputs[last], rtol=1e-3)
    for ours, expected_output in zip(state.hidden_BTD, outputs, strict=True):
        assert torch.equal(ours, expected_output)  # the next block sees what this one, compressed, really gives


def test_true_sequential_is_one_forward_pass_per_set_of_layers(folder: Path) -> None:
    """The plain form: run everything again after each set, and solve the next one on what it then receives."""
    block, state = first_block(folder)
    plain_block, plain_state = first_block(folder)
    results = compress_block(block, state, RULE, shared_inputs(block, state), true_sequential=True)
    solved = {result.layer.name: result.solution for result in results}
    for layers in shared_inputs(plain_block, plain_state):
        x = run(plain_block, plain_state, plain_state.hidden_BTD)[0][layers[0].name]
        weights = [layer.weight_OI.clone() for layer in layers]
        for layer, solution in zip(
            layers, solve(weights, (x.T @ x / len(x)).float(), RULE, layer="layer"), strict=True
        ):
            # the two Hessians differ in the last bits of float32, which may turn a code that lies on a boundary
            assert (solution.codes.codes_OI == solved[layer.name].codes.codes_OI).float().mean() > 0.98
            layer.set_weight(solved[layer.name].weight_OI)


@pytest.mark.parametrize("true_sequential", [True, False])
def test_padding_does_not_count(folder: Path, true_sequential: bool) -> None:
    """The text of a padded batch, and the same batch whose padding holds other tokens: equal to the last bit."""
    results = []
    for filler in (5, 200):
        block, state = first_block(folder, filler=filler)
        results.append(compress_block(block, state, RULE, shared_inputs(block, state), true_sequential=true_sequential))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one.solution.weight_OI, other.solution.weight_OI)


def test_baselines_without_a_hessian_still_move_the_hidden_states_on(folder: Path) -> None:
    block, state = first_block(folder)
    hidden = list(state.hidden_BTD)
    rule = SolverRule(MaskRule(0.5), None, pruner="magnitude")
    results = compress_block(block, state, rule, shared_inputs(block, state), true_sequential=True)
    assert all(result.relative_error is None and result.tokens == 0 for result in results)
    for ours, expected in zip(state.hidden_BTD, run(block, state, hidden)[1], strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("true_sequential", [True, False])
def test_what_is_not_finite_is_named_and_the_model_can_still_run(folder: Path, true_sequential: bool) -> None:
    block, state = first_block(folder)
    sets = shared_inputs(block, state)
    broken = sets[-1][0]
    hidden, weight = list(state.hidden_BTD), broken.weight_OI.clone()
    broken.weight_OI[3, 4] = float("nan")
    with pytest.raises(SolverError, match=rf"{broken.name}: its weights hold NaN"):
        compress_block(block, state, RULE, sets, true_sequential=true_sequential)
    broken.set_weight(weight)
    state.hidden_BTD[:] = hidden
    assert torch.isfinite(run(block, state, hidden)[1][0]).all()  # no hook of ours is left behind
    state.hidden_BTD[0] = torch.full_like(hidden[0], float("inf"))
    with pytest.raises(SolverError, match=rf"{sets[0][0].name}: its calibration inputs hold NaN"):
        compress_block(block, state, RULE, sets, true_sequential=true_sequential)
