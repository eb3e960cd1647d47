"""Causal attention without gradients on processors with AVX-512 BF16.

B=batch H=heads T=tokens D=width of a head
"""

import ctypes

import torch
from torch import Tensor

from ctp_kernels.cpu.build import load


def causal_attention(q_BHTD: Tensor, k_BHTD: Tensor, v_BHTD: Tensor, scale: float) -> Tensor | None:
    """softmax(scale q k^T) v over the keys up to each query, or None where no kernel of ours fits.

    Shapes: q (B, H, T, D), k and v (B, K, T, D) with K a divisor of H; bfloat16 on the CPU, D a multiple of 64 and
    contiguous. Returns (B, H, T, D) bfloat16, laid out as (B, T, H, D).
    Raises: MemoryError.
    Products are exact and summed in float32, the softmax is float32; its weights are rounded to bfloat16.
    """
    tensors = (q_BHTD, k_BHTD, v_BHTD)
    if any(x.dtype != torch.bfloat16 or x.device.type != "cpu" or x.dim() != 4 or x.stride(3) != 1 for x in tensors):
        return None
    batch, heads, tokens, width = q_BHTD.shape
    key_heads = k_BHTD.shape[1]
    wanted = (batch, key_heads, tokens, width)
    if k_BHTD.shape != wanted or v_BHTD.shape != wanted or heads % key_heads or width % 64 or not tokens:
        return None
    kernel = _kernel()
    if kernel is None:
        return None
    out_BTHD = torch.empty(batch, tokens, heads, width, dtype=torch.bfloat16)
    sizes = (ctypes.c_int64 * 5)(batch, heads, key_heads, tokens, width)
    strides = (ctypes.c_int64 * 9)(*(stride for x in tensors for stride in x.stride()[:3]))
    if kernel(*(x.data_ptr() for x in (*tensors, out_BTHD)), sizes, strides, scale, torch.get_num_threads()):
        raise MemoryError(f"no memory for attention over {tokens} tokens")
    return out_BTHD.transpose(1, 2)


def _kernel() -> "ctypes._NamedFuncPointer | None":
    library = load(
        "attention_bf16",
        needs=("avx512f", "avx512bw", "avx512_bf16"),
        flags=("-mavx512f", "-mavx512bw", "-mavx512bf16"),
    )
    if library is None:
        return None
    function = library.attention_bf16
    pointer = ctypes.c_void_p
    function.argtypes = [*[pointer] * 6, ctypes.c_float, ctypes.c_int64]
    function.restype = ctypes.c_int
    return function
