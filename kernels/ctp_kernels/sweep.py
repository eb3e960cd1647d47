"""The inner loop of GPTQ and SparseGPT over one block of inputs, and what grids would cost there.

On a CPU with AVX2 and a C++ compiler loops are compiled, threads taking outputs: results are the same on any number of
threads. On a GPU with triton they are kernels, two launches for every 64 inputs (or a group, if that is less);
without it, every input takes some ten. Results of one way differ from another's by rounding.

C=inputs of the block O=outputs G=grids K=candidate grids
"""

import contextlib
import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ctp_kernels.cpu.build import AVX2, AVX512, load
from ctp_kernels.triton import ops


@dataclass(frozen=True)
class Grids:
    """Quantization grids of a block: value = scale * (code - zero), codes in 0..max_code.

    scales_GO and zeros_GO are float32, contiguous; group_of_C, int32, is the grid of each input.
    """

    scales_GO: Tensor
    zeros_GO: Tensor
    group_of_C: Tensor
    max_code: int


def sweep_columns(
    W_CO: Tensor,
    U_CC: Tensor,
    errors_CO: Tensor,
    columns: range,
    *,
    grids: Grids | None,
    keep_CO: Tensor | None,
    codes_CO: Tensor | None,
) -> None:
    """Round and prune the inputs `columns` one after the other, in place, handing errors on to later ones.

    Shapes: W_CO (C, O) float32, later inputs are corrected; U_CC (C, C) the block's part of the upper-triangular factor
    of the inverse Hessian; errors_CO (C, O) float32 receives errors divided by U's diagonal; keep_CO (C, O) bool, False
    where an input is pruned; codes_CO (C, O) uint8 receives codes, the zero point for pruned weights. All but U_CC
    are contiguous, U_CC's rows are.
    Without `grids` inputs are only pruned.
    Source: GPTQ (arXiv:2210.17323), algorithm 1; SparseGPT (arXiv:2301.00774), algorithm 1.
    """
    library = _library() if W_CO.device.type == "cpu" else None
    if library is not None:
        library.sweep(
            W_CO.data_ptr(),
            W_CO.shape[1],
            columns.start,
            columns.stop,
            W_CO.shape[0],
            U_CC.data_ptr(),
            U_CC.stride(0),
            None if grids is None else grids.scales_GO.data_ptr(),
            None if grids is None else grids.zeros_GO.data_ptr(),
            None if grids is None else grids.group_of_C.data_ptr(),
            0 if grids is None else grids.max_code,
            None if keep_CO is None else keep_CO.data_ptr(),
            None if codes_CO is None else codes_CO.data_ptr(),
            errors_CO.data_ptr(),
            torch.get_num_threads(),
        )
        return
    kernels = _kernels(W_CO)
    if kernels is not None:
        kernels.sweep_columns(W_CO, U_CC, errors_CO, columns, grids=grids, keep_CO=keep_CO, codes_CO=codes_CO)
        return
    with _one_thread():
        _sweep(W_CO, U_CC, errors_CO, columns, grids=grids, keep_CO=keep_CO, codes_CO=codes_CO)


