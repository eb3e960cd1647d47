"""A soft prompt is a prefix: its keys and values are the same for every input, so they are computed once.

    prefix = prefix_cache(model, prompt_PD)
    with fast_arithmetic(model.device, behind_prefix=True):
        logits_BTV = model(ids_BT, **{cache_keyword(model): fresh_copy(prefix, batch_size=B)}).logits

gives what `model(inputs_embeds=[prompt, text])` gives at the positions of the text. No mask or positions
need to be passed: transformers derives both from the cache's length, for learned, rotary and ALiBi
positions alike. A mask, where one is needed for padding, covers prompt and text: (B, P + T).
"""

# P=prompt_tokens D=embedding_width B=batch T=tokens V=vocabulary H=heads C=head_width
import copy
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from ctp_kernels.arithmetic import where_slow


@torch.no_grad()
def prefix_cache(model: nn.Module, prompt_embeddings: Tensor) -> Cache:
    """Run the prompt through a Hugging Face causal LM once and keep its keys and values.

    Shapes: prompt_embeddings (P, D), P >= 1, any float dtype and device; they are moved to the model's.
    Returns: a cache of batch size 1 and P positions. A forward pass grows the cache it is given: hand it
    `fresh_copy(cache, batch_size=...)`, never this one.
    Raises: ValueError if the prompt is empty or not as wide as the model's token embeddings.
    """
    embedding = check_width(model, prompt_embeddings)
    if not len(prompt_embeddings):
        raise ValueError("a prefix needs at least one prompt row")
    inputs_1PD = prompt_embeddings.to(embedding.device, embedding.dtype)[None]
    with where_slow(inputs_1PD):
        return cache_of(model(inputs_embeds=inputs_1PD, use_cache=True, logits_to_keep=1))


def key_values_of(cache: Cache) -> Tensor:
    """The keys and values of a cache of batch size 1 as one tensor (layers, 2, H, P, C), keys first.

    Raises: ValueError where layers differ in shape or hold anything but the keys and values of every position.
    """
    layers: list[Any] = list(cache.layers)
    for layer in layers:
        if type(layer) not in _ORDINARY or not layer.is_initialized:
            raise ValueError(f"a layer of kind {type(layer).__name__} has no keys and values of its own")
    shapes = {tensor.shape for layer in layers for tensor in (layer.keys, layer.values)}
    if len(shapes) != 1 or next(iter(shapes))[2] != cache.get_seq_length():
        raise ValueError("the layers' keys and values differ in shape, or a sliding window has cut them")
    return torch.stack([torch.stack([layer.keys[0], layer.values[0]]) for layer in layers])


def cache_with(template: Cache, key_values_L2HPC: Tensor, batch_size: int) -> Cache:
    """`fresh_copy(template, batch_size)` with other keys and values in it; gradients flow back to them.

    Shapes: key_values as `key_values_of(template)`, in the model's dtype and on its device.
    Raises: ValueError if the shapes differ.
    """
    copied = fresh_copy(template, batch_size)
    layers: list[Any] = list(copied.layers)
    expected = (len(layers), 2, *layers[0].keys.shape[1:])
    if tuple(key_values_L2HPC.shape) != expected:
        raise ValueError(f"key_values: expected shape {expected}, got {tuple(key_values_L2HPC.shape)}")
    for layer, (keys, values) in zip(layers, key_values_L2HPC, strict=True):
        layer.keys = keys.expand(batch_size, -1, -1, -1)
        layer.values = values.expand(batch_size, -1, -1, -1)
    return copied


def cache_keyword(model: nn.Module) -> str:
    """What the model's forward calls its cache: `cache` since transformers 5.24, `past_key_values` before."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def cache_of(output: Any) -> Cache:
    """The cache in a model's output, under either name."""
    cache: Cache = output.cache if hasattr(output, "cache") else output.past_key_values
    return cache


