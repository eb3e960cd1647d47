"""Second moments of a layer's inputs and the triangular factor every solver step needs.

I=in_features T=tokens
"""

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from ctp_kernels.gram import add_gram
from torch import Tensor

from ctp_cli.errors import ShapeError, SolverError

log = logging.getLogger(__name__)

_RETRIES = 5
_STRIP = 256
"""Columns that are mirrored at once."""
_SMALL = 192
"""Width below which a triangular matrix is inverted at once."""


@dataclass
class Hessian:
    """sum over tokens of x x^T, upper triangle only while it grows, and the number of tokens seen."""

    H_II: Tensor
    tokens: int = 0
    is_mean: bool = False

    @classmethod
    def zeros(cls, in_features: int, device: torch.device) -> "Hessian":
        return cls(torch.zeros(in_features, in_features, dtype=torch.float32, device=device))

    def add(self, x_TI: Tensor) -> None:
        """Add one batch of layer inputs, in place.

        Shapes: x_TI (T, I), any float dtype.
        Units: plain sums; `mean` divides by the token count once, at the end.
        Raises: ShapeError if x_TI's width is not I.
        Source: GPTQ (arXiv:2210.17323), section 3.
        """
        width = self.H_II.shape[0]
        if x_TI.dim() != 2 or x_TI.shape[1] != width:
            raise ShapeError(f"inputs of shape {tuple(x_TI.shape)} do not fit a Hessian of width {width}")
        self.tokens += x_TI.shape[0]
        with bf16_products(x_TI.dtype == torch.bfloat16):
            add_gram(self.H_II, x_TI)

    def mean(self) -> Tensor:
        """(I, I) mean of x x^T over the tokens seen, symmetric; the identity if no input ever fired.

        It takes the place of the sums, to which nothing can be added any more: wide ones are large.
        """
        if self.is_mean:
            return self.H_II
        self.is_mean = True
        if self.tokens == 0 or not torch.any(torch.diagonal(self.H_II)):
            self.H_II.zero_().diagonal().fill_(1)
            return self.H_II
        self.H_II.div_(self.tokens)
        for start in range(0, self.H_II.shape[0], _STRIP):
            stop = start + _STRIP
            upper = torch.triu(self.H_II[start:stop, start:stop])
            self.H_II[start:stop, start:stop] = upper + torch.triu(upper, 1).T
            self.H_II[stop:, start:stop] = self.H_II[start:stop, stop:].T
        return self.H_II


@contextlib.contextmanager
def bf16_products(allowed: bool) -> Iterator[None]:
    """Let float32 matmuls multiply in bfloat16 and sum in float32: exact for operands that came from bfloat16."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if allowed else before)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def all_finite(x: Tensor) -> bool:
    """Whether x holds neither NaN nor infinity: both show in its extremes, and nothing of x's size has to be made."""
    return bool(torch.isfinite(torch.stack(torch.aminmax(x))).all())


@contextlib.contextmanager
def dampened(H_II: Tensor, share: float) -> Iterator[None]:
    """`share` of H's mean diagonal added to its diagonal meanwhile: positive definite even if no input ever fired."""
    damping, diagonal_I = (share * H_II.diagonal().mean()).clamp(min=1e-30), H_II.diagonal().clone()
    H_II.diagonal().add_(damping)
    try:
        yield
    finally:
        H_II.diagonal().copy_(diagonal_I)


def refuse_not_finite(H_II: Tensor, *, layer: str) -> None:
    """Raises SolverError, naming the layer, if H holds NaN or infinity."""
    if not all_finite(H_II):
        raise SolverError(
            f"{layer}: its calibration inputs hold NaN or infinity",
            hint="does the uncompressed model run on this text?",
        )


def inverse_factor(
    H_II: Tensor, *, dampening: float, layer: str, order_I: Tensor | None = None
) -> tuple[Tensor, float]:
    """The upper-triangular U with U^T U = (H + damp I)^-1, and the dampening that was needed.

    U[i, i:] / U[i, i] holds the optimal corrections of later inputs for an error at input i. Computed from the Cholesky
    factor of H with its indices reversed: H = M M^T with M upper triangular, U = M^-1; no inverse of H is formed.

    Shapes: H_II (I, I) float32; order_I (I,) the order in which inputs are taken, None as they are.
    Units: `dampening` is a share of the mean of diag(H) (percdamp in GPTQ).
    Memory: twice that of H.
    Raises: SolverError, naming the layer, if H holds NaN or infinity or stays indefinite with dampening raised
        tenfold four times.
    Source: GPTQ (arXiv:2210.17323), section 3.3.
    """
    refuse_not_finite(H_II, layer=layer)
    if order_I is None:
        order_I = torch.arange(H_II.shape[0], device=H_II.device)
    order_I = order_I.to(H_II.device)
    share = dampening
    for _ in range(_RETRIES):
        ordered_II = H_II[order_I[:, None], order_I]
        ordered_II.diagonal().add_(share * ordered_II.diagonal().mean())
        reversed_II = ordered_II.flip(0, 1)
        del ordered_II
        L_II, info = torch.linalg.cholesky_ex(reversed_II)
        del reversed_II
        if info.item() == 0:
            U_II = L_II.flip(0, 1)
            del L_II
            _invert_upper(U_II)
            if all_finite(U_II):
                if share != dampening:
                    log.warning("%s: Hessian needed dampening %g instead of %g", layer, share, dampening)
                return U_II, share
        share *= 10
    raise SolverError(
        f"{layer}: its Hessian is not positive definite, even with dampening {share / 10:g}",
        hint="use more or other calibration text (--windows, --calibration), or a larger --dampening",
    )


def _invert_upper(M_II: Tensor) -> None:
    """Invert an upper-triangular matrix in place, half as much work as solving for an identity, most of it products."""
    width = M_II.shape[0]
    if width <= _SMALL:
        M_II.copy_(torch.linalg.solve_triangular(M_II, torch.eye(width, device=M_II.device), upper=True))
        return
    half = width // 2
    first, last, between = M_II[:half, :half], M_II[half:, half:], M_II[:half, half:]
    _invert_upper(first)
    _invert_upper(last)
    between.copy_((first @ between @ last).neg_())
