"""Stitch a prompt and a checkpoint into one thing: an ordinary checkpoint, or what goes with the checkpoint: a PEFT
adapter, or a filled cache.
"""

import pydoc_data.topics
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ctp_cli.artifact import (
    MANIFEST,
    Workspace,
    all_or_nothing,
    file_fingerprint,
    manifest_of,
    refuse_existing,
    workspace,
)
from ctp_cli.checkpoints.hidden_states import load_hidden_states
from ctp_cli.errors import InputError
from ctp_cli.models.loading import decoder_embedding, load_model, load_tokenizer
from ctp_cli.models.streaming import load_without_blocks
from ctp_cli.progress import SILENT, Progress
from ctp_cli.prompts.file import (
    PROMPT_FILE,
    AnyPrompt,
    KvPrefix,
    Layout,
    Prompt,
    check_fits,
    fingerprint_embedding,
    fingerprint_tokenizer,
    load_prompt,
    save_prompt,
)
from ctp_cli.prompts.peft_export import BOS_INSIDE, export_peft, export_peft_prefix
from ctp_cli.prompts.prefix import bos_before, kv_of, prefix_of
from ctp_cli.prompts.stitching import stitch_vocabulary
from ctp_cli.prompts.vocab import check_tokenizer
from ctp_cli.recipe import StitchSection

KINDS = {"vocab": "stitched-checkpoint", "peft": "peft-adapter", "kv": "kv-prefix"}
_SAMPLE_TOKENS = 512
_SAMPLE_TOPIC = "typesseq"


@dataclass(frozen=True)
class StitchReport:
    """What was made. The masses are the probability left on the prompt's tokens over a sample of text, None
    for an adapter, which has no tokens. Bytes are those of weight files: linked ones take no new space, copied ones,
    which could not be linked, are part of the written."""

    path: Path
    format: str
    mass_mean: float | None
    mass_max: float | None
    linked_bytes: int
    written_bytes: int
    copied_bytes: int
    notes: tuple[str, ...]
    layout: Layout = "prompt-text"


def stitch(
    section: StitchSection,
    *,
    prompt_path: Path,
    model_path: Path,
    output: Path,
    force: bool = False,
    progress: Progress = SILENT,
) -> StitchReport:
    """Raises InputError for a prompt or checkpoint that does not fit; then nothing is kept."""
    refuse_existing(output, model_path, prompt_path, force=force)
    prompt = load_prompt(prompt_path)
    if section.format == "vocab" and not isinstance(prompt, Prompt):
        raise InputError(
            f"{prompt_path}: a kv-prefix is no input of the model, so no token can stand for it",
            hint="use --format kv or peft, or learn with --method soft-prompt",
        )
    progress.say(f"loading {model_path}")
    tokenizer = load_tokenizer(model_path)
    if section.format == "vocab":
        check_tokenizer(tokenizer, layout=prompt.metadata.layout)  # before the weights are read
    hidden_ND = load_hidden_states(model_path)
    runs = section.format == "kv" or not isinstance(prompt, Prompt) or hidden_ND is None
    base = manifest_of(model_path) or {}
    model = load_model(model_path) if runs else load_without_blocks(model_path)
    table = decoder_embedding(model).weight
    unverified = check_fits(prompt, tokenizer=tokenizer, embedding=table, model=str(model_path))
    inputs = _inputs(prompt_path, prompt, model_path, model, tokenizer)
    identity = {"stitch": section.model_dump(), **inputs}
    if section.format == "vocab" and hidden_ND is None:
        unverified += (f"{model_path.name} keeps no hidden states of its calibration: the model was run to measure on",)
    with (
        workspace(output, kind=KINDS[section.format], identity=identity, force=force) as space,
        all_or_nothing(space),
    ):
        if section.format == "kv":
            report, details = _kv(space, section, prompt, model, tokenizer, model_path, unverified)
        elif section.format == "peft":
            report, details = _peft(space, section, prompt, model, tokenizer, model_path, unverified)
        else:
            assert isinstance(prompt, Prompt)
            report, details = _vocab(
                space, section, prompt, model, hidden_ND, tokenizer, model_path, unverified, progress
            )
        space.finish(
            {
                "recipe": {"stitch": section.model_dump()},
                "inputs": inputs,
                "format": section.format,
                "base_model": base.get("base_model"),
                "prompt": asdict(prompt.metadata) | {"num_virtual_tokens": prompt.num_virtual_tokens},
                "results": details,
            }
        )
    return replace(report, layout=prompt.metadata.layout)


