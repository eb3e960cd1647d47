"""A linear layer of one row of bfloat16 on the CPU, as when text is generated: as fast as memory gives its weights.

    y = linear(x, weight, bias)  # None where this is not the way

O=out_features I=in_features
"""

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor, nn

from ctp_kernels.cpu.build import AVX2, AVX512, load

_BLOCK = 32
_PLAIN = (Tensor, nn.Parameter)


def linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor | None:
    """x weight' + bias, summed in float32 and rounded once, or None where PyTorch's own is to be taken.

    Shapes: x (..., I) of one row, weight (O, I), each of its rows contiguous, bias (O,); all bfloat16 on the CPU, I a
    multiple of 32. Returns (..., O). Not differentiable: None where a gradient would be wanted.
    Raises: MemoryError.
    PyTorch 2.13 takes twice as long on processors with AVX-512 BF16; with two rows it is level, and faster with more.
    """
    if x.dtype != torch.bfloat16 or x.dim() == 0 or x.numel() != x.shape[-1] or weight_OI.dim() != 2:
        return None
    tensors = (x, weight_OI) if bias_O is None else (x, weight_OI, bias_O)
    outputs, inputs = weight_OI.shape
    if inputs % _BLOCK or weight_OI.stride(1) != 1 or x.shape[-1] != inputs or torch.compiler.is_compiling():
        return None
    if bias_O is not None and bias_O.shape != (outputs,):
        return None
    # tensors of other kinds may have no memory of their own
    if any(type(t) not in _PLAIN or t.dtype != torch.bfloat16 or t.device.type != "cpu" for t in tensors):
        return None
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return None
    kernel = _kernel()
    if kernel is None:
        return None
    x, bias_O = x.contiguous(), None if bias_O is None else bias_O.contiguous()
    y = x.new_empty(*x.shape[:-1], outputs)
    bias = None if bias_O is None else bias_O.data_ptr()
    sizes = (outputs, inputs, weight_OI.stride(0), torch.get_num_threads())
    if kernel(x.data_ptr(), weight_OI.data_ptr(), bias, y.data_ptr(), *sizes):
        raise MemoryError(f"no memory for {inputs} numbers")
    return y


@functools.cache
def _kernel() -> Any:
    library = load("one_row", AVX512, AVX2)
    if library is None:
        return None
    library.one_row.argtypes = [*[ctypes.c_void_p] * 4, *[ctypes.c_int64] * 4]
    return library.one_row
