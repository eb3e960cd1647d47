"""Walking every supported family block by block, against what transformers itself computes."""

from pathlib import Path

import pytest
import torch
from tiny_models import FAMILIES, VOCAB_SIZE, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ctp_cli.compression.hessian import Hessian
from ctp_cli.models.blocks import (
    Block,
    SuspendedRun,
    WalkState,
    advance,
    find_blocks,
    residual_writers,
    shared_inputs,
    start_walk,
)

_SWIGLU = [{"q_proj", "k_proj", "v_proj"}, {"o_proj"}, {"gate_proj", "up_proj"}, {"down_proj"}]
_FUSED = [{"query_key_value"}, {"dense"}, {"dense_h_to_4h"}, {"dense_4h_to_h"}]
_OPT = [{"q_proj", "k_proj", "v_proj"}, {"out_proj"}, {"fc1"}, {"fc2"}]
# Where the decoder's blocks are, and their layers as the model's authors wire them: in order, those of a set share
# their input. Read in the families' modelling files; a parallel block (Phi) feeds attention and MLP the same tensor.
WIRING: dict[str, tuple[str, list[set[str]]]] = {
    "llama": ("model.layers", _SWIGLU),
    "llama_tied_gqa": ("model.layers", _SWIGLU),
    "mistral": ("model.layers", _SWIGLU),
    "qwen2": ("model.layers", _SWIGLU),
    "qwen3": ("model.layers", _SWIGLU),
    "gemma": ("model.layers", _SWIGLU),
    "gemma3": ("model.layers", _SWIGLU),
    "opt": ("model.decoder.layers", _OPT),
    "opt350": ("model.decoder.layers", _OPT),
    "gpt2": ("transformer.h", [{"c_attn"}, {"attn.c_proj"}, {"c_fc"}, {"mlp.c_proj"}]),
    "phi": ("model.layers", [{"q_proj", "k_proj", "v_proj", "fc1"}, {"dense"}, {"fc2"}]),
    "gpt_neox": ("gpt_neox.layers", _FUSED),
    "bloom": ("transformer.h", _FUSED),
}
# blocks that differ from each other: windows of four tokens in the first and none in the second
EXTRA = {
    "gemma3": {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "mistral": {"sliding_window": 4},
}
# norms between the layers' outputs and the residual stream, or after the addition
NO_PLAIN_RESIDUAL = {"gemma3", "opt350"}
CASES = [*((family, {}) for family in FAMILIES), *EXTRA.items()]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case[0] + ("-windows" if case[1] else ""))
def family_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    family, settings = request.param
    return family, tiny_model(family, tmp_path_factory.mktemp("models") / family, **settings)


@pytest.fixture
def family(family_model: tuple[str, Path]) -> str:
    return family_model[0]


@pytest.fixture
def model(family_model: tuple[str, Path]) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(family_model[1]).eval()


