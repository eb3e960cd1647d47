"""Vocabulary stitching: the prompt becomes new tokens of an ordinary checkpoint, which any engine serves.

Only embedding table, output head and tokenizer are written; a file whose tensors do not change is linked. Of a
checkpoint that keeps hidden states (`checkpoints/hidden_states.py`) no decoder block's weight is read either.
"""

# R=rows of the embedding table  E=embedding width  D=width of the head's input

import copy
import json
import shutil
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.func import functional_call
from transformers import (
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.core_model_loading import revert_weight_conversion

from ctp_cli.checkpoints.formats import FORMATS
from ctp_cli.checkpoints.hidden_states import FILE as HIDDEN_STATES
from ctp_cli.checkpoints.parts import reading
from ctp_cli.errors import InputError, UnsupportedModelError
from ctp_cli.files import read_json, whole_file, write_json
from ctp_cli.models.loading import decoder_embedding, dense_skeleton, weight_files, weight_index
from ctp_cli.progress import SILENT, Progress
from ctp_cli.prompts import shards
from ctp_cli.prompts.file import Prompt
from ctp_cli.prompts.prefix import bos_before
from ctp_cli.prompts.rejection import RejectionRow, output_head, row_from_hidden_states, row_from_text
from ctp_cli.prompts.vocab import StitchedTokenizer, check_saved_tokenizer, extend_tokenizer, save_tokenizer

_COPIED = ("quantize_config.json", "LICENSE*", "NOTICE*")
ORIGINAL = "original"
"""Folder inside a stitched checkpoint with the base's files as they were, weights apart."""
_TEMPLATES = "additional_chat_templates"
_ORIGINALS = ("*.json", "*.jinja", "*.model", "*.txt")
_ORIGINAL_TABLES = "tables.safetensors"
"""In that folder: what the new tables, in another dtype, do not give back to the bit."""
_WORTH_A_NOTE = 2**20
"""Bytes copied; final norms and the like are less."""


@dataclass(frozen=True)
class StitchedCheckpoint:
    """What stitching did. Bytes are those of weight files, the copied among the written; masses are shares of the
    probability, see rejection.py.
    """

    token_ids: tuple[int, ...]
    vocabulary_rows: int
    mass_mean: float
    mass_max: float
    linked_bytes: int
    written_bytes: int
    copied_bytes: int
    text_positions: int | None
    """Positions that the prompt [and BOS] leaves for text, None if the model sets no limit."""
    notes: tuple[str, ...]
    base_rows: dict[str, int | None]
    """Rows that each changed tensor had in the base, None for one that was not there."""
    base_dtypes: dict[str, str]
    """Of those that were there."""


@dataclass(frozen=True)
class TableNames:
    """Names of the tensors that grow with the vocabulary, as transformers names them."""

    embedding: str
    head: str
    head_bias: str | None


@dataclass(frozen=True)
class WrittenFiles:
    """Bytes of weight files. Copied is what did not change and could not be linked; it is part of written."""

    linked: int
    written: int
    copied: dict[str, tuple[int, str]]
    """File of the base -> bytes, and why they were not linked."""


def stitch_vocabulary(
    prompt: Prompt,
    *,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    base: Path,
    folder: Path,
    sample_ids: torch.Tensor,
    hidden_states: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
    vocab_multiple: int | None = None,
    progress: Progress = SILENT,
) -> StitchedCheckpoint:
    """Write into the empty `folder` the checkpoint `base` with the prompt as part of its vocabulary.

    `model` and `tokenizer` are what `base` loads as. The head's new rows are measured on `hidden_states` (N, hidden
    width), outputs of the last decoder block: then the model's blocks need no weights; without them, by running the
    model on `sample_ids` (T,), a few hundred tokens. `dtype` None keeps the tables'; `vocab_multiple` counts rows.
    Raises InputError for a checkpoint that cannot carry a prompt: then `folder` holds nothing worth keeping.
    """
    names, saved = table_names(model.config)
    stored = _stored_names(names, saved, base)
    extended = extend_tokenizer(tokenizer, prompt.num_virtual_tokens, layout=prompt.metadata.layout)
    old = _stored_tables(stored, base)
    base_rows = len(old[stored.embedding])
    rows = _row_count(base_rows, extended.token_ids, vocab_multiple)
    rejected = tuple(sorted({*extended.token_ids, *range(base_rows, rows)}))
    config = _stitched_config(base, rows, dtype)
    _check_only_tables_grow(model.config, rows, names)
    written_dtype = dtype or old.get(stored.head, old[stored.embedding]).dtype
    progress.say("measuring the head rows of the prompt's tokens")
    if hidden_states is not None:
        row = row_from_hidden_states(model, hidden_states, tokens=len(rejected), dtype=written_dtype)
    else:
        bos_id = bos_before(prompt, tokenizer)
        row = row_from_text(model, prompt, sample_ids, bos_id=bos_id, tokens=len(rejected), dtype=written_dtype)
    tensors = _grown_tables(prompt, model, old, extended.token_ids, rows, rejected, row, stored, dtype)

    write_json(folder / "config.json", config)
    _write_generation_config(base, model, rejected, folder)
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    save_tokenizer(extended, folder, model_max_length=positions)
    check_saved_tokenizer(extended, tokenizer, folder)
    progress.say("writing embedding table and head")
    files = write_tables(base, folder, tensors)
    kept_bytes = _keep_originals(base, folder / ORIGINAL, old, tensors)
    for pattern in _COPIED:
        for path in base.glob(pattern):
            shards.link_or_copy(path, folder / path.name)
    return StitchedCheckpoint(
        token_ids=extended.token_ids,
        vocabulary_rows=rows,
        mass_mean=row.mass_mean,
        mass_max=row.mass_max,
        linked_bytes=files.linked,
        written_bytes=files.written + kept_bytes,
        copied_bytes=sum(size for size, _ in files.copied.values()),
        text_positions=None if positions is None else positions - len(extended.head_ids),
        notes=(*extended.notes, *_notes(model, tensors[stored.head], extended, files, kept_bytes)),
        base_rows={name: len(old[name]) if name in old else None for name in tensors},
        base_dtypes={name: str(tensor.dtype).removeprefix("torch.") for name, tensor in old.items()},
    )


def unstitch_vocabulary(
    stitched: Path, folder: Path, base_rows: dict[str, int | None], base_dtypes: dict[str, torch.dtype]
) -> WrittenFiles:
    """Write into the empty `folder` the checkpoint that `stitched` was made from.

    `base_rows` and `base_dtypes` are what `stitch_vocabulary` said. Raises InputError where the checkpoint is not as
    that left it.
    """
    files = weight_files(stitched)
    tensors = {}
    for name, rows in base_rows.items():
        if name not in files or not (rows is None or rows > 0):
            raise InputError(f"{stitched}: holds no tensor {name} to cut back", hint="is the checkpoint complete?")
        if rows is not None:
            with reading(files[name]) as handle:
                part = handle.get_slice(name)
                if part.get_shape()[0] < rows:
                    raise InputError(f"{stitched}: {name} has fewer rows than its base had", hint="stitch again")
                cut = part[:rows]
                tensors[name] = cut.to(base_dtypes.get(name, cut.dtype))
    if (stitched / ORIGINAL / _ORIGINAL_TABLES).is_file():
        shards.read_header(stitched / ORIGINAL / _ORIGINAL_TABLES)  # says what is wrong with a damaged file
        tensors |= load_file(stitched / ORIGINAL / _ORIGINAL_TABLES)
    for path in (stitched / ORIGINAL).iterdir():
        if path.is_dir():
            shutil.copytree(path, folder / path.name)
        elif path.name not in ("ctp.json", _ORIGINAL_TABLES):  # the new checkpoint gets a manifest of its own
            shutil.copyfile(path, folder / path.name)
    for pattern in _COPIED:
        for path in stitched.glob(pattern):
            if not (folder / path.name).exists():
                shards.link_or_copy(path, folder / path.name)
    return write_tables(stitched, folder, tensors, dropped=base_rows.keys())


def _keep_originals(base: Path, folder: Path, old: dict[str, torch.Tensor], new: dict[str, torch.Tensor]) -> int:
    """What unstitching needs beside the new tables. Returns the bytes of tables among it."""
    folder.mkdir()
    for path in {path for pattern in _ORIGINALS for path in base.glob(pattern)}:
        if not path.name.endswith(".index.json"):
            shutil.copyfile(path, folder / path.name)  # no link: whoever edits the base's would edit these
    if (base / _TEMPLATES).is_dir():
        shutil.copytree(base / _TEMPLATES, folder / _TEMPLATES)
    if (base / HIDDEN_STATES).is_file():
        (folder / HIDDEN_STATES).parent.mkdir()
        shutil.copyfile(base / HIDDEN_STATES, folder / HIDDEN_STATES)
    lost = {name: t for name, t in old.items() if not torch.equal(new[name][: len(t)].to(t.dtype), t)}
    if not lost:
        return 0
    with whole_file(folder / _ORIGINAL_TABLES) as beside:
        save_file(lost, beside, metadata={"format": "pt"})
    return (folder / _ORIGINAL_TABLES).stat().st_size


def _stored_tables(names: TableNames, base: Path) -> dict[str, torch.Tensor]:
    """Embedding table, head and its bias as the files have them, those that are there; the model may have been loaded
    in another dtype.
    """
    files = weight_files(base)
    tables = {}
    for name in (names.embedding, names.head, names.head_bias):
        if name is not None and name in files:
            with safe_open(files[name], "pt") as handle:
                tables[name] = handle.get_tensor(name)
    return tables


def table_names(config: PretrainedConfig) -> tuple[TableNames, TableNames]:
    """Find embedding table and head in a model without weights; no family is named anywhere.

    Returns the names in the model and those in a checkpoint of it, which differ where transformers renamed a
    module later (GPT-NeoX: lm_head is stored as embed_out). Raises UnsupportedModelError for an
    encoder-decoder, or a model without a plain table and head.
    """
    if config.is_encoder_decoder:
        raise UnsupportedModelError(f"{config.model_type} is an encoder-decoder: prompts are for decoders")
    skeleton, _ = dense_skeleton(config)  # packed layers are not what is looked at here
    named = {id(module): name for name, module in skeleton.named_modules()}
    embedding, head = skeleton.get_input_embeddings(), skeleton.get_output_embeddings()
    if not isinstance(embedding, nn.Embedding) or not isinstance(head, nn.Linear):
        raise UnsupportedModelError(
            f"{config.model_type}: embedding or head is not a plain table", hint="use --format peft"
        )
    head_name = named[id(head)]
    names = [f"{named[id(embedding)]}.weight", f"{head_name}.weight"]
    if head.bias is not None:
        names.append(f"{head_name}.bias")
    saved = [next(iter(revert_weight_conversion(skeleton, {name: torch.empty(0)}))) for name in names]
    return _names(names), _names(saved)


def _names(names: list[str]) -> TableNames:
    return TableNames(names[0], names[1], names[2] if len(names) > 2 else None)


def _check_only_tables_grow(config: PretrainedConfig, rows: int, names: TableNames) -> None:
    """Some architectures keep further tables per token: those would be left too short."""
    grown = copy.deepcopy(config)
    text_config = grown.get_text_config()
    text_config.vocab_size = rows
    before, after = (dense_skeleton(one)[0].state_dict() for one in (config, grown))
    changed = {name for name in after if name not in before or before[name].shape != after[name].shape}
    others = sorted(changed - {names.embedding, names.head, names.head_bias})
    if others:
        raise UnsupportedModelError(
            f"{config.model_type}: {', '.join(others[:3])} also depend on the vocabulary size",
            hint="use --format peft",
        )


def _stored_names(names: TableNames, saved: TableNames, base: Path) -> TableNames:
    """The names as this checkpoint spells them: `saved`, or those of the model's modules, or without the prefix of the
    decoder, as older files have them. A tied head, which is not stored, is called as `saved` has it.
    """
    files = weight_files(base)

    def spelling(module_name: str, saved_name: str) -> str | None:
        exact = [name for name in (saved_name, module_name) if name in files]
        shorter = [name for name in files if saved_name.endswith(f".{name}")]
        return exact[0] if exact else shorter[0] if len(shorter) == 1 else None

    heads = {name.removesuffix(".weight") for name in (names.head, saved.head)}
    if any(f"{head}.{form.parts[0]}" in files for head in heads for form in FORMATS.values()):
        raise UnsupportedModelError(f"{base}: its output head is quantized", hint="use --format peft")
    embedding = spelling(names.embedding, saved.embedding)
    if embedding is None:
        raise InputError(f"{base}: holds no tensor {saved.embedding}", hint="is the checkpoint complete?")
    bias = None
    if names.head_bias is not None and saved.head_bias is not None:
        bias = spelling(names.head_bias, saved.head_bias) or saved.head_bias
    return TableNames(embedding, spelling(names.head, saved.head) or saved.head, bias)


def _row_count(base_rows: int, token_ids: Iterable[int], multiple: int | None) -> int:
    """Rows after stitching; a multiple of 64, which some engines want, where the base's count is one."""
    rows = max(base_rows, max(token_ids) + 1)
    multiple = multiple or (1 if base_rows % 64 else 64)
    return -(-rows // multiple) * multiple


@torch.no_grad()
def _grown_tables(
    prompt: Prompt,
    model: PreTrainedModel,
    old: dict[str, torch.Tensor],
    token_ids: tuple[int, ...],
    rows: int,
    rejected: tuple[int, ...],
    row: RejectionRow,
    names: TableNames,
    dtype: torch.dtype | None,
) -> dict[str, torch.Tensor]:
    """Embedding table (R, E), head (R, D) and bias (R,) by name, on the CPU, in `dtype` or that of the old ones.

    `rejected` tokens, the prompt's and rows of padding behind them, which no token owns, get the rejection row.
    """
    table_VE = old[names.embedding]
    head_VD = old.get(names.head, table_VE)
    grown = {names.embedding: table_VE.new_zeros(rows, table_VE.shape[1], dtype=dtype)}
    grown[names.embedding][: len(table_VE)] = table_VE
    rows_PE = prompt.embeddings / embedding_scale(decoder_embedding(model))
    grown[names.embedding][list(token_ids)] = rows_PE.to(grown[names.embedding].dtype)
    grown[names.head] = head_VD.new_empty(rows, head_VD.shape[1], dtype=dtype)
    grown[names.head][: len(head_VD)] = head_VD
    grown[names.head][list(rejected)] = row.weight.to(grown[names.head])
    if names.head_bias is not None and row.bias is not None:
        bias_V = old[names.head_bias]
        grown[names.head_bias] = bias_V.new_empty(rows, dtype=dtype)
        grown[names.head_bias][: len(bias_V)] = bias_V
        grown[names.head_bias][list(rejected)] = row.bias
    for name, tensor in grown.items():
        if not torch.isfinite(tensor).all():
            raise InputError(f"{name}: not all of its numbers fit into {tensor.dtype}", hint="use --dtype bfloat16")
    return grown


@torch.no_grad()
def embedding_scale(embedding: nn.Embedding) -> float:
    """What the module multiplies its rows with: 1, or in Gemma sqrt(width). Asked of the module itself.

    Raises UnsupportedModelError if it does something else to them.
    """
    weight = embedding.weight
    pattern_E = torch.linspace(-1, 1, weight.shape[1], device=weight.device, dtype=weight.dtype)
    ids = torch.zeros(1, dtype=torch.long, device=weight.device)

    def output(row_E: torch.Tensor) -> torch.Tensor:
        # an expanded row stands for a whole table of it and takes no memory
        return functional_call(embedding, {"weight": row_E.expand(weight.shape)}, (ids,))[0]

    scale = output(torch.ones_like(pattern_E))[0].item()
    expected_E = pattern_E * torch.tensor(scale, dtype=weight.dtype, device=weight.device)
    if not scale or not torch.allclose(output(pattern_E).float(), expected_E.float(), rtol=2e-2, atol=1e-3):
        raise UnsupportedModelError(
            f"{type(embedding).__name__} does more than scale its rows", hint="use --format peft"
        )
    return scale


def _stitched_config(base: Path, rows: int, dtype: torch.dtype | None) -> dict[str, Any]:
    """The base's own config.json with the new vocabulary size, untied, and the dtype if there is a new one."""
    config = read_json(base / "config.json")
    sections = [config]
    if isinstance(config.get("text_config"), dict):
        sections.append(config["text_config"])
    for section in sections:
        if "vocab_size" in section or section is sections[-1]:
            section["vocab_size"] = rows
        section["tie_word_embeddings"] = False
        if dtype is not None:  # both names, for readers old and new, which load everything in this one dtype
            section |= dict.fromkeys(("dtype", "torch_dtype"), str(dtype).removeprefix("torch."))
    if "tokenizer_class" in config:
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    return config


def _write_generation_config(base: Path, model: PreTrainedModel, token_ids: Iterable[int], folder: Path) -> None:
    file = base / "generation_config.json"
    if file.is_file():
        content = read_json(file)
    else:  # from now on there is a file, so it has to say what was read from config.json without one
        content = json.loads(GenerationConfig.from_model_config(model.config).to_json_string(use_diff=True))
        content.pop("_from_model_config", None)
    content["suppress_tokens"] = sorted({*(content.get("suppress_tokens") or []), *token_ids})
    write_json(folder / "generation_config.json", content)


def write_tables(
    base: Path, folder: Path, tensors: dict[str, torch.Tensor], dropped: Collection[str] = ()
) -> WrittenFiles:
    """Link every file without changed or dropped tensors, copy the rest of the others, write the new ones.

    An index over old files would not do: transformers reads every tensor of every file it names.
    """
    weight_map: dict[str, str] = {}
    copied: dict[str, tuple[int, str]] = {}
    linked = total = 0
    index = weight_index(base)
    index_name = "model.safetensors.index.json" if index is None else index.name
    for source in sorted(set(weight_files(base).values())):
        held = set(shards.read_header(source).tensors)
        kept = held - tensors.keys() - set(dropped)
        if not kept:
            continue
        # a file called model.safetensors would be read instead of the index
        name = "model-rest.safetensors" if source.name == "model.safetensors" else source.name
        if kept == held and shards.link_or_copy(source, folder / name):
            linked += source.stat().st_size
        elif kept == held:
            copied[source.name] = source.stat().st_size, "it cannot be linked to from the output's file system"
        else:
            size = shards.copy_without(source, folder / name, held - kept)
            copied[source.name] = size, "the embedding table or the head is in the same file"
        weight_map |= dict.fromkeys(kept, name)
        total += shards.read_header(folder / name).tensor_bytes
    vocabulary = folder / f"{index_name.partition('.')[0]}-vocabulary.safetensors"
    with whole_file(vocabulary) as beside:
        save_file(tensors, beside, metadata={"format": "pt"})
    weight_map |= dict.fromkeys(tensors, vocabulary.name)
    total += shards.read_header(vocabulary).tensor_bytes
    write_json(folder / index_name, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})
    return WrittenFiles(linked, sum(size for size, _ in copied.values()) + vocabulary.stat().st_size, copied)


def _notes(
    model: PreTrainedModel,
    head: torch.Tensor,
    extended: StitchedTokenizer,
    files: WrittenFiles,
    kept_bytes: int,
) -> list[str]:
    notes = []
    if output_head(model).weight is decoder_embedding(model).weight:
        megabytes = head.numel() * head.element_size() / 1e6
        notes.append(f"a tied model gains a dense head ({megabytes:,.0f} MB); --format peft avoids it")
    if not extended.tokenizer.chat_template:
        notes.append("the tokenizer has no chat template: engines get the prompt from the post-processor alone")
    if kept_bytes:
        notes.append(
            "the new tables do not hold the old ones to the bit, for their dtype or for rows that the prompt took: "
            f"kept for `ctp unstitch` ({kept_bytes / 1e6:,.0f} MB)"
        )
    return notes + [
        f"{name}: {size / 1e6:,.0f} MB of unchanged weights copied, for {why}"
        for name, (size, why) in files.copied.items()
        if size >= _WORTH_A_NOTE
    ]
