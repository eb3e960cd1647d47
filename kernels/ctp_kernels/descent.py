"""Least squares under masks: many problems that share their matrix, by preconditioned conjugate gradients.

O=problems (outputs) I=unknowns (inputs) of each R=modes of the preconditioner
"""

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from ctp_kernels.cpu.build import AVX2, AVX512, AVX512_BF16, load

_MODES = 16
"""Leading eigenvectors in the preconditioner; the compiled kernel's registers hold this many."""
_SPARE, _ITERATIONS = 8, 3
"""Of the subspace iteration that finds them: more vectors than are kept, and products."""


class Quadratic:
    """(W - V) H (W - V)^T for many rows W and one positive definite H, to be lowered over masked V.

    Activations have a few directions that are far stronger than all others (their mean is one), and these are what
    makes H ill-conditioned. So the preconditioner of a row is the inverse, on its mask, of H's diagonal and its leading
    eigenvectors: two steps with it come as near to the solution as four with the diagonal alone.

    Shapes: H_II (I, I) float32.
    On a CPU with AVX2 and a C++ compiler all of a step of conjugate gradients but the product with H is one compiled
    pass over memory. With AVX-512 BF16 products are bfloat16: residuals are then good to about 0.4%, which a few steps
    do not notice; it would be the limit of many. The leading mode stays float32: where inputs hardly differ, rounding
    it would leave H with negative eigenvalues.
    """

    def __init__(self, H_II: Tensor) -> None:
        self.diagonal_I = H_II.diagonal().contiguous()
        self._scale_I = self.diagonal_I.rsqrt()
        self._modes_IR, self._inverse_R, leading_I = _leading_modes(H_II * self._scale_I * self._scale_I[:, None])
        self._library = _library() if H_II.device.type == "cpu" else None
        self._narrow = self._library is not None and self._library.factor_bytes() == 2
        self._H_II, self._leading_I = H_II, leading_I / self._scale_I
        if self._narrow:
            self._H_II = torch.addr(H_II, self._leading_I, self._leading_I, alpha=-1).bfloat16()
        else:
            self._leading_I.zero_()  # H is whole

    def product(self, x_OI: Tensor) -> Tensor:
        """x H, (O, I) float32."""
        if not self._narrow:
            return x_OI @ self._H_II
        product_OI = (x_OI.bfloat16() @ self._H_II).float()
        return product_OI.addr_(x_OI @ self._leading_I, self._leading_I)

    def descend(self, fit: "Fit", keep_OI: Tensor, *, steps: int) -> None:
        """Lower it, row by row, over the places of V that `keep_OI` (O, I) bool leaves free, in place.

        Raises: ValueError if a tensor is not contiguous or not of the type said here; MemoryError.
        """
        for x_OI, dtype in ((fit.values_OI, torch.float32), (fit.residual_OI, torch.float32), (keep_OI, torch.bool)):
            if not x_OI.is_contiguous() or x_OI.dtype != dtype or x_OI.shape != keep_OI.shape:
                raise ValueError(f"{tuple(x_OI.shape)}, {x_OI.dtype}: not a contiguous {dtype} as large as the mask")
        if self._library is None:
            self._descend(fit, keep_OI, steps)
            return
        core_ORR = torch.empty(keep_OI.shape[0], _MODES, _MODES)
        direction_OI = torch.empty_like(fit.values_OI)
        next_OI = torch.empty(keep_OI.shape, dtype=torch.bfloat16) if self._narrow else direction_OI
        products_O, modes_RI = torch.empty(keep_OI.shape[0]), self._modes_IR.T.contiguous()
        shared = _Shared(
            *(x.data_ptr() for x in (self._scale_I, self._modes_IR, modes_RI, self._inverse_R, self._leading_I)),
            *keep_OI.shape,
            torch.get_num_threads(),
        )
        tensors = (keep_OI, core_ORR, fit.values_OI, fit.residual_OI, direction_OI, next_OI, products_O)
        state = _State(*(x.data_ptr() for x in tensors))
        failed = self._library.begin(shared, state)
        for _ in range(steps):
            curved_OI = next_OI @ self._H_II
            failed = failed or self._library.step(shared, state, curved_OI.data_ptr())
        if failed:
            raise MemoryError("no memory for the rows of a descent")

    def _descend(self, fit: "Fit", keep_OI: Tensor, steps: int) -> None:
        modes_IR = self._modes_IR
        pairs_IS = (modes_IR[:, :, None] * modes_IR[:, None, :]).flatten(1)
        gram_ORR = (keep_OI.float() @ pairs_IS).view(-1, _MODES, _MODES)
        core_ORR = torch.linalg.inv(gram_ORR + torch.diag(self._inverse_R))

        def preconditioned() -> Tensor:
            scaled_OI = fit.residual_OI * keep_OI * self._scale_I
            parts_OR = torch.einsum("or,ors->os", scaled_OI @ modes_IR, core_ORR)
            return (scaled_OI - parts_OR @ modes_IR.T) * keep_OI * self._scale_I

        direction_OI = preconditioned()
        product_O = (fit.residual_OI * direction_OI).sum(1)
        for _ in range(steps):
            curved_OI = direction_OI @ self._H_II
            curvature_O = (direction_OI * curved_OI).sum(1)
            length_O1 = torch.where(curvature_O > 0, product_O / curvature_O, 0)[:, None]
            fit.values_OI.addcmul_(direction_OI, length_O1)
            fit.residual_OI.addcmul_(curved_OI, length_O1, value=-1)
            turned_OI = preconditioned()
            before_O, product_O = product_O, (fit.residual_OI * turned_OI).sum(1)
            direction_OI.mul_(torch.where(before_O > 0, product_O / before_O, 0)[:, None]).add_(turned_OI)


