"""Learn a soft prompt by maximum likelihood on a frozen model (Compress, Then Prompt, Eq. 1).

B=batch T=tokens P=prompt tokens D=embedding width
"""

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from ctp_cli.files import whole_file
from ctp_cli.models.head import Scorer
from ctp_cli.progress import SILENT, Progress

_TIMED_STEPS = 3


@dataclass(frozen=True)
class LearningSettings:
    """How to learn. The smaller of `steps` and what fits `max_seconds` counts; at least one of them is given."""

    steps: int | None
    max_seconds: float | None
    batch_size: int
    learning_rate: float
    warmup_share: float
    gradient_clip: float
    weight_decay: float
    validate_every: int
    patience: int
    seed: int


@dataclass
class Progressing:
    """Everything the rest of the run depends on, so that it can stop anywhere and go on to the same bits."""

    prompt_PD: Tensor
    best_PD: Tensor
    step: int = 0
    planned_steps: int = 0
    best_step: int = 0
    best_perplexity: float = math.inf
    stale_validations: int = 0
    seconds: float = 0.0
    history: list[tuple[int, float]] = field(default_factory=list)
    """(step, validation perplexity)"""
    moments: dict[str, Tensor] = field(default_factory=dict)
    """AdamW's state of the prompt"""

    def save(self, path: Path) -> None:
        """One file, whole or absent: tensors in the body, numbers in the header."""
        tensors = {
            "prompt": self.prompt_PD,
            "best": self.best_PD,
            **{f"adamw.{k}": v for k, v in self.moments.items()},
        }
        numbers = {
            key: value for key, value in asdict(self).items() if not isinstance(value, Tensor) and key != "moments"
        }
        with whole_file(path) as beside:
            save_file(
                {k: v.detach().cpu().contiguous() for k, v in tensors.items()},
                beside,
                {"state": json.dumps(numbers)},
            )

    @classmethod
    def load(cls, path: Path) -> "Progressing":
        with safe_open(path, "pt") as handle:
            numbers = json.loads(handle.metadata()["state"])
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 - not a dict
        numbers["history"] = [(int(step), float(value)) for step, value in numbers["history"]]
        moments = {name.removeprefix("adamw."): t for name, t in tensors.items() if name.startswith("adamw.")}
        return cls(tensors["prompt"], tensors["best"], moments=moments, **numbers)


def random_rows(embedding: nn.Embedding, count: int, usable_ids: Tensor, generator: torch.Generator) -> Tensor:
    """Initial prompt (count, D) float32: embeddings, as the model sees them, of random tokens among `usable_ids`."""
    chosen = usable_ids[torch.randint(usable_ids.numel(), (count,), generator=generator)]
    # through the module, not its table: some families (Gemma) scale embeddings on the way
    return embedding(chosen.to(embedding.weight.device)).detach().float().clone()


def batch_at(ids_T: Tensor, seqlen: int, *, step: int, batch_size: int, seed: int) -> Tensor:
    """The batch (B, seqlen) of one step, a pure function of its arguments.

    An epoch takes every window of the text once, in a random order; windows start at another offset in every epoch.
    """
    per_epoch = (ids_T.numel() - seqlen) // seqlen  # the offset costs up to one window
    rows = []
    for index in range(step * batch_size, (step + 1) * batch_size):
        epoch, position = divmod(index, per_epoch)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        offset = int(torch.randint(seqlen, (1,), generator=generator))
        window = int(torch.randperm(per_epoch, generator=generator)[position])
        rows.append(ids_T[offset + window * seqlen : offset + (window + 1) * seqlen])
    return torch.stack(rows)


def learning_rate_at(step: int, planned: int, settings: LearningSettings) -> float:
    """Linear rise over the warm-up, then linear fall to zero at the end."""
    warmup = max(1, round(settings.warmup_share * planned))
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    return settings.learning_rate * (planned - step) / max(1, planned - warmup)


class PromptedLoss(nn.Module):
    """Mean loss of text behind a learned prompt. The prompt is its only parameter; the model is frozen."""

    def __init__(self, model: PreTrainedModel, prompt_PD: Tensor) -> None:
        super().__init__()
        self.prompt_PD = nn.Parameter(prompt_PD.clone())
        # held outside of nn.Module's registry: its parameters are neither prepared, synchronized nor saved with ours
        self._frozen = (model, Scorer(model))

    def forward(self, ids_BT: Tensor) -> Tensor:
        model, scorer = self._frozen
        text_BTD = model.get_input_embeddings()(ids_BT)
        prompt_BPD = self.prompt_PD.to(text_BTD.dtype)[None].expand(ids_BT.shape[0], -1, -1)
        inputs_embeds = torch.cat([prompt_BPD, text_BTD], dim=1)
        return scorer.nll(ids_BT, skip=self.prompt_PD.shape[0], inputs_embeds=inputs_embeds).mean()


