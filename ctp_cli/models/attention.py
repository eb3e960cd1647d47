"""Attention in the precision that the processor is fastest in."""

import contextlib
from typing import Any

import torch
from ctp_kernels.cpu.build import cpu_features
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode


class _Float32Attention(TorchFunctionMode):
    """16-bit queries, keys and values on a CPU attend in float32; what comes out has their own dtype again."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not scaled_dot_product_attention:
            return func(*args, **kwargs)
        query = args[0] if args else kwargs["query"]
        if query.device.type != "cpu" or query.dtype not in (torch.bfloat16, torch.float16):
            return func(*args, **kwargs)
        wide = [_widened(value) for value in args]
        return func(*wide, **{key: _widened(value) for key, value in kwargs.items()}).to(query.dtype)


def _widened(value: Any) -> Any:
    return value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def fast_attention() -> contextlib.AbstractContextManager[Any]:
    """For forward passes without gradients: float32 attention on processors without AMX.

    There PyTorch's fused attention takes about 1.5 times as long in bfloat16 as in float32.
    """
    return contextlib.nullcontext() if "amx_bf16" in cpu_features() else _Float32Attention()
