"""A prompt, of either kind, as keys and values that stand before a text."""

import torch
from ctp_kernels.prefix import cache_with, key_values_of, prefix_cache
from ctp_kernels.profiling import learned_positions
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache

from ctp_cli.errors import InputError, UnsupportedModelError
from ctp_cli.models.loading import decoder_embedding
from ctp_cli.prompts.file import AnyPrompt, KvPrefix, Prompt


def bos_before(prompt: AnyPrompt, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The id that stands before this prompt. Raises InputError where the tokenizer has none, or another one."""
    if prompt.metadata.layout == "prompt-text" or isinstance(prompt, KvPrefix):
        return None
    learned, own = prompt.metadata.bos_token_id, tokenizer.bos_token_id
    if own is None:
        raise InputError("the prompt stands after a BOS token, which this tokenizer does not have")
    if learned not in (None, own):
        raise InputError(
            f"the prompt was learned behind token {learned} as BOS, here that is {own}",
            hint="use the tokenizer that it was learned with",
        )
    return int(own)


def behind_bos(rows_PD: Tensor, model: PreTrainedModel, bos_id: int | None) -> Tensor:
    """The rows, behind the BOS token's if there is one, (P [+ 1], D), as the model's embeddings are stored."""
    embed = decoder_embedding(model)
    rows_PD = rows_PD.to(embed.weight.device, embed.weight.dtype)
    if bos_id is None:
        return rows_PD
    return torch.cat([embed(torch.tensor([bos_id], device=rows_PD.device)).to(rows_PD.dtype), rows_PD])


@torch.no_grad()
def bos_prefix(model: PreTrainedModel, bos_id: int) -> Cache:
    """Keys and values of that token alone."""
    embed = decoder_embedding(model)
    return rows_prefix(behind_bos(embed.weight[:0], model, bos_id), model)


def prefix_of(prompt: AnyPrompt, model: PreTrainedModel, *, name: str, bos_id: int | None) -> Cache:
    """The cache of batch size 1 that `prompt` is for this model, `bos_id` before it. Errors call the model `name`.

    Raises: InputError where the prompt has another geometry than the model, or more rows than it has positions.
    """
    if isinstance(prompt, Prompt):
        return rows_prefix(behind_bos(prompt.embeddings, model, bos_id), model)
    template = kv_template(prompt.num_virtual_tokens, model)
    table = decoder_embedding(model).weight
    try:
        return cache_with(template, prompt.key_values.to(table.device, table.dtype), 1)
    except ValueError:
        ours, theirs = ("x".join(map(str, t.shape)) for t in (prompt.key_values, key_values_of(template)))
        raise InputError(
            f"the prefix is {ours} (layers x 2 x heads x tokens x head width), that of {name} would be {theirs}",
            hint="a prefix fits compressions of the model it was learned on, not other models",
        ) from None


def rows_prefix(rows_PD: Tensor, model: PreTrainedModel) -> Cache:
    """Keys and values of embeddings (P, D). Raises InputError where the model has no room for them."""
    limit = learned_positions(model)
    if limit is not None and rows_PD.shape[0] >= limit:
        raise InputError(f"the prompt has {rows_PD.shape[0]} rows, the model {limit} positions", hint="use fewer rows")
    return prefix_cache(model, rows_PD)


def kv_template(tokens: int, model: PreTrainedModel) -> Cache:
    """Some prefix of so many tokens: one whose keys and values are there to be replaced (`cache_with`).

    Raises: UnsupportedModelError for models whose layers do not all keep alike keys and values of every token.
    """
    cache = rows_prefix(decoder_embedding(model).weight[:1].expand(tokens, -1), model)
    kv_of(cache, model)
    return cache


def kv_of(cache: Cache, model: PreTrainedModel) -> Tensor:
    """`key_values_of`, for a prefix on this model. Raises UnsupportedModelError as `kv_template`."""
    try:
        return key_values_of(cache)
    except ValueError as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot carry a kv-prefix of {cache.get_seq_length()} tokens: {error}",
            hint="use a soft-prompt, with fewer tokens than a sliding window has",
        ) from None
