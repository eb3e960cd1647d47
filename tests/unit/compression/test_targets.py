"""Weights that aim at the full model's outputs, against least squares in float64 and on tiny models."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import VOCAB_SIZE, tiny_model
from transformers import AutoModelForCausalLM

from ctp_cli.compression.blockwise import FullBlock, compress_block
from ctp_cli.compression.grid import GridRule
from ctp_cli.compression.hessian import Hessian
from ctp_cli.compression.masks import MaskRule
from ctp_cli.compression.solver import SolverRule
from ctp_cli.compression.targets import Mismatch
from ctp_cli.models.blocks import advance, copy_of, find_blocks, residual_writers, shared_inputs, start_walk

TOKENS, I, O = 400, 24, 10
GRID = GridRule(4, 32, True, mse_clip=False)
RULES = {
    "joint": SolverRule(MaskRule(0.5), GRID),
    "pruned": SolverRule(MaskRule(0.5), None, pruner="alternating"),
}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("with_gap", [True, False])
def test_correction_is_the_least_squares_fit_to_the_full_models_outputs(
    dtype: torch.dtype, tolerance: float, with_gap: bool
) -> None:
    g = torch.Generator().manual_seed(0)
    x_full = torch.randn(TOKENS, I, generator=g).to(dtype)
    x = (x_full.float() @ (torch.eye(I) + 0.2 * torch.randn(I, I, generator=g))).to(dtype)
    gap = 0.3 * torch.randn(TOKENS, O, generator=g) if with_gap else None
    W = torch.randn(O, I, generator=g)
    hessian, mismatch = Hessian.zeros(I, W.device), Mismatch.zeros(I, O if with_gap else None, W.device)
    for part in (slice(0, 150), slice(150, TOKENS)):
        hessian.add(x[part])
        mismatch.add(x_full[part], x[part], None if gap is None else gap[part])
    ours = mismatch.corrected([W], hessian.mean(), dampening=1e-9, layer="layer")[0]
    wanted = x_full.double().numpy() @ W.double().numpy().T + (0 if gap is None else gap.double().numpy())
    expected = np.linalg.lstsq(x.double().numpy(), wanted, rcond=None)[0].T
    np.testing.assert_allclose(ours.numpy(), expected, rtol=0, atol=tolerance * np.abs(expected).max())
    assert np.abs(W.numpy() - expected).max() > 10 * tolerance, "the fit must differ from the old weights"


def test_equal_inputs_leave_the_weights_alone() -> None:
    x, W = torch.randn(TOKENS, I), torch.randn(O, I)
    hessian, mismatch = Hessian.zeros(I, W.device), Mismatch.zeros(I, O, W.device)
    hessian.add(x)
    mismatch.add(x, x, torch.zeros(TOKENS, O))
    assert torch.equal(mismatch.corrected([W], hessian.mean(), dampening=0.01, layer="layer")[0], W)


@pytest.fixture(scope="module", params=["llama", "phi", "gpt2", "opt350"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Usual wiring; parallel attention and MLP; transposed weights; norms after the addition."""
    return tiny_model(request.param, tmp_path_factory.mktemp("models") / request.param)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
def test_blocks_come_closer_to_the_full_model(folder: Path, rule: SolverRule) -> None:
    """Both blocks compressed either way: the last hidden states, on the calibration text, padding left out."""
    errors = {}
    for aims_at_full in (True, False):
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        blocks = find_blocks(model)
        ids = torch.randint(3, VOCAB_SIZE, (40, 24), generator=torch.Generator().manual_seed(0))
        mask = torch.ones_like(ids)
        mask[7, 10:] = 0
        state = start_walk(model, blocks, list(zip(ids.split(8), mask.split(8), strict=True)))
        full_state = replace(state, hidden_BTD=list(state.hidden_BTD))
        plain_state = replace(state, hidden_BTD=list(state.hidden_BTD))
        for block in blocks:
            advance(block, plain_state)  # while its weights are the old ones
            sets, original = shared_inputs(block, state), copy_of(block)
            writers = residual_writers(original, full_state, shared_inputs(original, full_state))
            full = FullBlock(original, full_state, [layer.name for layer in writers]) if aims_at_full else None
            compress_block(block, state, rule, sets, true_sequential=True, full=full)
            if aims_at_full:
                for ours, expected in zip(full_state.hidden_BTD, plain_state.hidden_BTD, strict=True):
                    assert torch.equal(ours, expected)
        kept = mask.bool().split(8)
        lost = [
            (ours - wanted)[keep].square().sum()
            for ours, wanted, keep in zip(state.hidden_BTD, plain_state.hidden_BTD, kept, strict=True)
        ]
        errors[aims_at_full] = torch.stack(lost).sum().item()
    assert errors[True] < 0.97 * errors[False]
