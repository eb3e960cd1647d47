"""Causal attention on processors with AVX-512 BF16, differentiable.

B=batch H=heads K=key-value heads T=queries S=keys D=width of a head
"""

import ctypes
from typing import Any

import torch
from torch import Tensor

from ctp_kernels.cpu.build import AVX512_BF16, load


def causal_attention(q_BHTD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, scale: float) -> Tensor | None:
    """softmax(scale q k^T) v over the keys up to each query, or None where no kernel of ours fits.

    Shapes: q (B, H, T, D), k and v (B, K, S, D) with K a divisor of H; bfloat16 on the CPU, D a multiple of 64 and
    contiguous. Where there are more keys than queries the first S - T, a prefix, are seen by every query. Returns
    (B, H, T, D) bfloat16, laid out as (B, T, H, D).
    Raises: MemoryError.
    Products are exact and summed in float32, the softmax is float32; its weights are rounded to bfloat16, and so are
    the gradients of scores.
    """
    tensors = (q_BHTD, k_BKSD, v_BKSD)
    if any(x.dtype != torch.bfloat16 or x.device.type != "cpu" or x.dim() != 4 or x.stride(3) != 1 for x in tensors):
        return None
    batch, heads, queries, width = q_BHTD.shape
    key_heads, keys = k_BKSD.shape[1:3]
    wanted = (batch, key_heads, keys, width)
    if k_BKSD.shape != wanted or v_BKSD.shape != wanted or heads % key_heads or width % 64 or not 0 < queries <= keys:
        return None
    if _library() is None:
        return None
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        out_BHTD: Tensor = _Attention.apply(*tensors, scale)
        return out_BHTD
    return _forward(*tensors, scale, None)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_BHTD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, scale: float) -> Tensor:
        logs_BHT = torch.empty(q_BHTD.shape[:3])
        out_BHTD = _forward(q_BHTD, k_BKSD, v_BKSD, scale, logs_BHT)
        ctx.save_for_backward(q_BHTD, k_BKSD, v_BKSD, logs_BHT)
        ctx.scale = scale
        return out_BHTD

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q_BHTD, k_BKSD, v_BKSD, logs_BHT = ctx.saved_tensors
        outer_BTHD = outer[0].to(torch.bfloat16).transpose(1, 2).contiguous()
        made = [torch.empty(x.transpose(1, 2).shape, dtype=torch.bfloat16) for x in (q_BHTD, k_BKSD, v_BKSD)]
        library = _library()
        assert library is not None
        pointers = (x.data_ptr() for x in (q_BHTD, k_BKSD, v_BKSD, outer_BTHD, logs_BHT, *made))
        failed = library.attention_bf16_backward(*pointers, *_description(q_BHTD, k_BKSD, v_BKSD, ctx.scale))
        if failed:
            raise MemoryError(f"no memory for the gradient of attention over {k_BKSD.shape[2]} tokens")
        of_q, of_k, of_v = (x.transpose(1, 2) for x in made)
        return of_q, of_k, of_v, None


def _forward(q_BHTD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, scale: float, logs_BHT: Tensor | None) -> Tensor:
    batch, heads, queries, width = q_BHTD.shape
    out_BTHD = torch.empty(batch, queries, heads, width, dtype=torch.bfloat16)
    library = _library()
    assert library is not None
    pointers = (x.data_ptr() for x in (q_BHTD, k_BKSD, v_BKSD, out_BTHD))
    logs = None if logs_BHT is None else logs_BHT.data_ptr()
    if library.attention_bf16(*pointers, logs, *_description(q_BHTD, k_BKSD, v_BKSD, scale)):
        raise MemoryError(f"no memory for attention over {k_BKSD.shape[2]} tokens")
    return out_BTHD.transpose(1, 2)


def _description(q_BHTD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, scale: float) -> tuple[Any, ...]:
    sizes = (ctypes.c_int64 * 6)(*q_BHTD.shape[:2], k_BKSD.shape[1], q_BHTD.shape[2], *k_BKSD.shape[2:])
    strides = (ctypes.c_int64 * 9)(*(stride for x in (q_BHTD, k_BKSD, v_BKSD) for stride in x.stride()[:3]))
    return sizes, strides, scale, torch.get_num_threads()


def _library() -> ctypes.CDLL | None:
    library = load("attention_bf16", AVX512_BF16)
    if library is None:
        return None
    pointer = ctypes.c_void_p
    library.attention_bf16.argtypes = [*[pointer] * 7, ctypes.c_float, ctypes.c_int64]
    library.attention_bf16_backward.argtypes = [*[pointer] * 10, ctypes.c_float, ctypes.c_int64]
    return library
