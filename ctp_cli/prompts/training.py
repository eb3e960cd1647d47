"""Learn a prompt by maximum likelihood on frozen models (Compress, Then Prompt, Eq. 1).

B=batch T=tokens
"""

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ctp_cli.data.batches import Batches
from ctp_cli.errors import NotFiniteError
from ctp_cli.files import whole_file
from ctp_cli.models.head import SoftTargets
from ctp_cli.progress import SILENT, Progress
from ctp_cli.prompts.losses import PromptedLoss
from ctp_cli.prompts.teacher import Teacher

_TIMED_STEPS = 3
_SEARCH_STEPS = 20
_LOWER_RATE = "use a lower --lr"
Received = TypeVar("Received")


@dataclass(frozen=True)
class LearningSettings:
    """How to learn. The smaller of `steps` and what fits `max_seconds` counts; at least one of them is given.

    What fits is estimated from a few timed steps and again at every validation: the machine may get slower or faster.
    """

    steps: int | None
    max_seconds: float | None
    batch_size: int
    learning_rates: tuple[float, ...]
    """Of several the one counts that has the best prompt after a short run with each."""
    warmup_share: float
    gradient_clip: float
    weight_decay: float
    validate_every: int
    patience: int
    seed: int


_TENSORS = ("prompt", "best", "moments", "position")


@dataclass
class Progressing:
    """Everything the rest of the run depends on, so that it can stop anywhere and go on to the same bits."""

    prompt: Tensor
    """The parameter as learned now, and as it was at its best."""
    best: Tensor
    step: int = 0
    planned_steps: int = 0
    learning_rate: float = 0.0
    best_step: int = 0
    best_perplexity: float = math.inf
    stale_validations: int = 0
    seconds: float = 0.0
    """Of steps; those of validations, except the first, come beside."""
    validation_seconds: float = 0.0
    search_seconds: float = 0.0
    """Of the search for a learning rate."""
    history: list[tuple[int, float]] = field(default_factory=list)
    """(step, validation perplexity)"""
    moments: dict[str, Tensor] = field(default_factory=dict)
    """AdamW's state of the prompt"""
    position: dict[str, Tensor] = field(default_factory=dict)
    """Of the text's batches."""
    loss_scale: dict[str, float] = field(default_factory=dict)
    """Of gradients in float16: the state of torch's GradScaler."""

    def save(self, path: Path) -> None:
        """One file, whole or absent: tensors in the body, numbers in the header."""
        tensors = {
            "prompt": self.prompt,
            "best": self.best,
            **{f"adamw.{k}": v for k, v in self.moments.items()},
            **{f"text.{k}": v for k, v in self.position.items()},
        }
        numbers = {key: value for key, value in asdict(self).items() if key not in _TENSORS}
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
        moments, position = (
            {name.removeprefix(kind): t for name, t in tensors.items() if name.startswith(kind)}
            for kind in ("adamw.", "text.")
        )
        return cls(tensors["prompt"], tensors["best"], moments=moments, position=position, **numbers)


def random_rows(embedding: nn.Embedding, count: int, usable_ids: Tensor, generator: torch.Generator) -> Tensor:
    """Initial prompt (count, D) float32: embeddings, as the model sees them, of random tokens among `usable_ids`."""
    chosen = usable_ids[torch.randint(usable_ids.numel(), (count,), generator=generator)]
    # through the module, not its table: some families (Gemma) scale embeddings on the way
    return embedding(chosen.to(embedding.weight.device)).detach().float().clone()


def learning_rate_at(step: int, planned: int, *, peak: float, warmup_share: float) -> float:
    """Linear rise over the warm-up, then linear fall to zero at the end."""
    warmup = max(1, round(warmup_share * planned))
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (planned - step) / max(1, planned - warmup)


def from_main(value: Received) -> Received:
    """The main process's value, in every process; where there is one process, the value itself."""
    box = [value]
    broadcast_object_list(box)
    return box[0]


