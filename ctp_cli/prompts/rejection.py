"""Output-head rows that keep the prompt's tokens out of every prediction, and the probability they still get.

A zero row is no way out: its logit 0 is not "impossible". The row must point away from the final hidden states.
"""

# D=width of the head's input  H=hidden width  N=hidden states  T=tokens

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from ctp_kernels.arithmetic import where_slow
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from ctp_cli.errors import InputError
from ctp_cli.models.blocks import find_blocks
from ctp_cli.models.loading import decoder_embedding
from ctp_cli.prompts.file import Prompt
from ctp_cli.prompts.prefix import behind_bos

TARGET_MASS = 1e-6
"""Good enough to stop looking for a better row."""
MAX_MASS = 1e-4
"""More than this is an error."""
_WINDOW_TOKENS = 128
_LOWEST_BIAS = -1e4  # far below any logit, and finite in float16
# (ridge, logit at the mean); the mean's own direction comes first, for it asks the least of a small sample
_ATTEMPTS = ((None, -30.0), (None, -60.0), (1.0, -30.0), (0.1, -30.0), (0.1, -60.0), (0.01, -60.0))

Candidate = tuple[torch.Tensor, float | None]


@dataclass(frozen=True, eq=False)
class RejectionRow:
    """A head row (D,), its bias if the head has one, and the probability left on the rejected tokens together: the
    mean and the maximum over the positions of the sample text."""

    weight: torch.Tensor
    bias: float | None
    mass_mean: float
    mass_max: float


def output_head(model: PreTrainedModel) -> nn.Linear:
    """The module that turns final hidden states into logits."""
    head = model.get_output_embeddings()
    assert isinstance(head, nn.Linear), type(head)
    return head


@torch.no_grad()
def prompted_embeddings(
    model: PreTrainedModel, prompt: Prompt, ids_T: torch.Tensor, *, bos_id: int | None
) -> torch.Tensor:
    """What the model sees for [BOS,] prompt, text: (1, [1 +] num_virtual_tokens + T, width), in its dtype."""
    rows = behind_bos(prompt.embeddings, model, bos_id)
    return torch.cat([rows, decoder_embedding(model)(ids_T.to(rows.device))])[None]


def row_from_text(
    model: PreTrainedModel,
    prompt: Prompt,
    sample_ids_T: torch.Tensor,
    *,
    bos_id: int | None,
    tokens: int,
    dtype: torch.dtype,
) -> RejectionRow:
    """The head row for `tokens` tokens that are never to be predicted, chosen and measured on the model with the prompt
    before the sample text. Its values are those of `dtype`.

    The row is fitted to half of the text and measured on all of it. Raises InputError if the probability
    left on the tokens is above MAX_MASS anywhere.
    """
    start = (
        prompt.num_virtual_tokens + (bos_id is not None) - 1
    )  # the prompt's last position predicts the text's first token
    known_T = sample_ids_T[sample_ids_T < len(decoder_embedding(model).weight)]  # some tokenizers know more
    windows = list(_windows(model, known_T, start + 1))
    inputs = [prompted_embeddings(model, prompt, window, bos_id=bos_id) for window in windows]
    return _find_row(model, inputs, start, tokens=tokens, dtype=dtype)


def row_from_hidden_states(
    model: PreTrainedModel, hidden_NH: torch.Tensor, *, tokens: int, dtype: torch.dtype
) -> RejectionRow:
    """As `row_from_text`, from outputs of the last decoder block; the blocks need no weights.

    Raises InputError also for hidden states of another width than the model's.
    """
    width = model.config.get_text_config().hidden_size
    if hidden_NH.shape[1] != width:
        raise InputError(
            f"the checkpoint's kept hidden states are {hidden_NH.shape[1]} wide, the model's are {width}",
            hint="remove its folder calibration: the model is run instead, which takes longer",
        )
    embed = decoder_embedding(model).weight
    with _last_block_gives(model, hidden_NH.to(embed.device, embed.dtype)):
        return _find_row(model, [embed.new_zeros(1, 1, embed.shape[1])], 0, tokens=tokens, dtype=dtype)


@contextlib.contextmanager
def _last_block_gives(model: PreTrainedModel, hidden_NH: torch.Tensor) -> Iterator[None]:
    """Every block does nothing but return these, whatever it is given."""
    modules = [block.module for block in find_blocks(model)]
    originals = [module.forward for module in modules]
    # some families take a block's output, others the first element of it: of this, both are the hidden states
    output_11NH = hidden_NH[None, None]
    try:
        for module in modules:
            module.forward = lambda *_, **__: output_11NH
        yield
    finally:
        for module, original in zip(modules, originals, strict=True):
            module.forward = original


