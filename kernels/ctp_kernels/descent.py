"""Least squares under masks: many problems that share their matrix, by preconditioned conjugate gradients.

O=problems (outputs) I=unknowns (inputs) of each
"""

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from ctp_kernels.cpu.build import load


class Quadratic:
    """(W - V) H (W - V)^T for many rows W and one positive definite H, to be lowered over masked V.

    Shapes: H_II (I, I) float32.
    On a CPU with AVX-512 BF16 and a C++ compiler its products are bfloat16, and the rest of a step of conjugate
    gradients is one compiled pass over memory. Residuals are then good to about 0.4%, which a few steps do not notice;
    it would be the limit of many.
    """

    def __init__(self, H_II: Tensor) -> None:
        self.diagonal_I = H_II.diagonal().contiguous()
        self._library = _library() if H_II.device.type == "cpu" else None
        self._H_II = H_II if self._library is None else H_II.bfloat16()

    def product(self, x_OI: Tensor) -> Tensor:
        """x H, (O, I) float32."""
        return (x_OI.to(self._H_II.dtype) @ self._H_II).float()

    def descend(self, fit: "Fit", keep_OI: Tensor, *, steps: int) -> None:
        """Lower it, row by row, over the places of V that `keep_OI` (O, I) bool leaves free, in place.

        Raises: ValueError if a tensor is not contiguous or not of the type said here.
        """
        for x_OI, dtype in ((fit.values_OI, torch.float32), (fit.residual_OI, torch.float32), (keep_OI, torch.bool)):
            if not x_OI.is_contiguous() or x_OI.dtype != dtype or x_OI.shape != keep_OI.shape:
                raise ValueError(f"{tuple(x_OI.shape)}, {x_OI.dtype}: not a contiguous {dtype} as large as the mask")
        direction_OI = fit.residual_OI * keep_OI / self.diagonal_I
        product_O = (fit.residual_OI * direction_OI).sum(1)
        if self._library is None:
            self._descend(fit, keep_OI, direction_OI, product_O, steps)
            return
        next_OI = direction_OI.bfloat16()
        for _ in range(steps):
            curved_OI = next_OI @ self._H_II
            tensors = (fit.values_OI, fit.residual_OI, direction_OI, next_OI, product_O)
            self._library.descend(
                *(x.data_ptr() for x in (curved_OI, keep_OI, self.diagonal_I)),
                *keep_OI.shape,
                *(x.data_ptr() for x in tensors),
                torch.get_num_threads(),
            )

    def _descend(self, fit: "Fit", keep_OI: Tensor, direction_OI: Tensor, product_O: Tensor, steps: int) -> None:
        for _ in range(steps):
            curved_OI = direction_OI @ self._H_II
            curvature_O = (direction_OI * curved_OI).sum(1)
            length_O1 = torch.where(curvature_O > 0, product_O / curvature_O, 0)[:, None]
            fit.values_OI.addcmul_(direction_OI, length_O1)
            fit.residual_OI.addcmul_(curved_OI, length_O1, value=-1)
            masked_OI = fit.residual_OI * keep_OI
            scaled_OI = masked_OI / self.diagonal_I
            before_O, product_O = product_O, (masked_OI * scaled_OI).sum(1)
            direction_OI.mul_(torch.where(before_O > 0, product_O / before_O, 0)[:, None]).add_(scaled_OI)


@dataclass
class Fit:
    """Where a descent stands: V, and (W - V) H, which also says what every pruned place would be worth.

    Both (O, I) float32, contiguous.
    """

    values_OI: Tensor
    residual_OI: Tensor


def _library() -> ctypes.CDLL | None:
    library = load(
        "descent",
        needs=("avx512f", "avx512bw", "avx512vl", "avx512_bf16"),
        flags=("-mavx512f", "-mavx512bw", "-mavx512vl", "-mprefer-vector-width=512", "-fno-trapping-math"),
    )
    if library is None:
        return None
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    library.descend.argtypes = [pointer, pointer, pointer, number, number, *[pointer] * 5, number]
    library.descend.restype = None
    return library