def learn(
    model: PreTrainedModel,
    ids_T: Tensor,
    start_PD: Tensor,
    *,
    seqlen: int,
    settings: LearningSettings,
    validate: Callable[[Tensor], float],
    accelerator: Accelerator,
    state_path: Path,
    progress: Progress = SILENT,
) -> Progressing:
    """The prompt with the lowest validation perplexity on the way, and the way itself.

    Shapes: ids_T (T,) training text; start_PD (P, D) float32. `validate` maps a prompt to a perplexity on selection
    text. The state is saved at `state_path` at every validation; where it exists, learning goes on from it to the same
    bits as without the interruption. A time limit becomes a number of steps once, near the start, and is then part of
    the state.
    """
    resumed = state_path.exists()
    state = Progressing.load(state_path) if resumed else Progressing(start_PD.clone(), start_PD.clone())
    if not resumed:
        started = time.perf_counter()
        state.best_perplexity = validate(state.prompt_PD)
        validation_seconds = time.perf_counter() - started
        state.history.append((0, state.best_perplexity))
        progress.say(f"step 0: validation perplexity {state.best_perplexity:.3f} (random token embeddings)")
    loop = _Loop(model, state, ids_T, seqlen, settings, accelerator)
    if not resumed:
        fitting = (
            None if settings.max_seconds is None else loop.steps_that_fit(settings.max_seconds, validation_seconds)
        )
        state.planned_steps = min(steps for steps in (settings.steps, fitting) if steps is not None)
        if accelerator.is_main_process:
            state.save(state_path)
    progress.start("learn", state.planned_steps)
    progress.advance(state.step)
    while state.step < state.planned_steps and state.stale_validations < settings.patience:
        loss = loop.step()
        progress.advance(note=loop.note(loss))
        if state.step % settings.validate_every == 0 or state.step == state.planned_steps:
            _validate(loop, validate, progress)
            if accelerator.is_main_process:
                state.save(state_path)
    progress.finish()
    return state


def _validate(loop: "_Loop", validate: Callable[[Tensor], float], progress: Progress) -> None:
    state = loop.state
    loop.capture()
    value = validate(state.prompt_PD)
    state.history.append((state.step, value))
    if value < state.best_perplexity:
        state.best_perplexity, state.best_step, state.stale_validations = value, state.step, 0
        state.best_PD = state.prompt_PD.clone()
    else:
        state.stale_validations += 1
    better = " (best)" if state.best_step == state.step else ""
    progress.say(
        f"step {state.step}: validation perplexity {value:.3f}{better}, {loop.tokens_per_second():.0f} tokens/s"
    )


class _Loop:
    """Optimizer steps on the prompt through accelerate."""

    def __init__(
        self,
        model: PreTrainedModel,
        state: Progressing,
        ids_T: Tensor,
        seqlen: int,
        settings: LearningSettings,
        accelerator: Accelerator,
    ) -> None:
        self.state, self.ids_T, self.seqlen = state, ids_T, seqlen
        self.settings, self.accelerator = settings, accelerator
        self._build(model)
        self._model = model
        self._step_seconds: list[float] = []

    def _build(self, model: PreTrainedModel) -> None:
        module = PromptedLoss(model, self.state.prompt_PD.to(self.accelerator.device))
        optimizer = torch.optim.AdamW(
            module.parameters(), lr=self.settings.learning_rate, weight_decay=self.settings.weight_decay
        )
        if self.state.moments:
            device = module.prompt_PD.device
            optimizer.state[module.prompt_PD] = {
                name: tensor.clone() if name == "step" else tensor.clone().to(device)
                for name, tensor in self.state.moments.items()
            }
        self.prompt_PD, self._raw_optimizer = module.prompt_PD, optimizer
        self.module, self.optimizer = self.accelerator.prepare(module, optimizer)

    def step(self) -> float:
        started = time.perf_counter()
        loss = self._update(self.state.step, self.state.planned_steps)
        self.state.step += 1
        elapsed = time.perf_counter() - started
        self.state.seconds += elapsed
        self._step_seconds = [*self._step_seconds[-19:], elapsed]
        return loss

    def _update(self, step: int, planned: int) -> float:
        ids_BT = batch_at(
            self.ids_T, self.seqlen, step=step, batch_size=self.settings.batch_size, seed=self.settings.seed
        )
        with self.accelerator.split_between_processes(ids_BT) as part_BT, self.accelerator.autocast():
            loss = self.module(part_BT.to(self.accelerator.device))
        self.accelerator.backward(loss)
        self.accelerator.clip_grad_norm_([self.prompt_PD], self.settings.gradient_clip)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate_at(step, planned, self.settings)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    def steps_that_fit(self, max_seconds: float, validation_seconds: float) -> int:
        """Time a few steps, then undo them. Every process must come to the same number, so the slowest one decides."""
        timings = []
        for step in range(_TIMED_STEPS):
            started = time.perf_counter()
            self._update(step, 10 * _TIMED_STEPS)
            timings.append(time.perf_counter() - started)
        with torch.no_grad():
            self.prompt_PD.copy_(self.state.prompt_PD)
        self._build(self._model)
        per_step = sorted(timings)[_TIMED_STEPS // 2] + validation_seconds / self.settings.validate_every
        fitting = torch.tensor([max_seconds / per_step], device=self.accelerator.device)
        fewest = float(self.accelerator.gather(fitting).min())
        return max(1, math.floor(fewest))

    def capture(self) -> None:
        """Copy the parameter and its moments into the state."""
        self.state.prompt_PD = self.prompt_PD.detach().cpu().clone()
        moments: dict[str, Any] = self._raw_optimizer.state[self.prompt_PD]
        self.state.moments = {name: torch.as_tensor(value).detach().cpu().clone() for name, value in moments.items()}

    def tokens_per_second(self) -> float:
        if not self._step_seconds:
            return 0.0
        mean = sum(self._step_seconds) / len(self._step_seconds)
        return self.settings.batch_size * self.seqlen / mean

    def note(self, loss: float) -> str:
        left = (self.state.planned_steps - self.state.step) * sum(self._step_seconds) / len(self._step_seconds)
        return f"loss {loss:.3f}, {self.tokens_per_second():.0f} tokens/s, about {left / 60:.0f} min left"
