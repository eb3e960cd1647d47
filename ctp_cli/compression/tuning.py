"""Tune what is continuous in a compressed model, end to end: group scales, norms and biases; codes and masks stay.

One solver pass fits every layer to its own outputs. How the errors of all layers add up in what the model predicts is
seen only at its end. Here the compressed model learns to predict what the full model does, by gradient descent on the
few numbers that a checkpoint stores in high precision anyway, so its size, codes and zeros do not change.

Source: the idea of tuning only quantization parameters end to end is EfficientQAT's (arXiv:2407.11062); the loss here
is the divergence from the full model.

O=out_features I=in_features G=groups B=batch T=tokens N=windows
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel

from ctp_cli.errors import SolverError
from ctp_cli.models.blocks import Block, LinearLayer
from ctp_cli.models.head import Scorer
from ctp_cli.progress import SILENT, Progress

_WARMUP_SHARE = 0.05
_GRADIENT_CLIP = 1.0


@dataclass(frozen=True)
class Tuned:
    """What tuning found. The model itself holds it as well."""

    factors_OG: dict[str, Tensor]
    """By layer: what each group's scale is to be multiplied by, float32."""
    first_divergence: float
    last_divergence: float
    """KL from the full model in nats per token: of the first window, and the mean of the last eighth."""


class _Scaled(nn.Module):
    """A weight whose groups of inputs are multiplied by factors of their own."""

    def __init__(self, layer: LinearLayer, group_size: int) -> None:
        super().__init__()
        out_features, in_features = layer.weight_OI.shape
        self.change_OG = nn.Parameter(
            torch.zeros(out_features, in_features // group_size, device=layer.weight_OI.device)
        )
        self._transposed = layer.transposed

    def forward(self, weight: Tensor) -> Tensor:
        weight_OI = weight.T if self._transposed else weight
        outputs, groups = self.change_OG.shape
        scaled = weight_OI.float().view(outputs, groups, -1) * (1 + self.change_OG)[..., None]
        scaled_OI = scaled.view(weight_OI.shape).to(weight.dtype)
        return scaled_OI.T if self._transposed else scaled_OI


class _Shifted(nn.Module):
    """A norm's weight or a bias, moved in float32."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.change = nn.Parameter(torch.zeros_like(value, dtype=torch.float32))

    def forward(self, value: Tensor) -> Tensor:
        return (value.float() + self.change).to(value.dtype)


def tune(
    model: PreTrainedModel,
    full_model: PreTrainedModel,
    blocks: Sequence[Block],
    ids_NT: Tensor,
    *,
    group_size: int | None,
    learning_rate: float,
    progress: Progress = SILENT,
) -> Tuned:
    """Bring the model's predictions closer to the full model's, one window after the other, in place.

    Shapes: ids_NT (N, T), one step of AdamW per window, each seen once.
    Units: group_size in inputs, None for one group per output; the learning rate is relative to scales, which start at
        a factor of 1, and absolute for norms and biases; it rises over 5% of the steps and falls as a cosine.
    Raises: SolverError if the divergence stops being finite.
    """
    for parameter in (*model.parameters(), *full_model.parameters()):
        parameter.requires_grad_(False)
    scorer, full = Scorer(model), Scorer(full_model)
    scaled: dict[str, tuple[LinearLayer, _Scaled]] = {}
    for layer in (layer for block in blocks for layer in block.layers):
        scaled[layer.name] = (layer, _Scaled(layer, group_size or layer.weight_OI.shape[1]))
    shifted = [(owner, name, _Shifted(value)) for owner, name, value in _vectors(model)]
    changes = [change.change_OG for _, change in scaled.values()] + [change.change for *_, change in shifted]
    for layer, scaling in scaled.values():
        parametrize.register_parametrization(layer.module, "weight", scaling)
    for owner, name, shift in shifted:
        parametrize.register_parametrization(owner, name, shift)
    try:
        divergences = _descend(scorer, full, ids_NT, changes, learning_rate, progress)
    finally:
        for layer, _ in scaled.values():
            parametrize.remove_parametrizations(layer.module, "weight", leave_parametrized=True)
        for owner, name, _ in shifted:
            parametrize.remove_parametrizations(owner, name, leave_parametrized=True)
    last = divergences[-max(1, len(divergences) // 8) :]
    factors = {name: 1 + scaling.change_OG.detach() for name, (_, scaling) in scaled.items()}
    return Tuned(factors, divergences[0], sum(last) / len(last))


def _vectors(model: PreTrainedModel) -> list[tuple[nn.Module, str, Tensor]]:
    """Norm weights and biases, the head's own left out: both models are compared under one head."""
    head = model.get_output_embeddings()
    return [
        (module, name, parameter)
        for module in model.modules()
        if module is not head
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 1
    ]


def _descend(
    scorer: Scorer,
    full: Scorer,
    ids_NT: Tensor,
    changes: list[nn.Parameter],
    learning_rate: float,
    progress: Progress,
) -> list[float]:
    steps = ids_NT.shape[0]
    optimizer = torch.optim.AdamW(changes, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    divergences: list[float] = []
    progress.start("tune", steps)
    for step, ids_T in enumerate(ids_NT):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * _schedule(step, steps)
        loss = scorer.divergence(full, ids_T[None]).mean()
        divergences.append(loss.item())
        if not math.isfinite(divergences[-1]):
            raise SolverError(
                f"tuning: the divergence from the full model is {divergences[-1]} at window {step + 1}",
                hint="use a smaller --tune-learning-rate, or --tune-windows 0",
            )
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(changes, _GRADIENT_CLIP)
        optimizer.step()
        recent = divergences[-8:]
        progress.advance(note=f"KL from the full model {sum(recent) / len(recent):.3f}")
    progress.finish()
    return divergences


def _schedule(step: int, steps: int) -> float:
    warmup = max(1, round(_WARMUP_SHARE * steps))
    return min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))