def sample_ids(tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """(T,) a few hundred tokens of neutral text: a reference topic that ships inside every Python."""
    text = pydoc_data.topics.topics[_SAMPLE_TOPIC]
    ids = tokenizer(text[: 8 * _SAMPLE_TOKENS], add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids[:_SAMPLE_TOKENS])


def _vocab(
    space: Workspace,
    section: StitchSection,
    prompt: Prompt,
    model: PreTrainedModel,
    hidden_ND: torch.Tensor | None,
    tokenizer: PreTrainedTokenizerBase,
    model_path: Path,
    notes: tuple[str, ...],
    progress: Progress,
) -> tuple[StitchReport, dict[str, Any]]:
    made = stitch_vocabulary(
        prompt,
        model=model,
        tokenizer=tokenizer,
        base=model_path,
        folder=space.path,
        sample_ids=sample_ids(tokenizer),
        hidden_states=hidden_ND,
        dtype=_dtype(section),
        vocab_multiple=section.vocab_multiple,
        progress=progress,
    )
    report = StitchReport(
        path=space.output,
        format="vocab",
        mass_mean=made.mass_mean,
        mass_max=made.mass_max,
        linked_bytes=made.linked_bytes,
        written_bytes=made.written_bytes,
        copied_bytes=made.copied_bytes,
        notes=(*notes, *made.notes),
    )
    ids = made.token_ids
    return report, asdict(made) | {"token_ids": [ids[0], ids[-1]], "notes": report.notes}


def _dtype(section: StitchSection) -> torch.dtype | None:
    return None if section.dtype == "auto" else getattr(torch, section.dtype)


def _kv(
    space: Workspace,
    section: StitchSection,
    prompt: AnyPrompt,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    model_path: Path,
    notes: tuple[str, ...],
) -> tuple[StitchReport, dict[str, Any]]:
    bos_id = bos_before(prompt, tokenizer)
    key_values = kv_of(prefix_of(prompt, model, name=str(model_path), bos_id=bos_id), model).float()
    if prompt.metadata.layout == "bos-prompt-text":
        notes = (*notes, BOS_INSIDE)
    file = space.path / PROMPT_FILE
    save_prompt(file, KvPrefix(key_values, replace(prompt.metadata, kind="kv-prefix")), dtype=_dtype(section))
    written = file.stat().st_size
    report = StitchReport(space.output, "kv", None, None, 0, written_bytes=written, copied_bytes=0, notes=notes)
    return report, {"written_bytes": written, "notes": notes}


def _peft(
    space: Workspace,
    section: StitchSection,
    prompt: AnyPrompt,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    model_path: Path,
    notes: tuple[str, ...],
) -> tuple[StitchReport, dict[str, Any]]:
    bos_id = bos_before(prompt, tokenizer)
    settings: dict[str, Any] = {"model": model, "base_name": str(model_path.resolve()), "dtype": _dtype(section)}
    if isinstance(prompt, Prompt):
        notes = (*notes, *export_peft(prompt, space.path, bos_id=bos_id, **settings))
    else:
        prefix_of(prompt, model, name=str(model_path), bos_id=bos_id)  # says why where it does not fit
        notes = (*notes, *export_peft_prefix(prompt, space.path, **settings))
    written = (space.path / "adapter_model.safetensors").stat().st_size
    report = StitchReport(space.output, "peft", None, None, 0, written_bytes=written, copied_bytes=0, notes=notes)
    return report, {"written_bytes": written, "notes": notes}


def _inputs(
    prompt_path: Path,
    prompt: AnyPrompt,
    model_path: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
) -> dict[str, Any]:
    """What went in. The model's weights are not read for it: its manifest, if it has one, names this very
    making.
    """
    manifest = model_path / MANIFEST
    file = prompt_path if prompt_path.is_file() else prompt_path / PROMPT_FILE
    return {
        "prompt": {"name": file.name, "sha256": file_fingerprint(file)},
        "model": {
            "name": model_path.resolve().name,
            "config_sha256": file_fingerprint(model_path / "config.json"),
            "manifest_sha256": file_fingerprint(manifest) if manifest.is_file() else None,
            "embedding_fingerprint": fingerprint_embedding(decoder_embedding(model).weight),
            "tokenizer_fingerprint": fingerprint_tokenizer(tokenizer),
        },
    }
