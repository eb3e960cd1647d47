"""Layers that keep tokens in place hold what transformers' own layers hold, whoever else looks at the same memory."""

import copy
import weakref
from contextlib import nullcontext

import torch
from ctp_kernels.prefix import GrowingLayer
from hypothesis import given
from hypothesis import strategies as st
from transformers.cache_utils import DynamicLayer

BATCH, HEADS, WIDTH = 2, 3, 4


def states(tokens: int, seed: int, *, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, BATCH, HEADS, tokens, WIDTH, generator=generator, dtype=dtype)
    return keys, values


OPERATIONS = st.one_of(
    st.tuples(st.just("append"), st.integers(0, 3), st.sampled_from([1, 1, 1, 2, 20])),
    st.tuples(st.just("append in inference mode"), st.integers(0, 3), st.just(1)),
    st.tuples(st.sampled_from(["copy", "deepcopy", "select"]), st.integers(0, 3), st.just(0)),
    st.tuples(st.just("crop"), st.integers(0, 3), st.integers(1, 3)),
)


@given(st.lists(OPERATIONS, max_size=30))
@torch.no_grad()
def test_layers_and_their_copies_hold_what_was_appended_to_each(operations):
    pairs = [(GrowingLayer(), DynamicLayer())]
    for layer in pairs[0]:
        layer.update(*states(17, 0))
    for number, (operation, which, size) in enumerate(operations, 1):
        ours, theirs = pairs[which % len(pairs)]
        if "append" in operation:
            new = states(size, number)
            with torch.inference_mode() if "inference" in operation else nullcontext():
                made = ours.update(*new)
            wanted = theirs.update(*new)
            assert all(torch.equal(*pair) for pair in zip(made, wanted, strict=True))
        elif operation == "select":
            for layer in (ours, theirs):
                layer.batch_select_indices(torch.tensor([1, 0]))
        elif operation == "crop":
            for layer in (ours, theirs):
                layer.crop(-size)
        else:
            # a copy of transformers' layer shares nothing that is ever written
            pairs.append((getattr(copy, operation)(ours), copy.copy(theirs)))
        for mine, plain in pairs:
            assert mine.get_seq_length() == plain.get_seq_length()
            assert torch.equal(mine.keys, plain.keys) and torch.equal(mine.values, plain.values)


@torch.no_grad()
def test_most_tokens_are_added_without_a_copy():
    layer, places = GrowingLayer(), []
    layer.update(*states(800, 0))
    for number in range(1, 101):
        keys, _ = layer.update(*states(1, number))
        places.append(keys.data_ptr())
    assert len(set(places)) == 1 and layer.get_seq_length() == 900
    assert keys.untyped_storage().nbytes() <= 901 * BATCH * HEADS * WIDTH * 4, "more room than an eighth"


def test_keys_that_autograd_keeps_are_not_written_over():
    layer = GrowingLayer()
    layer.update(*states(17, 0))
    queries, losses = torch.ones(BATCH, HEADS, 1, WIDTH, requires_grad=True), []
    for number in range(3):  # keys without gradients, as where queries alone are adapted
        keys, values = layer.update(*states(1, number))
        losses.append(torch.nn.functional.scaled_dot_product_attention(queries, keys, values).sum())
    sum(losses).backward()
    assert queries.grad is not None


@torch.no_grad()
def test_the_room_goes_with_the_keys():
    layer = GrowingLayer()
    for number, tokens in enumerate((800, 1)):
        layer.update(*states(tokens, number))
    room = weakref.ref(vars(layer.keys)["ctp_room"].keys)
    assert room() is not None
    layer.batch_select_indices(torch.tensor([1, 0]))
    assert room() is None


@torch.no_grad()
def test_another_type_is_joined_as_transformers_joins_it():
    layer, plain = GrowingLayer(), DynamicLayer()
    for other in (layer, plain):
        other.update(*states(17, 0))
        other.update(*states(1, 1))
        made, _ = other.update(*states(1, 2, dtype=torch.float64))
        assert made.dtype == torch.float64
    assert torch.equal(layer.keys, plain.keys)
