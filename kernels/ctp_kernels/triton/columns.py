"""The solver's sequential loops over inputs on a GPU: a span of inputs per launch, and products for what follows.

C=inputs of a block O=outputs K=candidate grids G=grids
"""

import functools
import logging

import torch
import triton
from torch import Tensor

from ctp_kernels.sweep import Grids
from ctp_kernels.triton import spans
from ctp_kernels.triton.ops import interpreted, options

log = logging.getLogger(__name__)

SPAN = 64
OUTPUTS = 16
"""Of a program, which is one warp, or a code could be read after it was written: the tile takes 32 registers of each
thread."""
CANDIDATE_OUTPUTS = 128


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
    """As `ctp_kernels.sweep.sweep_columns`."""
    outputs = W_CO.shape[1]
    scales_GO, zeros_GO, group_of_C, max_code = None, None, None, 0
    if grids is not None:
        scales_GO, zeros_GO, max_code = grids.scales_GO, grids.zeros_GO, grids.max_code
        group_of_C = grids.group_of_C.to(W_CO.device) if len(scales_GO) > 1 else None
    for first in columns[::SPAN]:
        last = min(first + SPAN, columns.stop)
        with torch.cuda.device_of(W_CO):
            spans.take_span[(triton.cdiv(outputs, OUTPUTS),)](
                W_CO[first:], U_CC[first:, first:], errors_CO[first:],
                None if keep_CO is None else keep_CO[first:].view(torch.uint8),
                None if codes_CO is None else codes_CO[first:],
                scales_GO, zeros_GO, None if group_of_C is None else group_of_C[first:],
                outputs, last - first, U_CC.stride(0), max_code, C=SPAN, O=OUTPUTS, **options(1, 1),
            )  # fmt: skip
        W_CO[last:].addmm_(U_CC[first:last, last:].T, errors_CO[first:last], alpha=-1)


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
) -> None:
    """One sweep of `ctp_kernels.sweep.improve_codes`."""
    outputs, inputs = codes_OI.shape
    for first in range(0, inputs, SPAN):
        last = min(first + SPAN, inputs)
        changes_OC = torch.empty(outputs, last - first, device=codes_OI.device)
        with torch.cuda.device_of(codes_OI):
            spans.improve_span[(triton.cdiv(outputs, OUTPUTS),)](
                codes_OI, residual_OI, H_II, scales_OG, zeros_OG, group_of_I,
                None if keep_OI is None else keep_OI.view(torch.uint8), changes_OC,
                outputs, inputs, scales_OG.shape[1], first, last - first, max_code,
                C=SPAN, O=OUTPUTS, **options(1, 1),
            )  # fmt: skip
        residual_OI.addmm_(changes_OC, H_II[first:last], alpha=-1)


def rounding_errors(w_CO: Tensor, scales_KO: Tensor, zeros_KO: Tensor, max_code: int) -> Tensor:
    """As `ctp_kernels.sweep.rounding_errors`."""
    errors_KO = torch.empty_like(scales_KO)
    inputs, outputs = w_CO.shape
    with torch.cuda.device_of(w_CO):
        spans.round_all[(triton.cdiv(outputs, CANDIDATE_OUTPUTS), len(scales_KO))](
            w_CO, scales_KO, zeros_KO, errors_KO, outputs, inputs, max_code, O=CANDIDATE_OUTPUTS, **options(4, 1)
        )
    return errors_KO


def usable(device: torch.device) -> bool:
    """Whether kernels run there: NVIDIA's GPUs from compute capability 8.0 on, where Triton can build what it needs.

    That takes a C compiler, which images for serving leave out.
    """
    return _usable(device) if device.type == "cuda" else interpreted()


@functools.cache
def _usable(device: torch.device) -> bool:
    if not torch.version.hip and torch.cuda.get_device_capability(device) < (8, 0):
        return False
    one = torch.ones(1, 1, device=device)
    try:
        rounding_errors(one, one, one, 1)
    except Exception as error:  # Triton's, its compilers' and the driver's have nothing else in common
        log.info(
            "the solver's loops run as PyTorch operations, since Triton's kernels cannot be built here (%s)", error
        )
        return False
    return True
