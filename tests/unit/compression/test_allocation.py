"""Sparsities over depth: their arithmetic, and the share of outliers against numpy on inputs recorded by hooks."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import tiny_model

from ctp_cli.compression.allocation import allocate, outlier_share
from ctp_cli.models.activations import Activations
from ctp_cli.models.blocks import advance, find_blocks, shared_inputs, start_walk
from ctp_cli.models.loading import load_model

SHARES = [0.04, 0.01, 0.02, 0.03]


def test_the_mean_is_kept_and_more_outliers_mean_less_pruning() -> None:
    found = allocate(SHARES, [1, 1, 1, 1], 0.7, reach=0.08)
    # OWL's own code: shares moved to a range of 2 lambda, their mean taken off
    kept = (np.array(SHARES) - 0.01) / 0.03 * 0.16
    assert np.allclose(found, 0.7 - (kept - kept.mean()), atol=1e-12)
    assert np.isclose(max(found) - min(found), 0.16)


@pytest.mark.parametrize("sparsity", [0.01, 0.3, 0.7, 0.97])
def test_large_blocks_count_for_more_and_no_block_is_pruned_out_of_proportion(sparsity: float) -> None:
    weights = [100, 1, 5, 5]
    found = allocate(SHARES, weights, sparsity, reach=0.4)
    assert np.isclose(np.average(found, weights=weights), sparsity, atol=1e-12)
    assert np.array_equal(np.argsort(found), np.argsort(SHARES)[::-1])
    assert min(found) >= sparsity / 2 - 1e-12
    assert 1 - max(found) >= (1 - sparsity) / 2 - 1e-12


def test_blocks_with_equal_shares_are_pruned_alike() -> None:
    assert allocate([0.02, 0.02], [3, 1], 0.6) == [0.6, 0.6]


@pytest.mark.parametrize("run_again", [False, True])
@pytest.mark.parametrize("family", ["llama_tied_gqa", "gpt2"])
def test_outliers_are_those_of_the_whole_block(family: str, run_again: bool, tmp_path: Path) -> None:
    model = load_model(tiny_model(family, tmp_path / "model"))
    ids_NT = torch.randint(3, 300, (3, 24), generator=torch.Generator().manual_seed(0))
    blocks = find_blocks(model)
    with torch.no_grad():
        for block in blocks:  # one far input and one strong output, so that layers and blocks differ
            block.layers[-1].weight_OI[0] *= 10 * (1 + block.index)
            block.layers[0].weight_OI[:, 3] *= 30
    inputs: dict[str, list[np.ndarray]] = {layer.name: [] for block in blocks for layer in block.layers}
    hooks = [
        layer.module.register_forward_pre_hook(
            lambda _m, x, name=layer.name: inputs[name].append(x[0].double().flatten(0, -2).numpy())
        )
        for block in blocks
        for layer in block.layers
    ]
    with torch.no_grad():
        model(ids_NT)
    for hook in hooks:
        hook.remove()
    activations = Activations(tmp_path if run_again else None)
    batches = [(ids_BT, None) for ids_BT in ids_NT.split(2)]
    state, plain = (start_walk(model, blocks, batches, activations=a) for a in (activations, Activations()))
    shares = []
    for block in blocks:
        shares.append(outlier_share(block, state, shared_inputs(block, state)))
        advance(block, plain)
        for ours, theirs in zip(state.hidden_BTD, plain.hidden_BTD, strict=True):
            assert torch.equal(ours, theirs), "the next block needs this one's outputs"
        scores = np.concatenate(
            [
                (
                    np.abs(layer.weight_OI.double().numpy())
                    * np.linalg.norm(np.concatenate(inputs[layer.name]), axis=0)
                ).ravel()
                for layer in block.layers
            ]
        )
        # float32 norms may put a weight or two on the other side of the threshold
        assert shares[-1] == pytest.approx((scores > 5 * scores.mean()).mean(), abs=2.5 / scores.size)
    assert min(shares) > 0.001 and shares[0] != shares[1]
