"""Dense weights from packed rows, as they are needed.

O=rows (outputs) I=columns (inputs), a multiple of 8 G=groups
"""

import ctypes

import torch
from torch import Tensor

from ctp_kernels.cpu.build import AVX2, AVX512_BF16, load
from ctp_kernels.ragged import unpack_bits, unpack_kept


def dense_rows(
    codes: Tensor,
    mask_OB: Tensor | None,
    starts_O: Tensor,
    scales_OG: Tensor,
    zeros_OG: Tensor,
    *,
    bits: int,
    dtype: torch.dtype,
    g_idx_I: Tensor | None = None,
) -> Tensor:
    """(O, I) `dtype`: scale * (code - zero) where a weight is stored, exactly 0 elsewhere.

    Shapes: codes uint8, the rows' bit streams one after the other; mask_OB (O, I / 8) uint8, None where every weight is
        stored; starts_O (O + 1,) int64, the byte at which each row begins (`ctp_kernels.ragged`); scales_OG (O, G) and
        zeros_OG (O, G), any dtype; g_idx_I (I,) the group of each column, None for equal runs.
    Products are float32, rounded once. On a CPU with AVX2 and a C++ compiler bfloat16 and float32 go through a
    compiled kernel, whose bits are the same.
    Raises: ValueError if codes and mask do not go together.
    """
    outputs, groups = scales_OG.shape
    every = codes.numel() // outputs * 8 // bits
    inputs = every if mask_OB is None else mask_OB.shape[1] * 8
    scales_OG, zeros_OG = scales_OG.float().contiguous(), zeros_OG.float().contiguous()
    group = inputs // groups
    library = _library() if codes.device.type == "cpu" and dtype in (torch.bfloat16, torch.float32) else None
    if library is not None and g_idx_I is None and (group % 16 == 0 or groups == 1):
        out_OI = torch.empty(outputs, inputs, dtype=dtype)
        mask_OB = None if mask_OB is None else mask_OB.contiguous()
        tensors = (codes.contiguous(), mask_OB, starts_O, scales_OG, zeros_OG)
        if int(starts_O[-1]) != codes.numel() or starts_O.shape != (outputs + 1,):
            raise ValueError(f"{codes.numel()} bytes of codes, rows begin at {starts_O.tolist()[:3]}, ...")
        library.unpack_rows(
            *(None if x is None else x.data_ptr() for x in tensors),
            *(outputs, inputs, groups, group, bits, int(dtype == torch.bfloat16)),
            out_OI.data_ptr(),
            torch.get_num_threads(),
        )
        return out_OI
    if mask_OB is None:
        keep_OI = torch.ones(outputs, inputs, dtype=torch.bool, device=codes.device)
    else:
        keep_OI = unpack_bits(mask_OB)
    codes_OI = unpack_kept(codes.flatten(), keep_OI, bits).float()
    if g_idx_I is None:
        g_idx_I = torch.arange(inputs, device=codes.device) // group
    index_I = g_idx_I.long()
    return ((codes_OI - zeros_OG[:, index_I]) * scales_OG[:, index_I] * keep_OI).to(dtype)


def _library() -> ctypes.CDLL | None:
    library = load("unpack", AVX512_BF16, AVX2)
    if library is None:
        return None
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    library.unpack_rows.argtypes = [*[pointer] * 5, *[number] * 6, pointer, number]
    library.unpack_rows.restype = ctypes.c_int
    return library
