"""Gradient checkpointing: a decoder block keeps its inputs alone; the rest is made again when the gradient reaches it.

transformers' own needs a model in training mode and drops the cache, which is where the prompt's keys and values are.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from ctp_kernels.arithmetic import fast_arithmetic
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from ctp_cli.models.blocks import block_modules


def checkpoint_blocks(model: PreTrainedModel) -> None:
    """From now on, where gradients are wanted, every decoder block keeps its inputs alone."""
    for index, block in enumerate(block_modules(model).values()):
        block.forward = _checkpointed(block.forward, index)


def _checkpointed(forward: Callable[..., Any], index: int) -> Callable[..., Any]:
    @functools.wraps(forward)
    def run(*inputs: Any, **options: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*inputs, **options)
        cache = next((value for value in (*inputs, *options.values()) if isinstance(value, Cache)), None)
        before = None if cache is None else _keys_and_values(cache, index)
        device = next(value.device for value in (*inputs, *options.values()) if isinstance(value, torch.Tensor))

        def once_more(*inputs: Any, **options: Any) -> Any:
            if cache is not None:
                _put_back(cache, index, before)
            # the gradient is asked for outside of whatever surrounded the forward pass
            with fast_arithmetic(device, behind_prefix=cache is not None):
                return forward(*inputs, **options)

        return checkpoint(once_more, *inputs, use_reentrant=False, **options)

    return run


def _keys_and_values(cache: Cache, index: int) -> dict[str, Any] | None:
    """The state of a layer that a block will append to; None where there is no layer yet."""
    return dict(vars(cache.layers[index])) if index < len(cache.layers) else None


def _put_back(cache: Cache, index: int, state: dict[str, Any] | None) -> None:
    if state is None:
        del cache.layers[index:]
    else:
        vars(cache.layers[index]).clear()
        vars(cache.layers[index]).update(state)
