"""Where learning starts: random rows, words, an earlier prompt, or the text's own keys and values."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ctp_cli.data.batches import Batches
from ctp_cli.data.sources import Text
from ctp_cli.data.windows import bos_of, token_ids
from ctp_cli.errors import InputError
from ctp_cli.models.loading import check_ids, decoder_embedding, load_tokenizer
from ctp_cli.models.resolve import ResolvedModel
from ctp_cli.prompts.file import (
    PROMPT_FILE,
    AnyPrompt,
    KvPrefix,
    Prompt,
    check_fits,
    fingerprint_tokenizer,
    load_prompt,
)
from ctp_cli.prompts.prefix import behind_bos, kv_of, prefix_of, rows_prefix
from ctp_cli.prompts.training import random_rows
from ctp_cli.recipe import LearnSection

_TEXT = "text:"
_LARGEST_RATIO = 1e4
"""Of an earlier prompt's largest value to the root mean square of what the model has of its own in that place. To get
there, learning at the usual rate would go the same way for tens of thousands of steps."""


def refuse_strangers(
    models: Sequence[ResolvedModel], tables: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> None:
    """`tables`: the fingerprints of the models' embedding tables."""
    expected = fingerprint_tokenizer(tokenizer), tables[0]
    for model, table in zip(models[1:], tables[1:], strict=True):
        if (fingerprint_tokenizer(load_tokenizer(model.path)), table) != expected:
            raise InputError(
                f"{model.path} is no compression of the model that {models[0].path} comes from",
                hint="one prompt is learned for compressions of one model",
            )


def start(
    section: LearnSection,
    network: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: Batches,
    model: ResolvedModel,
) -> Tensor:
    """What learning starts from: rows, or keys and values, float32.

    Raises InputError for words that are none and for an earlier prompt that does not fit or is far too large.
    """
    soft = section.method == "soft-prompt"
    bos_id = bos_of(tokenizer) if section.bos else None
    earlier = _earlier(section, network, tokenizer, model)
    if earlier is not None:
        return _start_from(earlier, section, network, text, model, bos_id)
    if section.init is not None:
        rows_PD = _embedded(network, _repeated(token_ids(_words(section.init), tokenizer), _rows(section)))
    elif soft:
        return _random_start(section, network, tokenizer)
    else:
        rows_PD = _embedded(network, _beginning(section, text))
    return rows_PD.cpu() if soft else _key_values(rows_PD, network, bos_id)


def _rows(section: LearnSection) -> int:
    """A BOS is one of the tokens of a kv-prefix, and none of a soft prompt's."""
    return section.tokens - (section.bos and section.method == "kv-prefix")


def _beginning(section: LearnSection, text: Batches) -> Tensor:
    ids_T, wanted = text.beginning(_rows(section)), _rows(section)
    if ids_T.numel() < wanted:
        raise InputError(
            f"the text has {ids_T.numel()} tokens, from which a kv-prefix of {section.tokens} cannot start",
            hint=f"use a longer text, fewer --tokens, or --init {_TEXT}WORDS",
        )
    return ids_T


def _key_values(rows_PD: Tensor, network: PreTrainedModel, bos_id: int | None) -> Tensor:
    return kv_of(rows_prefix(behind_bos(rows_PD, network, bos_id), network), network).float().cpu()


def _start_from(
    earlier: AnyPrompt,
    section: LearnSection,
    network: PreTrainedModel,
    text: Batches,
    model: ResolvedModel,
    bos_id: int | None,
) -> Tensor:
    soft = section.method == "soft-prompt"
    if soft and isinstance(earlier, KvPrefix):
        raise InputError(f"{section.init} is a kv-prefix, which has no rows", hint="use --method kv-prefix")
    own_PD = _embedded(network, _beginning(section, text))
    if isinstance(earlier, Prompt):
        _check_size(section, earlier.embeddings[None], own_PD[None].cpu(), "embeddings")
        if soft:
            return earlier.embeddings
    before = bos_id if isinstance(earlier, Prompt) else None
    given_L2HPC = kv_of(prefix_of(earlier, network, name=str(model.path), bos_id=before), network).float().cpu()
    if isinstance(earlier, KvPrefix):
        own_L2HPC = _key_values(own_PD, network, bos_id)
        _check_size(section, given_L2HPC.flatten(0, 1), own_L2HPC.flatten(0, 1), "keys and values")
    return given_L2HPC


def _embedded(network: PreTrainedModel, ids_T: Tensor) -> Tensor:
    check_ids(ids_T, network)
    rows_TD: Tensor = decoder_embedding(network)(ids_T.to(network.device)).detach().float()
    return rows_TD


def _earlier(
    section: LearnSection, network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, model: ResolvedModel
) -> AnyPrompt | None:
    file = earlier_file(section)
    if file is None:
        return None
    prompt = load_prompt(file)
    check_fits(prompt, tokenizer=tokenizer, embedding=decoder_embedding(network).weight, model=str(model.path))
    if (prompt.metadata.layout == "bos-prompt-text") != section.bos:
        raise InputError(
            f"{section.init} was learned {'without' if section.bos else 'behind'} a BOS",
            hint="leave out --bos" if section.bos else "use --bos",
        )
    tokens = prompt.num_virtual_tokens + (section.tokens - _rows(section) if isinstance(prompt, Prompt) else 0)
    if tokens != section.tokens:
        raise InputError(
            f"{section.init} has {tokens} tokens, asked for are {section.tokens}", hint=f"use --tokens {tokens}"
        )
    return prompt


def _check_size(section: LearnSection, given: Tensor, own: Tensor, what: str) -> None:
    """Compares part by part along the first dimension."""
    largest = given.double().flatten(1).abs().amax(1)
    usual = own.double().flatten(1).square().mean(1).sqrt().clamp(min=1e-6)
    ratio = float((largest / usual).max())
    if ratio > _LARGEST_RATIO:
        raise InputError(
            f"{section.init}: its values are up to {ratio:.0e} times as large as the model's own {what}",
            hint="is it a prompt of this model? start from another one, or learn it again with a lower --lr",
        )


def earlier_file(section: LearnSection) -> Path | None:
    if section.init is None or section.init.startswith(_TEXT):
        return None
    path = Path(section.init)
    load_prompt(path)  # a bad prompt is said before anything else is done
    return path / PROMPT_FILE if path.is_dir() else path


def _words(init: str) -> Text:
    return Text("init", init, init.removeprefix(_TEXT))


def _repeated(ids_T: Tensor, count: int) -> Tensor:
    if not ids_T.numel():
        raise InputError("learn.init: text: without words", hint="write text:SOME WORDS")
    return ids_T.repeat(-(-count // ids_T.numel()))[:count]


def _random_start(section: LearnSection, network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    special = set(tokenizer.all_special_ids)
    known = min(len(tokenizer), decoder_embedding(network).num_embeddings)
    usable = torch.tensor([i for i in range(known) if i not in special])
    generator = torch.Generator().manual_seed(section.seed)
    return random_rows(decoder_embedding(network), section.tokens, usable, generator).cpu()
