"""Tune a compressed model end to end: it learns to predict what the full model does.

One solver pass fits every layer to its own outputs. How the errors of all layers add up in what the model predicts is
seen only at its end, so that is where the loss is taken: the divergence from the full model, by gradient descent. Masks
and codes stay. What moves is the kept weights of a model that is pruned and not yet quantized, or the group scales of
a quantized one, and norms and biases in either: numbers that the checkpoint stores anyway.

Source: tuning quantization parameters end to end, EfficientQAT (arXiv:2407.11062); the loss here is a distillation.

O=out_features I=in_features G=groups B=batch T=tokens N=windows
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel

from ctp_cli.errors import SolverError
from ctp_cli.models.blocks import Block, LinearLayer
from ctp_cli.models.head import Scorer
from ctp_cli.progress import SILENT, Progress

_WARMUP_SHARE = 0.05
_STEP_TOKENS = 512
"""Tokens of one step, where they divide a window: two on halves gain more than one on all (docs/compression.md)."""
_GRADIENT_CLIP = 1.0
_FLOAT16_SCALE = 2.0**12


@dataclass(frozen=True)
class Tuned:
    """What tuning found. The model itself holds it as well."""

    factors_OG: dict[str, Tensor]
    """By layer: what each group's scale is to be multiplied by, float32. Empty where weights were tuned."""
    first_divergence: float
    last_divergence: float
    """KL from the full model in nats per token: of the first sequence, and the mean of the last eighth."""


class _Scaled(nn.Module):
    """A weight whose groups of inputs are multiplied by factors of their own."""

    def __init__(self, layer: LinearLayer, group_size: int) -> None:
        super().__init__()
        out_features, in_features = layer.weight_OI.shape
        device = layer.weight_OI.device
        self.change = nn.Parameter(torch.zeros(out_features, in_features // group_size, device=device))
        self._transposed = layer.transposed

    def factors_OG(self) -> Tensor:
        return 1 + self.change

    def forward(self, weight: Tensor) -> Tensor:
        weight_OI = weight.T if self._transposed else weight
        factors_OG = self.factors_OG()
        scaled_OGC = weight_OI.float().view(*factors_OG.shape, -1) * factors_OG[..., None]
        scaled_OI = scaled_OGC.view(weight_OI.shape).to(weight.dtype)
        return scaled_OI.T if self._transposed else scaled_OI


class _Moved(nn.Module):
    """A weight whose nonzero entries move in float32, in units of their root mean square."""

    def __init__(self, layer: LinearLayer) -> None:
        super().__init__()
        weight = layer.parameter.data
        self.change = nn.Parameter(torch.zeros_like(weight, dtype=torch.float32))
        self._unit = (weight != 0) * weight.float().square().sum().div(weight.count_nonzero().clamp(min=1)).sqrt()

    def forward(self, weight: Tensor) -> Tensor:
        return (weight.float() + self._unit * self.change).to(weight.dtype)


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
    what: Literal["scales", "weights"],
    group_size: int | None = None,
    learning_rate: float,
    bos: bool = False,
    progress: Progress = SILENT,
) -> Tuned:
    """Bring the model's predictions closer to the full model's, one sequence after the other, in place.

    Shapes: ids_NT (N, T), one step of AdamW per window, or per 512 tokens of it where those divide it; each seen once.
        With `bos` windows begin with that token, and so does each part of one, which leaves out a token for it.
    Units: group_size in inputs, None for one group per output. The learning rate is relative to scales, to a layer's
        root mean square weight, and absolute for norms and biases; it rises over 5% of the steps and falls as a cosine.
    Memory: `scales` adds little to the two models and one window's activations; `weights` 20 bytes per weight.
    Raises: SolverError if the divergence stops being finite.
    """
    for parameter in (*model.parameters(), *full_model.parameters()):
        parameter.requires_grad_(False)
    scorer, full = Scorer(model), Scorer(full_model)
    scaled: dict[str, _Scaled] = {}
    tuned: list[tuple[nn.Module, str, _Scaled | _Moved | _Shifted]] = []
    for layer in (layer for block in blocks for layer in block.layers):
        if what == "weights":
            tuned.append((layer.module, "weight", _Moved(layer)))
        else:
            scaled[layer.name] = _Scaled(layer, group_size or layer.weight_OI.shape[1])
            tuned.append((layer.module, "weight", scaled[layer.name]))
    tuned += [(owner, name, _Shifted(value)) for owner, name, value in _vectors(model)]
    for owner, name, change in tuned:
        parametrize.register_parametrization(owner, name, change)
    try:
        changes = [change.change for *_, change in tuned]
        divergences = _descend(scorer, full, _sequences(ids_NT, bos=bos), changes, learning_rate, progress)
    finally:
        for owner, name, _ in tuned:
            parametrize.remove_parametrizations(owner, name, leave_parametrized=True)
    last = divergences[-max(1, len(divergences) // 8) :]
    factors = {name: scaling.factors_OG().detach() for name, scaling in scaled.items()}
    return Tuned(factors, divergences[0], sum(last) / len(last))


def _sequences(ids_NT: Tensor, *, bos: bool) -> Tensor:
    """Windows, or their parts of a step's size."""
    if ids_NT.shape[1] % _STEP_TOKENS:
        return ids_NT
    parts_NPT = ids_NT.view(len(ids_NT), -1, _STEP_TOKENS)
    if bos:
        begun_NP = ids_NT[:, :1].expand(parts_NPT.shape[:2])
        later_NPT = torch.cat([begun_NP[..., None], parts_NPT[..., :-1]], dim=2)
        parts_NPT = torch.cat([parts_NPT[:, :1], later_NPT[:, 1:]], dim=1)
    return parts_NPT.reshape(-1, _STEP_TOKENS)


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
    optimizer = torch.optim.AdamW(changes, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    # where the two models hardly differ, gradients of float16 would round to zero
    scaler = torch.amp.GradScaler(
        ids_NT.device.type, enabled=scorer.model.dtype == torch.float16, init_scale=_FLOAT16_SCALE
    )
    divergences: list[float] = []
    progress.start("tune", steps)
    for step, ids_T in enumerate(ids_NT):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * _schedule(step, steps)
        loss = scorer.divergence(full, ids_T[None]).mean()
        divergences.append(loss.item())
        if not math.isfinite(divergences[-1]):
            raise SolverError(
                f"tuning: the divergence from the full model is {divergences[-1]} at step {step + 1}",
                hint="use a smaller --tune-learning-rate, or --tune-windows 0",
            )
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(changes, _GRADIENT_CLIP)
        scaler.step(optimizer)
        scaler.update()
        recent = divergences[-8:]
        progress.advance(note=f"KL from the full model {sum(recent) / len(recent):.3f}")
    progress.finish()
    return divergences


def _schedule(step: int, steps: int) -> float:
    warmup = max(1, round(_WARMUP_SHARE * steps))
    return min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))