@dataclass
class Fit:
    """Where a descent stands: V, and (W - V) H, which also says what every pruned place would be worth.

    Both (O, I) float32, contiguous.
    """

    values_OI: Tensor
    residual_OI: Tensor


def _leading_modes(S_II: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U, the diagonal of L^-1, and the first of U times the root of its eigenvalue.

    S is about m (I + U L U^T), U being leading eigenvectors and m the mean of the other eigenvalues. By subspace
    iteration. Modes that a small matrix does not have are zero, and count for nothing.
    """
    width = S_II.shape[0]
    count = min(_MODES, (width + 1) // 2)
    generator = torch.Generator().manual_seed(0)
    Q_IK = torch.randn(width, min(count + _SPARE, width), generator=generator).to(S_II.device)
    for _ in range(_ITERATIONS):
        Q_IK = torch.linalg.qr(S_II @ Q_IK).Q
    values_K, vectors_KK = torch.linalg.eigh(Q_IK.T @ S_II @ Q_IK)
    vectors_IK = Q_IK @ vectors_KK
    mean = ((S_II.diagonal().sum() - values_K[-count:].sum()) / max(width - count, 1)).clamp(min=1e-6)
    modes_IR, inverse_R = S_II.new_zeros(width, _MODES), S_II.new_ones(_MODES)
    modes_IR[:, :count] = vectors_IK[:, -count:]
    inverse_R[:count] = 1 / (values_K[-count:] / mean - 1).clamp(min=1e-6)
    return modes_IR, inverse_R, vectors_IK[:, -1] * values_K[-1].clamp(min=0).sqrt()


class _Shared(ctypes.Structure):
    """As in descent.cpp."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("scale_I", "modes_IR", "modes_RI", "inverse_R", "leading_I")] + [
        (name, ctypes.c_int64) for name in ("outputs", "inputs", "threads")
    ]


class _State(ctypes.Structure):
    """As in descent.cpp."""

    _fields_ = [
        (name, ctypes.c_void_p)
        for name in ("keep_OI", "core_ORR", "values_OI", "residual_OI", "direction_OI", "next_OI", "products_O")
    ]


def _library() -> ctypes.CDLL | None:
    # with AMX or BF16 instructions products in bfloat16 are the fastest; with AVX-512 alone as with AVX2, float32
    library = load("descent", AVX512_BF16, AVX512, AVX2)
    if library is None:
        return None
    shared, state = ctypes.POINTER(_Shared), ctypes.POINTER(_State)
    library.begin.argtypes, library.begin.restype = [shared, state], ctypes.c_int
    library.step.argtypes, library.step.restype = [shared, state, ctypes.c_void_p], ctypes.c_int
    return library