def batches(padding: str) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    ids = torch.randint(3, VOCAB_SIZE, (5, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    if padding == "right":
        mask[0, 7:], mask[2, 10:] = 0, 0
    elif padding == "left":
        mask[0, :5], mask[2, :2] = 0, 0
    ids = ids * mask
    return [(part, None if padding == "none" else keep) for part, keep in zip(ids.split(2), mask.split(2), strict=True)]


def begin(
    model: PreTrainedModel, blocks: list[Block], data: list[tuple[torch.Tensor, torch.Tensor | None]]
) -> WalkState:
    """Recorders left in place of the blocks' own forwards would run for ever below."""
    state = start_walk(model, blocks, data)
    assert all(block.module.forward.__func__ is type(block.module).forward for block in blocks)
    return state


def short(name: str, wanted: set[str]) -> str:
    """A layer's last name, or its last two where the wiring tells layers of the same name apart."""
    two = ".".join(name.split(".")[-2:])
    return two if two in wanted else name.rsplit(".", 1)[-1]


def test_blocks_hold_every_linear_layer_of_the_decoder(family: str, model: PreTrainedModel) -> None:
    blocks = find_blocks(model)
    prefix, sets = WIRING[family]
    assert [block.name for block in blocks] == [f"{prefix}.0", f"{prefix}.1"]
    names = {layer.name for block in blocks for layer in block.layers}
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    assert names == {name for name in linears if name.startswith(prefix + ".")}
    assert len(names) == 2 * sum(len(one) for one in sets)
    outside = {"lm_head"} | ({"model.decoder.project_in", "model.decoder.project_out"} if family == "opt350" else set())
    assert linears - names == outside


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_that_write_to_the_residual_stream_are_found(
    family: str, model: PreTrainedModel, dtype: torch.dtype
) -> None:
    """In every family the attention's and the MLP's last layers, read in the modelling files."""
    blocks = find_blocks(model.to(dtype))
    state = begin(model, blocks, batches("right"))
    sets = shared_inputs(blocks[0], state)
    found = residual_writers(blocks[0], state, sets)
    single = [layers[0] for layers in sets if len(layers) == 1 and "h_to_4h" not in layers[0].name]
    last = [layer for layer in single if not short(layer.name, set()).endswith(("fc1", "c_fc", "c_attn", "value"))]
    assert [layer.name for layer in found] == ([] if family in NO_PLAIN_RESIDUAL else [layer.name for layer in last])
    assert len(last) == 2


def test_weights_are_seen_as_outputs_by_inputs(model: PreTrainedModel) -> None:
    state = begin(model, (blocks := find_blocks(model)), batches("none"))
    for layer in blocks[0].layers:
        with torch.no_grad(), SuspendedRun(blocks[0], {layer.name}, state) as run:
            x = torch.cat([x_TI for _, x_TI in run.inputs(layer)])
        with torch.no_grad():
            expected = layer.module(x)
            bias = layer.module.bias
        ours = x.double() @ layer.weight_OI.double().T + (0 if bias is None else bias.detach().double())
        torch.testing.assert_close(ours.float(), expected, rtol=1e-4, atol=1e-5)  # float64 against float32
        layer.set_weight(torch.zeros_like(layer.weight_OI))
        assert not layer.parameter.any()


@pytest.mark.parametrize("padding", ["none", "right", "left"])
def test_walking_gives_the_hidden_states_that_transformers_reports(model: PreTrainedModel, padding: str) -> None:
    data = batches(padding)
    blocks = find_blocks(model)
    expected, outputs = reported_hidden_states(model, blocks, data)
    state = begin(model, blocks, data)
    for block in blocks:
        for batch, (_, mask) in enumerate(data):
            assert_same_where_text(state.hidden_BTD[batch], expected[batch][block.index], mask)
        advance(block, state)
    for batch, (_, mask) in enumerate(data):
        assert_same_where_text(state.hidden_BTD[batch], outputs[batch], mask)
    again, _ = reported_hidden_states(model, blocks, data)  # the walk leaves the model as it was
    for before, after in zip(expected, again, strict=True):
        for x, y in zip(before, after, strict=True):
            assert torch.equal(x, y)


def reported_hidden_states(
    model: PreTrainedModel, blocks: list[Block], data: list[tuple[torch.Tensor, torch.Tensor | None]]
) -> tuple[list[tuple[torch.Tensor, ...]], list[torch.Tensor]]:
    """Per batch: what goes into each block, as transformers reports it, and what comes out of the last one."""
    reported, outputs = [], []

    def keep(_module: object, _args: object, output: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    hook = blocks[-1].module.register_forward_hook(keep)
    with torch.no_grad():
        for ids, mask in data:
            reported.append(model(ids, attention_mask=mask, output_hidden_states=True).hidden_states)
    hook.remove()
    return reported, outputs


def assert_same_where_text(ours: torch.Tensor, expected: torch.Tensor, mask: torch.Tensor | None) -> None:
    keep = torch.ones(ours.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
    # the same float32 operations on the same numbers; only the choice of a kernel may differ
    torch.testing.assert_close(ours[keep], expected[keep], rtol=1e-5, atol=1e-5)


def test_a_walk_that_fails_leaves_the_model_as_it_was(model: PreTrainedModel) -> None:
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        expected = model(ids).logits
        with pytest.raises(IndexError):
            start_walk(model, find_blocks(model), [(ids, None), (ids + VOCAB_SIZE, None)])
        assert torch.equal(model(ids).logits, expected)


def test_layers_fed_by_one_tensor_are_found_together_in_order(family: str, model: PreTrainedModel) -> None:
    blocks = find_blocks(model)
    state = begin(model, blocks, batches("none"))
    wiring = WIRING[family][1]
    every = set().union(*wiring)
    for block in blocks:
        found = [{short(layer.name, every) for layer in layers} for layers in shared_inputs(block, state)]
        assert found == wiring
        advance(block, state)


def test_the_hessian_of_a_padded_batch_is_that_of_its_text_alone(model: PreTrainedModel) -> None:
    """Right padding of a causal model: the text of each row sees nothing of it, so rows can run on their own."""
    padded = batches("right")
    single = [(row[: int(keep.sum())][None], None) for ids, mask in padded for row, keep in zip(ids, mask, strict=True)]
    together, alone = hessians(model, padded), hessians(model, single)
    assert together.keys() == alone.keys()
    for name, hessian in together.items():
        assert hessian.tokens == alone[name].tokens == 5 * 12 - 5 - 2
        expected = alone[name].mean()
        # the same rows through matrix products of other shapes
        torch.testing.assert_close(hessian.mean(), expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


def hessians(model: PreTrainedModel, data: list[tuple[torch.Tensor, torch.Tensor | None]]) -> dict[str, Hessian]:
    blocks = find_blocks(model)
    state: WalkState = begin(model, blocks, data)
    found = {
        layer.name: Hessian.zeros(layer.weight_OI.shape[1], torch.device("cpu"))
        for block in blocks
        for layer in block.layers
    }
    for block in blocks:
        for layer in block.layers:
            with torch.no_grad(), SuspendedRun(block, {layer.name}, state) as run:
                for _, x_TI in run.inputs(layer):
                    found[layer.name].add(x_TI)
        advance(block, state)
    return found
