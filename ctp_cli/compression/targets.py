"""Weights that aim at what the full model computes, before any of them is pruned or rounded.

GPTQ and SparseGPT ask a layer to reproduce what its old weights would make of the inputs it now gets. Those inputs
already carry the errors of the layers before it, and so would a perfect reproduction. Here a layer is asked for what
the full model computes in its place, given the inputs it now gets, and where its output is added to the residual
stream, for what is missing there as well.

T=tokens I=in_features O=out_features
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ctp_cli.compression.hessian import bf16_products, inverse_factor


@dataclass
class Mismatch:
    """Sums over tokens of (x_full - x) x^T and of gap x^T, x being the layer's inputs in the compressed model.

    gap is what the residual stream lacks where the layer's output is added to it; None for layers that do not write
    to the residual stream.
    """

    inputs_II: Tensor
    gap_OI: Tensor | None
    tokens: int = 0

    @classmethod
    def zeros(cls, in_features: int, gap_features: int | None, device: torch.device) -> "Mismatch":
        gap = None if gap_features is None else torch.zeros(gap_features, in_features, device=device)
        return cls(torch.zeros(in_features, in_features, device=device), gap)

    def add(self, x_full_TI: Tensor, x_TI: Tensor, gap_TO: Tensor | None) -> None:
        """Add one batch, in place."""
        self.tokens += x_TI.shape[0]
        bf16 = x_TI.dtype == torch.bfloat16
        x_full_TI, x_TI = x_full_TI.float(), x_TI.float()
        with bf16_products(bf16):
            self.inputs_II.addmm_((x_full_TI - x_TI).T, x_TI)
            if self.gap_OI is not None and gap_TO is not None:
                self.gap_OI.addmm_(gap_TO.T, x_TI)

    def corrected(self, weights_OI: list[Tensor], H_II: Tensor, *, dampening: float, layer: str) -> list[Tensor]:
        """W + (W E[(x_full - x) x^T] + E[gap x^T]) (H + damp I)^-1 for every W of the layers that share the input.

        It minimizes E |W x_full + gap - W' x|^2 over W', but for the dampening.

        Shapes: each weight (O, I) float32; H_II (I, I) float32, the mean of x x^T over the same tokens.
        Units: `dampening` is a share of the mean of diag(H).
        Raises: SolverError, naming `layer`, if H cannot be factorized.
        Source: asymmetric calibration, GPTAQ (arXiv:2504.02692), in closed form; the gap is added here.
        """
        if self.tokens == 0:
            return weights_OI
        U_II, _ = inverse_factor(H_II, dampening=dampening, layer=layer)
        corrected = []
        for W_OI in weights_OI:
            wanted_OI = W_OI @ self.inputs_II
            if self.gap_OI is not None:
                wanted_OI += self.gap_OI
            corrected.append(W_OI + (wanted_OI / self.tokens) @ U_II.T @ U_II)
        return corrected