def learn(
    module: PromptedLoss,
    batches: Batches,
    *,
    settings: LearningSettings,
    validate: Callable[[], float],
    accelerator: Accelerator,
    state_path: Path,
    teacher: Teacher | None = None,
    progress: Progress = SILENT,
) -> Progressing:
    """The prompt with the lowest validation perplexity on the way, and the way itself.

    `batches` are of the training text; `validate` gives the module's perplexity on selection text; where the module has
    several models, they take turns step by step. The state is saved at `state_path` at every validation; where it
    exists, learning goes on from it, and without a time limit to the same bits as without the interruption. Several
    processes share every batch.

    Raises NotFiniteError where learning starts from, or comes to, what the models' outputs are no numbers with;
    UnknownTokenError where it comes to tokens that the models, or the teacher, have no rows for.
    """
    resumed = from_main(state_path.exists())
    start = module.prompt.detach().cpu()
    state = Progressing.load(state_path) if resumed else Progressing(start.clone(), start.clone())
    if not resumed:
        started = time.perf_counter()
        with _blamed_on("with the prompt that learning starts from", hint="start from another one"):
            state.best_perplexity = validate()
        first_seconds = time.perf_counter() - started
        state.history.append((0, state.best_perplexity))
        progress.say(f"step 0: validation perplexity {state.best_perplexity:.3f} (the start)")
    batches.go_to(state.position)
    loop = _Loop(module, state, batches, settings, accelerator, teacher)
    if not resumed:
        started = time.perf_counter()
        state.learning_rate = loop.best_rate(validate, progress)
        state.search_seconds = time.perf_counter() - started
        left = None if settings.max_seconds is None else settings.max_seconds - state.search_seconds
        fitting = None if left is None else loop.steps_that_fit(left, first_seconds)
        state.planned_steps = min(steps for steps in (settings.steps, fitting) if steps is not None)
        if accelerator.is_main_process:
            state.save(state_path)
    if teacher is not None:
        if teacher.is_sharded or accelerator.is_main_process:
            writes = accelerator.is_main_process
            teacher.prepare(batches.at, state.planned_steps, writes=writes, progress=progress)
        accelerator.wait_for_everyone()
    progress.start("learn", state.planned_steps)
    progress.advance(state.step)
    while state.step < state.planned_steps and state.stale_validations < settings.patience:
        loss = loop.step()
        accelerator.log({"loss": loss, "tokens_per_second": loop.tokens_per_second()}, step=state.step)
        progress.advance(note=loop.note(loss))
        if state.step % settings.validate_every == 0 or state.step == state.planned_steps:
            _validate(loop, validate, progress)
            if loop.plan_again():
                progress.start("learn", state.planned_steps)
                progress.advance(state.step)
            accelerator.log({"validation_perplexity": state.history[-1][1]}, step=state.step)
            if accelerator.is_main_process:
                state.save(state_path)
    progress.finish()
    return state


def _validate(loop: "_Loop", validate: Callable[[], float], progress: Progress) -> None:
    state = loop.state
    loop.capture()
    started = time.perf_counter()
    with _blamed_on(_diverged(state.step, state.learning_rate), hint=_LOWER_RATE):
        value = validate()
    state.validation_seconds += time.perf_counter() - started
    state.history.append((state.step, value))
    if value < state.best_perplexity:
        state.best_perplexity, state.best_step, state.stale_validations = value, state.step, 0
        state.best = state.prompt.clone()
    else:
        state.stale_validations += 1
    better = " (best)" if state.best_step == state.step else ""
    progress.say(
        f"step {state.step}: validation perplexity {value:.3f}{better}, {loop.tokens_per_second():.0f} tokens/s"
    )


@contextlib.contextmanager
def _blamed_on(prompt: str, *, hint: str) -> Iterator[None]:
    """Without a prompt the models' outputs were numbers."""
    try:
        yield
    except NotFiniteError as error:
        raise NotFiniteError(f"{prompt} {error.message}", hint=hint) from None


def _diverged(step: int, rate: float) -> str:
    return f"learning diverged: after step {step} with learning rate {rate:g}"