@torch.no_grad()
def _find_row(
    model: PreTrainedModel, inputs: Sequence[torch.Tensor], start: int, *, tokens: int, dtype: torch.dtype
) -> RejectionRow:
    head = output_head(model)
    if head.bias is not None:
        candidates: Iterator[Candidate] = iter([(torch.zeros_like(head.weight[0], dtype=dtype), _LOWEST_BIAS)])
    else:
        hidden = [_final_hidden(model, x)[start:] for x in inputs]
        fitted_ND = torch.cat(hidden[::2]) if len(hidden) > 1 else hidden[0][::2]
        candidates = ((row.to(dtype), None) for row in _candidate_rows(fitted_ND.double()))
    best: RejectionRow | None = None
    for weight, bias in candidates:
        mass_N = torch.cat([_mass(model, x, weight.to(head.weight.dtype), bias, tokens)[start:] for x in inputs])
        found = RejectionRow(weight, bias, float(mass_N.mean()), float(mass_N.max()))
        if best is None or found.mass_max < best.mass_max:
            best = found
        if best.mass_max <= TARGET_MASS:
            break
    assert best is not None
    if not best.mass_max <= MAX_MASS:  # NaN must not pass
        raise InputError(
            f"the prompt's tokens would keep up to {best.mass_max:.1e} of the probability, at most "
            f"{MAX_MASS:.0e} is allowed: no head row points away from all hidden states of this model",
            hint="use --format peft, which needs no tokens",
        )
    return best


def _windows(model: PreTrainedModel, ids_T: torch.Tensor, before: int) -> Iterator[torch.Tensor]:
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 10**9
    room = min(_WINDOW_TOKENS, limit - before, max(1, ids_T.numel() // 2))
    if room < 1:
        raise InputError(f"the prompt takes {before} of the model's {limit} positions: no room is left for text")
    return (window for window in ids_T.split(room))


def _candidate_rows(hidden_ND: torch.Tensor) -> Iterator[torch.Tensor]:
    """Rows whose logit at the mean hidden state mu is the given one; ridge None is the direction of mu
    itself.

    With a ridge the direction is (C + ridge * mean(diag C) I)^-1 mu, C the covariance: of all rows with that
    logit at the mean, the one whose logits vary least.
    """
    mu_D = hidden_ND.mean(0)
    centered_ND = hidden_ND - mu_D
    C_DD = centered_ND.T @ centered_ND / len(hidden_ND)
    for ridge, logit in _ATTEMPTS:
        if ridge is None:
            direction_D = mu_D
        else:
            shift = ridge * C_DD.diagonal().mean()
            direction_D = torch.linalg.solve(
                C_DD + shift * torch.eye(len(C_DD), dtype=C_DD.dtype, device=C_DD.device), mu_D
            )
        yield logit * direction_D / (direction_D @ mu_D)


def _final_hidden(model: PreTrainedModel, inputs_embeds: torch.Tensor) -> torch.Tensor:
    """(positions, D): what the head reads, after the final norm and any projection."""
    seen: list[torch.Tensor] = []

    def keep(_: nn.Module, args: tuple[Any, ...]) -> None:
        seen.append(args[0])

    handle = output_head(model).register_forward_pre_hook(keep)
    try:
        with where_slow(inputs_embeds):
            model(inputs_embeds=inputs_embeds, use_cache=False)
    finally:
        handle.remove()
    return seen[0].flatten(0, -2)


def _mass(
    model: PreTrainedModel, inputs_embeds: torch.Tensor, weight: torch.Tensor, bias: float | None, tokens: int
) -> torch.Tensor:
    """(positions,) float64: the probability of `tokens` tokens with this head row, next to all others.

    The row goes through the model as one more output of the head, so that soft caps and scales apply to it
    too.
    """

    def append(_: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        extra = F.linear(args[0], weight[None], None if bias is None else weight.new_tensor([bias]))
        return torch.cat([output, extra], dim=-1)

    handle = output_head(model).register_forward_hook(append)
    try:
        with where_slow(inputs_embeds):
            logits = model(inputs_embeds=inputs_embeds, use_cache=False).logits.flatten(0, -2).double()
    finally:
        handle.remove()
    own = logits[:, -1] + torch.log(torch.tensor(float(tokens), dtype=torch.float64))
    return torch.exp(own - torch.logaddexp(torch.logsumexp(logits[:, :-1], dim=-1), own))
