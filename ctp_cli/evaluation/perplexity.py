"""Perplexity of a model, with or without a prompt, on windows of tokens; and whether two of them differ.

N=windows T=tokens per window
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from ctp_kernels.prefix import fresh_copy
from ctp_kernels.profiling import learned_positions
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from ctp_cli.errors import InputError, NotFiniteError
from ctp_cli.models.head import Scorer
from ctp_cli.models.loading import check_ids
from ctp_cli.progress import SILENT, Progress

Convention = Literal["true", "paper"]
_MOST_NATS = 700
"""A token. A perplexity of exp(710) is more than a float holds."""


@dataclass(frozen=True)
class Perplexity:
    """Total negative log-likelihood of each window (natural log, float64) and what is derived from it."""

    window_nll_N: Tensor
    scored_per_window: int
    """T - 1: the first token of a window is context only."""
    prompt_tokens: int

    @property
    def scored_tokens(self) -> int:
        return self.window_nll_N.numel() * self.scored_per_window

    def value(self, convention: Convention = "true") -> float:
        """exp of the mean loss over scored tokens.

        "paper" divides by prompt positions too, as the evaluator released with *Compress, Then Prompt* does; prompted
        figures then come out too low. It exists for comparison with that publication only.
        """
        counted = self.scored_per_window + (self.prompt_tokens if convention == "paper" else 0)
        return math.exp(self.window_nll_N.sum().item() / (self.window_nll_N.numel() * counted))

    @property
    def standard_error(self) -> float:
        """Of the true perplexity, over windows, to first order."""
        means_N = self.window_nll_N / self.scored_per_window
        return self.value() * means_N.std(unbiased=True).item() / math.sqrt(means_N.numel())


@torch.no_grad()
def perplexity(
    model: PreTrainedModel,
    windows_NT: Tensor,
    *,
    prefix: Cache | None = None,
    batch_size: int = 4,
    progress: Progress = SILENT,
) -> Perplexity:
    """Score tokens 2..T of every window given the ones before them and the prompt whose keys and values are `prefix`.

    Prompt positions are never scored and never counted.
    Raises: InputError if prompt and window together exceed the positions of a model that learned them; NotFiniteError.
    """
    prompt_tokens = 0 if prefix is None else prefix.get_seq_length()
    needed, limit = windows_NT.shape[1] + prompt_tokens, learned_positions(model)
    if limit is not None and needed > limit:
        raise InputError(
            f"prompt and window together are {needed} tokens, the model has {limit} positions",
            hint=f"use --seqlen {windows_NT.shape[1] - (needed - limit)} or less",
        )
    check_ids(windows_NT, model)
    scorer = Scorer(model)
    sums: list[Tensor] = []
    progress.start("perplexity", windows_NT.shape[0])
    for ids_BT in windows_NT.to(model.device).split(batch_size):
        past = None if prefix is None else fresh_copy(prefix, batch_size=ids_BT.shape[0])
        nll_BT = scorer.nll(ids_BT, prefix=past, input_ids=ids_BT)
        sums.append(nll_BT.double().sum(dim=1).cpu())
        progress.advance(ids_BT.shape[0])
    progress.finish()
    found = Perplexity(torch.cat(sums), windows_NT.shape[1] - 1, prompt_tokens)
    mean_nll = found.window_nll_N.sum().item() / found.scored_tokens
    if not mean_nll < _MOST_NATS:
        words = f"lose {mean_nll:.3g} nats per token" if math.isfinite(mean_nll) else "hold NaN or infinity"
        raise NotFiniteError(f"the model's outputs {words}", hint="is the checkpoint sound, and its dtype wide enough?")
    return found


@dataclass(frozen=True)
class Difference:
    """Mean loss of `b` minus that of `a` on the same windows, per token, with its standard error."""

    mean: float
    standard_error: float

    @property
    def measurable(self) -> bool:
        """False inside two standard errors."""
        return abs(self.mean) > 2 * self.standard_error


def compare(a: Perplexity, b: Perplexity) -> Difference:
    """Paired over windows, which must be the same for both."""
    assert a.window_nll_N.shape == b.window_nll_N.shape and a.scored_per_window == b.scored_per_window
    differences_N = (b.window_nll_N - a.window_nll_N) / a.scored_per_window
    error = differences_N.std(unbiased=True).item() / math.sqrt(differences_N.numel())
    return Difference(differences_N.mean().item(), error)