class _Loop:
    """Optimizer steps on the prompt through accelerate."""

    def __init__(
        self,
        module: PromptedLoss,
        state: Progressing,
        batches: Batches,
        settings: LearningSettings,
        accelerator: Accelerator,
        teacher: Teacher | None,
    ) -> None:
        self.state, self.batches = state, batches
        self.settings, self.accelerator, self.teacher = settings, accelerator, teacher
        self.prompt, self._models, self._check_ids = module.prompt, module.models, module.check_ids
        self.module = self.accelerator.prepare(module)
        self._raw_optimizer = torch.optim.AdamW(
            [self.prompt], lr=settings.learning_rates[0], weight_decay=settings.weight_decay
        )
        # once: accelerate undoes the scaling of float16 gradients for every optimizer that it was given
        self.optimizer = self.accelerator.prepare(self._raw_optimizer)
        if accelerator.scaler is not None:
            state.loss_scale = state.loss_scale or accelerator.scaler.state_dict()
        self._start_from_state()
        self._step_seconds: list[float] = []

    def _start_from_state(self) -> None:
        with torch.no_grad():
            self.prompt.copy_(self.state.prompt)
        self._raw_optimizer.state.clear()
        if self.state.moments:
            self._raw_optimizer.state[self.prompt] = {
                name: tensor.clone() if name == "step" else tensor.clone().to(self.prompt.device)
                for name, tensor in self.state.moments.items()
            }
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(self.state.loss_scale)

    def step(self) -> float:
        started = time.perf_counter()
        asked = {} if self.teacher is None else self.teacher.at(self.state.step)
        loss = self._update(self.state.step, self.state.planned_steps, self.state.learning_rate, asked)
        self.state.step += 1
        elapsed = time.perf_counter() - started
        self.state.seconds += elapsed
        self._step_seconds = [*self._step_seconds[-19:], elapsed]
        return loss

    def _update(self, step: int, planned: int, peak: float, asked: Mapping[str, Tensor]) -> float:
        device = self.accelerator.device
        whole = {"ids": self.batches.at(step), **asked}
        self._check_ids(whole["ids"])
        with self.accelerator.split_between_processes(whole) as part, self.accelerator.autocast():
            ids_BT, *of_teacher = (tensor.to(device) for tensor in part.values())
            soft = None
            if self.teacher is not None and of_teacher:
                tokens_BTK, probabilities_BTK = of_teacher
                soft = SoftTargets(tokens_BTK, probabilities_BTK, self.teacher.share)
            loss = self.module(ids_BT, step % self._models, soft)
        self.accelerator.backward(loss)
        self.accelerator.clip_grad_norm_([self.prompt], self.settings.gradient_clip)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate_at(step, planned, peak=peak, warmup_share=self.settings.warmup_share)
        self.optimizer.step()
        self.optimizer.zero_grad()
        # not the loss: of float16 products a step that overflows is left out
        if not torch.isfinite(self.prompt).all():
            raise NotFiniteError(f"{_diverged(step + 1, peak)} the prompt holds NaN or infinity", hint=_LOWER_RATE)
        return loss.item()

    def best_rate(self, validate: Callable[[], float], progress: Progress) -> float:
        """The rate whose prompt is best after a short run from the start; what was learned is undone."""
        rates = self.settings.learning_rates
        if len(rates) == 1:
            return rates[0]
        found = {}
        for rate in rates:
            try:
                for step in range(_SEARCH_STEPS):
                    self._update(step, _SEARCH_STEPS, rate, {})
                found[rate] = validate()
            except NotFiniteError:
                found[rate] = math.inf
            progress.say(f"learning rate {rate:g}: validation perplexity {found[rate]:.3f} after {_SEARCH_STEPS} steps")
            self._start_from_state()
        return min(found, key=lambda rate: found[rate])

    def steps_that_fit(self, max_seconds: float, validation_seconds: float) -> int:
        """Time a few steps, then undo them. Every process must come to the same number, so the slowest one decides."""
        timings = []
        for step in range(_TIMED_STEPS):
            started = time.perf_counter()
            self._update(step, 10 * _TIMED_STEPS, self.state.learning_rate, {})
            timings.append(time.perf_counter() - started)
        self._start_from_state()
        per_step = sorted(timings)[_TIMED_STEPS // 2] + validation_seconds / self.settings.validate_every
        fitting = torch.tensor([max_seconds / per_step], device=self.accelerator.device)
        fewest = float(self.accelerator.gather(fitting).min())
        return max(1, math.floor(fewest))

    def plan_again(self) -> bool:
        """Fit the number of steps to the time that is left, at the pace of late. Whether it changed.

        A teacher's answers are there for the steps first planned: it never becomes more than these.
        """
        state, limit = self.state, self.settings.max_seconds
        if limit is None:
            return False
        pace = sum(self._step_seconds) / len(self._step_seconds)
        pace += state.validation_seconds / max(1, len(state.history) - 1) / self.settings.validate_every
        left = max(0.0, limit - state.search_seconds - state.seconds - state.validation_seconds)
        most = [self.settings.steps, None if self.teacher is None else state.planned_steps]
        fitting = min(steps for steps in (state.step + math.floor(left / pace), *most) if steps is not None)
        before, state.planned_steps = state.planned_steps, from_main(fitting)
        return state.planned_steps != before

    def capture(self) -> None:
        """Copy the parameter, its moments and where the text is into the state."""
        self.state.position = self.batches.position()
        self.state.prompt = self.prompt.detach().cpu().clone()
        moments: dict[str, Any] = self._raw_optimizer.state[self.prompt]
        self.state.moments = {name: torch.as_tensor(value).detach().cpu().clone() for name, value in moments.items()}
        if self.accelerator.scaler is not None:
            self.state.loss_scale = self.accelerator.scaler.state_dict()

    def tokens_per_second(self) -> float:
        if not self._step_seconds:
            return 0.0
        mean = sum(self._step_seconds) / len(self._step_seconds)
        return self.settings.batch_size * self.batches.seqlen / mean

    def note(self, loss: float) -> str:
        left = (self.state.planned_steps - self.state.step) * sum(self._step_seconds) / len(self._step_seconds)
        return f"loss {loss:.3f}, {self.tokens_per_second():.0f} tokens/s, about {left / 60:.0f} min left"
