"""Latency of a Hugging Face causal LM against the length of a soft prompt in front of its text.

For every prompt length two things are timed: the time to the first token, with the prompt run through the
model each time and with its keys and values reused; and the time of every further token. One sequence at a
time, greedy.
"""

# P=prompt_tokens D=embedding_width T=text_tokens
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from ctp_kernels.arithmetic import fast_arithmetic
from ctp_kernels.memory import PeakMemory, watch_peak, weight_bytes
from ctp_kernels.prefix import (
    cache_bytes,
    cache_keyword,
    cache_of,
    check_width,
    fresh_copy,
    prefix_cache,
)

__all__ = [
    "Configuration",
    "LatencyReport",
    "LatencyRow",
    "PairedRatio",
    "PositionsError",
    "Quartiles",
    "Sample",
    "configurations",
    "fresh_copy",
    "measure_latency",
    "prefix_cache",
    "random_prompt",
]


class PositionsError(ValueError):
    """The model has learned positions, and fewer than prompt, text and new tokens need."""


@dataclass(frozen=True)
class Quartiles:
    """First quartile, median and third quartile over the rounds."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Quartiles":
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        return cls(*statistics.quantiles(values, n=4, method="inclusive"))


CONFIDENCE = 0.95


@dataclass(frozen=True)
class PairedRatio(Quartiles):
    """Ratios of two things timed in the same rounds, and a confidence interval of their median.

    The interval lies between two order statistics (the sign test's): it holds for any distribution of the noise, as
    long as rounds are independent. None where the rounds are too few for CONFIDENCE: fewer than 6.
    """

    confidence_low: float | None
    confidence_high: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> "PairedRatio":
        quartiles, interval = Quartiles.of(values), median_interval(values)
        return cls(quartiles.low, quartiles.median, quartiles.high, *(interval or (None, None)))


def median_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float] | None:
    """The narrowest interval between order statistics that covers the median with at least this probability.

    The k-th smallest and k-th largest of n miss it with probability 2 P(Binomial(n, 1/2) < k). None if even the
    smallest and the largest value do not cover it.
    """
    ordered, n = sorted(values), len(values)
    missed, k = 2.0 ** (1 - n), 1
    if missed > 1 - confidence:
        return None
    while missed + math.comb(n, k) * 2.0 ** (1 - n) <= 1 - confidence:
        missed += math.comb(n, k) * 2.0 ** (1 - n)
        k += 1
    return ordered[k - 1], ordered[n - k]


@dataclass(frozen=True)
class Configuration:
    """One thing to time. Without prompt tokens there is nothing to reuse."""

    prompt_tokens: int
    prefix_reused: bool


@dataclass(frozen=True)
class Sample:
    """One timed run."""

    first_token_ms: float
    per_token_ms: float


@dataclass(frozen=True)
class LatencyRow:
    """What one configuration took. Ratios are to no prompt, formed within each round."""

    prompt_tokens: int
    prefix_reused: bool
    first_token_ms: Quartiles
    """From the text's arrival to its first new token; the making of a reused prefix is not part of it."""
    per_token_ms: Quartiles
    """Mean over the new tokens after the first."""
    first_token_ratio: PairedRatio
    per_token_ratio: PairedRatio
    peak_memory_bytes: int | None
    """Largest growth during one run (keys, values, activations, logits), beyond weights and kept prefixes."""
    prefix_bytes: int
    """Keys and values kept between runs; 0 unless the prefix is reused."""
    samples: tuple[Sample, ...]
    """In the order of the rounds."""


@dataclass(frozen=True)
class LatencyReport:
    """Every row, and what is needed to read them."""

    rows: tuple[LatencyRow, ...]
    seqlen: int
    new_tokens: int
    rounds: int
    weight_bytes: int
    memory_method: str
    device: str
    dtype: str
    threads: int
    """Threads torch computes with on the CPU."""


def configurations(prompt_lengths: Sequence[int]) -> tuple[Configuration, ...]:
    """What `measure_latency` times: no prompt first, then each length without and with reuse."""
    lengths = sorted({0, *prompt_lengths})
    if lengths[0] < 0:
        raise ValueError(f"prompt_lengths: {lengths[0]} is negative")
    return tuple(Configuration(p, reused) for p in lengths for reused in (False, True) if p or not reused)


@torch.no_grad()
def random_prompt(model: Any, length: int, generator: torch.Generator) -> Tensor:
    """Embeddings (length, D) of random tokens: as good as a learned prompt where only time matters."""
    embedding = model.get_input_embeddings()
    rows: Tensor = embedding(_random_ids(embedding, length, generator))
    return rows


@torch.no_grad()
def measure_latency(
    model: nn.Module,
    prompt_embeddings: Tensor,
    *,
    prompt_lengths: Sequence[int],
    seqlen: int,
    new_tokens: int,
    rounds: int,
    generator: torch.Generator,
    on_run: Callable[[Configuration], None] = lambda _: None,
) -> LatencyReport:
    """Time a causal LM, in evaluation mode and on one device, with prompts of several lengths.

    Shapes: prompt_embeddings (P, D), P at least the longest of `prompt_lengths`; shorter prompts are its
    first rows.
    `seqlen` random text tokens come first, then `new_tokens` (at least 2) are generated. No prompt is always
    measured. Each configuration runs once untimed, when its memory is measured, then once per round; the
    configurations take turns, another one beginning each round, so that a slow spell of the machine hits
    all of them. `on_run` is called after each of the `(rounds + 1) * len(configurations(prompt_lengths))`
    runs.
    Raises: PositionsError if the model has fewer learned positions than all that needs, ValueError if the
    numbers do not go together.
    """
    turns = configurations(prompt_lengths)
    _check(
        model,
        prompt_embeddings,
        longest=turns[-1].prompt_tokens,
        seqlen=seqlen,
        new_tokens=new_tokens,
        rounds=rounds,
    )
    bench = _Bench(model, prompt_embeddings, turns, seqlen, new_tokens, generator)
    # whatever the libraries set up on first use would count as the first configuration's memory
    bench.run(turns[0])
    peaks = {turn: bench.memory_of(turn, on_run) for turn in turns}
    samples: dict[Configuration, list[Sample]] = {turn: [] for turn in turns}
    for index in range(rounds):
        first = index % len(turns)
        for turn in turns[first:] + turns[:first]:
            samples[turn].append(bench.run(turn))
            on_run(turn)
    return LatencyReport(
        rows=tuple(
            _row(turn, samples[turn], samples[turns[0]], peaks[turn], bench.prefixes.get(turn)) for turn in turns
        ),
        seqlen=seqlen,
        new_tokens=new_tokens,
        rounds=rounds,
        weight_bytes=weight_bytes(model),
        memory_method=" / ".join(sorted({peak.method for peak in peaks.values()})),
        device=torch.cuda.get_device_name(bench.device) if bench.device.type == "cuda" else str(bench.device),
        dtype=str(bench.prompt_PD.dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
    )


class _Bench:
    """The model, its text, and the prefixes made beforehand."""

    def __init__(
        self,
        model: Any,
        prompt_PD: Tensor,
        turns: Sequence[Configuration],
        seqlen: int,
        new_tokens: int,
        generator: torch.Generator,
    ) -> None:
        self.model = model
        self.embedding = model.get_input_embeddings()
        self.device: torch.device = self.embedding.weight.device
        self.prompt_PD = prompt_PD.to(self.device, self.embedding.weight.dtype)
        self.text_1T = _random_ids(self.embedding, seqlen, generator)[None]
        self.new_tokens = new_tokens
        self.cache_keyword = cache_keyword(model)
        self.prefixes = {t: prefix_cache(model, self.prompt_PD[: t.prompt_tokens]) for t in turns if t.prefix_reused}

    def run(self, turn: Configuration) -> Sample:
        """One sequence: the text in, `new_tokens` out."""
        started = self._now()
        with fast_arithmetic(self.device, behind_prefix=turn.prefix_reused):
            token_11, cache = self._next(**self._first_inputs(turn))
        first = self._now()
        # that of a reused prefix is one: all take further tokens alike
        cache = fresh_copy(cache, batch_size=1)
        began = self._now()
        with fast_arithmetic(self.device):
            for _ in range(self.new_tokens - 1):
                token_11, cache = self._next(input_ids=token_11, **{self.cache_keyword: cache})
        ended = self._now()
        return Sample((first - started) * 1000, (ended - began) * 1000 / (self.new_tokens - 1))

    def memory_of(self, turn: Configuration, on_run: Callable[[Configuration], None]) -> PeakMemory:
        """The untimed run of a configuration."""
        with watch_peak(self.device) as peak:
            self.run(turn)
        on_run(turn)
        return peak

    def _first_inputs(self, turn: Configuration) -> dict[str, Any]:
        if turn.prefix_reused:
            return {
                "input_ids": self.text_1T,
                self.cache_keyword: fresh_copy(self.prefixes[turn], batch_size=1),
            }
        if not turn.prompt_tokens:
            return {"input_ids": self.text_1T}
        prompt_1PD = self.prompt_PD[None, : turn.prompt_tokens]
        return {"inputs_embeds": torch.cat([prompt_1PD, self.embedding(self.text_1T)], dim=1)}

    def _next(self, **inputs: Any) -> tuple[Tensor, Cache]:
        # as serving engines do, the head runs on the last position only
        output = self.model(**inputs, use_cache=True, logits_to_keep=1)
        return output.logits[:, -1].argmax(-1, keepdim=True), cache_of(output)

    def _now(self) -> float:
        if self.device.type != "cpu":  # work is only queued there
            torch.accelerator.synchronize(self.device)
        return time.perf_counter()


def _row(
    turn: Configuration,
    samples: Sequence[Sample],
    without: Sequence[Sample],
    peak: PeakMemory,
    prefix: Cache | None,
) -> LatencyRow:
    pairs = list(zip(samples, without, strict=True))
    return LatencyRow(
        prompt_tokens=turn.prompt_tokens,
        prefix_reused=turn.prefix_reused,
        first_token_ms=Quartiles.of([s.first_token_ms for s in samples]),
        per_token_ms=Quartiles.of([s.per_token_ms for s in samples]),
        first_token_ratio=PairedRatio.of([s.first_token_ms / w.first_token_ms for s, w in pairs]),
        per_token_ratio=PairedRatio.of([s.per_token_ms / w.per_token_ms for s, w in pairs]),
        peak_memory_bytes=peak.growth_bytes,
        prefix_bytes=cache_bytes(prefix) if prefix is not None else 0,
        samples=tuple(samples),
    )


def _random_ids(embedding: nn.Embedding, count: int, generator: torch.Generator) -> Tensor:
    ids = torch.randint(embedding.weight.shape[0], (count,), generator=generator, device=generator.device)
    return ids.to(embedding.weight.device)


def _check(model: Any, prompt_PD: Tensor, *, longest: int, seqlen: int, new_tokens: int, rounds: int) -> None:
    check_width(model, prompt_PD)
    for name, value, least in (("seqlen", seqlen, 1), ("new_tokens", new_tokens, 2), ("rounds", rounds, 1)):
        if value < least:
            raise ValueError(f"{name}: needs at least {least}, got {value}")
    if longest > len(prompt_PD):
        raise ValueError(f"prompt_lengths: {longest} tokens asked for, prompt_embeddings has {len(prompt_PD)} rows")
    if model.training:
        raise ValueError("the model is in training mode: call model.eval() first")
    positions = learned_positions(model)
    needed = longest + seqlen + new_tokens - 1  # the last new token is never fed back
    if positions is not None and needed > positions:
        raise PositionsError(
            f"the model has {positions} learned positions; a prompt of {longest}, {seqlen} text tokens and "
            f"{new_tokens} new ones need {needed}"
        )


def learned_positions(model: Any) -> int | None:
    """How many positions the model has embeddings for; None if its positions are computed (rotary, ALiBi)."""
    for name, module in model.named_modules():
        leaf = name.rpartition(".")[2]
        if isinstance(module, nn.Embedding) and (leaf == "wpe" or "position" in leaf):
            # OPT keeps two rows more than it has positions, so its configuration is asked first
            limit: int = getattr(model.config, "max_position_embeddings", module.num_embeddings)
            return limit
    return None
