"""Attention as the processor is fastest at it."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from ctp_kernels.attention import causal_attention
from ctp_kernels.cpu.build import cpu_features
from torch import Tensor
from torch.nn import functional


@contextlib.contextmanager
def fast_attention() -> Iterator[None]:
    """For x86 processors without AMX.

    There PyTorch's fused attention takes about 1.5 times as long in bfloat16 as in float32, and our kernel, which needs
    AVX-512 BF16 and heads of 64 or a multiple, a third; with gradients less than half.
    What models call is replaced meanwhile: they look `scaled_dot_product_attention` up at every call.
    """
    plain = functional.scaled_dot_product_attention
    if cpu_features() and "amx_bf16" not in cpu_features():
        functional.scaled_dot_product_attention = functools.partial(_attend, plain)
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = plain


def _attend(plain: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    """16-bit attention on a CPU by our own kernel where it fits, else in float32; results have their own dtype."""
    if query.device.type != "cpu" or query.dtype not in (torch.bfloat16, torch.float16):
        return plain(query, key, value, **options)
    mask = options.get("attn_mask")
    if not options.get("dropout_p") and _is_causal(query, key, mask, bool(options.get("is_causal"))):
        scale = options.get("scale")
        ours = causal_attention(query, key, value, query.shape[-1] ** -0.5 if scale is None else scale)
        if ours is not None:
            return ours
    if torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)):
        return plain(query, key, value, **options)  # here float32 takes longer
    if mask is not None and mask.is_floating_point():
        options["attn_mask"] = mask.float()
    return plain(query.float(), key.float(), value.float(), **options).to(query.dtype)


def _is_causal(query: Tensor, key: Tensor, mask: Tensor | None, said: bool) -> bool:
    """Whether every query sees all keys up to its own, the last query's being the last: also said by a mask."""
    queries, keys = query.shape[-2], key.shape[-2]
    if mask is None:
        return said and queries == keys
    if mask.shape[-2:] != (queries, keys) or keys < queries:
        return False
    seen = mask if mask.dtype == torch.bool else mask == 0
    unseen = torch.ones((), dtype=torch.bool) if mask.dtype == torch.bool else mask <= torch.finfo(mask.dtype).min
    wanted = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    return bool((seen == wanted).all() and (seen | unseen).all())