def _sweep(
    W_CO: Tensor,
    U_CC: Tensor,
    errors_CO: Tensor,
    columns: range,
    *,
    grids: Grids | None,
    keep_CO: Tensor | None,
    codes_CO: Tensor | None,
) -> None:
    diagonal = torch.diagonal(U_CC).tolist()
    group_of = [] if grids is None else grids.group_of_C.tolist()
    for column in columns:
        w_O = W_CO[column]
        if grids is None:
            q_O = w_O.clone()
        else:
            scale_O, zero_O = grids.scales_GO[group_of[column]], grids.zeros_GO[group_of[column]]
            code_O = torch.div(w_O, scale_O).round_().add_(zero_O).clamp_(0, grids.max_code)
            if keep_CO is not None:
                code_O = torch.where(keep_CO[column], code_O, zero_O)
            q_O = torch.sub(code_O, zero_O).mul_(scale_O)
            if codes_CO is not None:
                codes_CO[column] = code_O.to(torch.uint8)
        if keep_CO is not None:
            q_O.mul_(keep_CO[column])
        error_O = torch.sub(w_O, q_O, out=errors_CO[column]).div_(diagonal[column])
        W_CO[column:].addr_(U_CC[column, column:], error_O, alpha=-1)
        W_CO[column] = q_O


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """The loop is thousands of operations of microseconds each.

    Handing them to a thread pool gains nothing, and on a machine that is busy otherwise every hand-over waits.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def rounding_errors(w_CO: Tensor, scales_KO: Tensor, zeros_KO: Tensor, max_code: int) -> Tensor:
    """(K, O): the squared errors of rounding w to each of K grids, summed over inputs.

    Shapes: w_CO (C, O), scales_KO and zeros_KO (K, O), all float32 and contiguous.
    """
    library = _library() if w_CO.device.type == "cpu" else None
    kernels = _kernels(w_CO) if library is None else None
    if kernels is not None:
        found: Tensor = kernels.rounding_errors(w_CO, scales_KO, zeros_KO, max_code)
        return found
    errors_KO = torch.empty_like(scales_KO)
    if library is not None:
        w, scales, zeros, errors = (x.data_ptr() for x in (w_CO, scales_KO, zeros_KO, errors_KO))
        library.rounding_errors(
            w, *w_CO.shape, scales, zeros, scales_KO.shape[0], max_code, errors, torch.get_num_threads()
        )
        return errors_KO
    for scale_O, zero_O, error_O in zip(scales_KO, zeros_KO, errors_KO, strict=True):
        codes_CO = torch.div(w_CO, scale_O).round_().add_(zero_O).clamp_(0, max_code)
        torch.sum(codes_CO.sub_(zero_O).mul_(scale_O).sub_(w_CO).square_(), 0, out=error_O)
    return errors_KO


def improve_codes(
    codes_OI: Tensor,
    residual_OI: Tensor,
    H_II: Tensor,
    scales_OG: Tensor,
    zeros_OG: Tensor,
    group_of_I: Tensor,
    *,
    keep_OI: Tensor | None,
    max_code: int,
    sweeps: int,
) -> None:
    """Coordinate descent on codes: each in turn becomes the best one while all others stay, `sweeps` times, in place.

    Shapes: codes_OI (O, I) uint8; residual_OI (O, I) float32, (W - V) H for the values V of the codes, moves along;
        H_II (I, I) float32, symmetric, its diagonal positive; scales_OG and zeros_OG (O, G) float32; group_of_I (I,)
        int32; keep_OI (O, I) bool, False where a code stays. All contiguous.
    The error (W - V) H (W - V)^T of every row falls with every change.
    Source: QuantEase (arXiv:2309.01885).
    """
    library = _library() if codes_OI.device.type == "cpu" else None
    if library is not None:
        library.improve_codes(
            *(x.data_ptr() for x in (H_II, scales_OG, zeros_OG, group_of_I)),
            None if keep_OI is None else keep_OI.data_ptr(),
            *codes_OI.shape,
            scales_OG.shape[1],
            max_code,
            sweeps,
            codes_OI.data_ptr(),
            residual_OI.data_ptr(),
            torch.get_num_threads(),
        )
        return
    kernels = _kernels(codes_OI)
    sweep = _improve_codes if kernels is None else kernels.improve_codes
    group_of_I = group_of_I.to(codes_OI.device)
    for _ in range(sweeps):
        before_OI = codes_OI.clone()
        sweep(codes_OI, residual_OI, H_II, scales_OG, zeros_OG, group_of_I, keep_OI=keep_OI, max_code=max_code)
        if torch.equal(before_OI, codes_OI):
            return


def _improve_codes(
    codes_OI: Tensor,
    residual_OI: Tensor,
    H_II: Tensor,
    scales_OG: Tensor,
    zeros_OG: Tensor,
    group_of_I: Tensor,
    *,
    keep_OI: Tensor | None,
    max_code: int,
) -> None:
    diagonal = H_II.diagonal().tolist()
    for i, group in enumerate(group_of_I.tolist()):
        scale_O, zero_O = scales_OG[:, group], zeros_OG[:, group]
        code_O = codes_OI[:, i].float()
        wanted_O = (code_O - zero_O) * scale_O + residual_OI[:, i] / diagonal[i]
        best_O = torch.div(wanted_O, scale_O).round_().add_(zero_O).clamp_(0, max_code)
        if keep_OI is not None:
            best_O = torch.where(keep_OI[:, i], best_O, code_O)
        residual_OI.addr_((best_O - code_O) * scale_O, H_II[i], alpha=-1)
        codes_OI[:, i] = best_O.to(torch.uint8)


def _kernels(x: Tensor) -> Any:
    """The module of kernels for the GPU that x is on, None where there is none."""
    if not ops.available() or (x.device.type != "cuda" and not ops.interpreted()):
        return None
    from ctp_kernels.triton import columns

    return columns if columns.usable(x.device) else None


def _library() -> ctypes.CDLL | None:
    library = load("sweep", AVX512, AVX2)
    if library is None:
        return None
    pointer, number, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
    library.sweep.argtypes = [
        *(pointer, number, number, number, number, pointer, number),
        *(pointer, pointer, pointer, real, pointer, pointer, pointer, number),
    ]
    library.rounding_errors.argtypes = [pointer, number, number, pointer, pointer, number, real, pointer, number]
    library.improve_codes.argtypes = [*[pointer] * 5, number, number, number, real, number, pointer, pointer, number]
    library.sweep.restype = library.rounding_errors.restype = library.improve_codes.restype = None
    return library