def fresh_copy(cache: Cache, batch_size: int) -> Cache:
    """A cache of `batch_size` equal entries that starts where `cache` stands and may be grown freely.

    Shapes: per layer, keys and values (1, H, P, C) become (batch_size, H, P, C).
    Costs nothing for ordinary attention layers: the copy looks at the same memory, into which nobody writes. Its layers
    become `GrowingLayer`, so that generating from it copies less than from the cache that a model makes. Layers of
    other kinds (recurrent states) are copied in full.
    Raises: ValueError if `cache` does not have batch size 1.
    """
    copied = copy.copy(cache)
    copied.layers = [_copy_layer(layer, batch_size) for layer in cache.layers]
    return copied


def cache_bytes(cache: Cache) -> int:
    """Bytes of the keys and values a cache holds."""
    tensors = [t for layer in cache.layers for t in vars(layer).values() if isinstance(t, Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors if t.dim() == 4)


def check_width(model: Any, prompt_embeddings: Tensor) -> Tensor:
    """The model's token embedding table (V, D), after checking that the prompt (P, D) fits it."""
    table: Tensor = model.get_input_embeddings().weight
    if prompt_embeddings.dim() != 2 or prompt_embeddings.shape[1] != table.shape[1]:
        raise ValueError(
            f"prompt_embeddings: expected shape (prompt tokens, {table.shape[1]}), the width of this model's "
            f"token embeddings, got {tuple(prompt_embeddings.shape)}"
        )
    return table


@dataclass(frozen=True)
class _Room:
    """Keys and values (B, H, N, C) of more tokens than there are."""

    keys: Tensor
    values: Tensor


class GrowingLayer(DynamicLayer):
    """A layer that takes a few more tokens without copying those it has.

    transformers joins all keys and values to new tensors for every token. Here they lie in tensors an eighth longer,
    which are replaced when they are full. Under autograd, or for many tokens, it does as transformers does.
    """

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        new, keys, values = (key_states, value_states), self.keys, self.values
        before, added = self.get_seq_length(), key_states.shape[-2]
        if (
            keys is None
            or values is None
            or before < added * _FEW
            or torch.is_grad_enabled()
            or len({x.dtype for x in (keys, values, *new)}) > 1
        ):
            joined: tuple[Tensor, Tensor] = super().update(*new, *args, **kwargs)
            return joined
        # the room behind these keys belongs to them: it goes when they go, and whoever appends first takes it along
        room = vars(keys).pop(_ROOM, None)
        if room is None or room.keys.shape[-2] < before + added or _read_only(room):
            longer = before + added + before // _FEW
            room = _Room(_longer(keys, longer), _longer(values, longer))
        for kept, states in zip((room.keys, room.values), new, strict=True):
            kept[:, :, before : before + added] = states
        self.keys, self.values = (x[:, :, : before + added] for x in (room.keys, room.values))
        setattr(self.keys, _ROOM, room)
        return self.keys, self.values


_ROOM = "ctp_room"
_FEW = 8
"""Tokens are kept in place where this many are there, or more, for each that is added."""

_ORDINARY = (DynamicLayer, GrowingLayer, DynamicSlidingWindowLayer)
"""Layers that hold keys and values alone."""


def _read_only(room: _Room) -> bool:
    return room.keys.is_inference() and not torch.is_inference_mode_enabled()


def _longer(x: Tensor, tokens: int) -> Tensor:
    made = x.new_empty(*x.shape[:2], tokens, x.shape[3])
    made[:, :, : x.shape[2]] = x
    return made


def _copy_layer(layer: Any, batch_size: int) -> Any:
    if type(layer) not in _ORDINARY:
        copied = copy.deepcopy(layer)
        if batch_size > 1:
            copied.batch_repeat_interleave(batch_size)
        return copied
    copied = copy.copy(layer)
    if type(layer) is DynamicLayer:
        copied.__class__ = GrowingLayer
    if layer.is_initialized:  # a layer that shares another one's keys and values never is
        if layer.keys.shape[0] != 1:
            raise ValueError(f"the prefix has batch size {layer.keys.shape[0]}, expected 1")
        copied.keys = layer.keys.expand(batch_size, -1, -1, -1)
        copied.values = layer.values.expand(batch_size, -1, -1, -1)
    return copied
