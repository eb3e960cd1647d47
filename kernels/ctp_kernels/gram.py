"""Sums of outer products of activations, in place: what Hessians are made of.

T=tokens I=width
"""

import ctypes

import torch
from torch import Tensor

from ctp_kernels.cpu.build import AVX512_BF16, cpu_features, load

_STRIP = 256


def add_gram(H_II: Tensor, x_TI: Tensor) -> None:
    """H += x^T x, of which only the upper triangle counts: what is below the diagonal is left undefined.

    Shapes: H_II (I, I) float32, contiguous; x_TI (T, I), any float dtype, on the same device.
    Products of bfloat16 numbers are exact, sums are float32. On a CPU with AVX-512 BF16 and a C++ compiler, bfloat16
    inputs go through a kernel of our own, faster than float32 matrix products there (docs/compression.md); with AMX,
    PyTorch's products are left to do it.
    Raises: ValueError if the shapes or dtypes do not fit; MemoryError.
    """
    width = H_II.shape[0]
    if x_TI.dim() != 2 or H_II.shape != (x_TI.shape[1], width) or H_II.dtype != torch.float32:
        raise ValueError(f"x {tuple(x_TI.shape)} does not fit H {tuple(H_II.shape)}, {H_II.dtype}")
    kernel = _kernel() if x_TI.dtype == torch.bfloat16 and x_TI.device.type == "cpu" else None
    if kernel is not None and H_II.is_contiguous():
        rows = x_TI if x_TI.stride(1) == 1 else x_TI.contiguous()
        if kernel(rows.data_ptr(), rows.shape[0], width, rows.stride(0), H_II.data_ptr(), torch.get_num_threads()):
            raise MemoryError(f"no memory to lay out inputs {width} wide")
        return
    x_TI = x_TI.float()
    for start in range(0, width, _STRIP):  # strips of the upper triangle
        stop = min(start + _STRIP, width)
        H_II[start:stop, start:].addmm_(x_TI[:, start:stop].T, x_TI[:, start:])


def _kernel() -> "ctypes._NamedFuncPointer | None":
    if "amx_bf16" in cpu_features():
        return None
    library = load("gram_bf16", AVX512_BF16)
    if library is None:
        return None
    function = library.gram_bf16
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    function.argtypes, function.restype = [pointer, number, number, number, pointer, number], ctypes.c_int
    return function
