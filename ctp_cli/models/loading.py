"""Load a checkpoint folder, dense or quantized, as a frozen transformers model in evaluation mode."""

import contextlib
import copy
import json
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from ctp_cli.checkpoints.formats import FORMATS, LayerFormat, format_of, read_dense_state
from ctp_cli.errors import InputError, is_out_of_memory
from ctp_cli.files import read_json

_MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit

# What a damaged or foreign checkpoint makes transformers raise; all of them are the file's fault, not ours.
LOAD_FAILURES = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    RuntimeError,
    SafetensorError,
    ImportError,
)


def load_config(path: Path) -> Any:
    """The model's configuration. Raises InputError if there is none or it is not understood."""
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except LOAD_FAILURES as error:
        raise InputError(
            f"{path}: config.json is not usable ({first_line(error)})", hint="is the folder complete?"
        ) from None


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer saved beside a model. Raises InputError if it is missing or damaged."""
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except LOAD_FAILURES as error:
        raise InputError(f"{path}: the tokenizer cannot be loaded ({first_line(error)})") from None
    for circumstance in ("local_files_only", "is_local"):
        # how it was loaded this time; it would be saved with the tokenizer and make equal checkpoints differ
        tokenizer.init_kwargs.pop(circumstance, None)
    return tokenizer


def load_model(path: Path, *, dtype: torch.dtype | None = None, device: str = "cpu") -> PreTrainedModel:
    """A causal language model with all parameters frozen, in eval mode.

    `dtype` None keeps the checkpoint's. Codes are dequantized into dense layers, one layer at a time.
    Raises InputError for a missing, damaged or unsupported checkpoint.
    """
    config = load_config(path)
    form = packed_format(config, path)
    check_weight_files(path)
    with unusable_weights_are_said(path), quiet_transformers():
        if form is None:
            factory: Any = AutoModelForCausalLM
            model, info = factory.from_pretrained(
                path, dtype=dtype or "auto", trust_remote_code=False, output_loading_info=True
            )
        else:
            model, info = _load_packed(path, config, form, dtype)
    refuse_missing(path, info["missing_keys"])
    frozen: PreTrainedModel = model.to(device).eval().requires_grad_(False)
    return frozen


@contextlib.contextmanager
def unusable_weights_are_said(path: Path) -> Iterator[None]:
    """What transformers raises over a checkpoint's weights becomes an InputError."""
    try:
        yield
    except LOAD_FAILURES as error:
        if is_out_of_memory(error):
            raise
        raise InputError(
            f"{path}: the weights cannot be loaded ({first_line(error)})",
            hint="download or compress the model again",
        ) from None


def packed_format(config: Any, path: Path) -> LayerFormat | None:
    """The format of the checkpoint's quantized layers, None where it has none. Raises InputError for an unknown one."""
    quantization = getattr(config, "quantization_config", None)
    if quantization is None:
        return None
    return format_of(quantization if isinstance(quantization, dict) else quantization.to_dict(), path)


def dense_skeleton(config: Any) -> tuple[PreTrainedModel, set[str]]:
    """The model without weights and without quantization, and the names of its layers that store (in, out)."""
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    return skeleton, {name for name, module in skeleton.named_modules() if type(module).__name__ == "Conv1D"}


def _load_packed(path: Path, config: Any, form: LayerFormat, dtype: torch.dtype | None) -> tuple[Any, dict[str, Any]]:
    skeleton, transposed = dense_skeleton(config)
    state = read_dense_state(path, form, dtype=dtype or config.dtype or torch.float16, transposed=transposed)
    factory: Any = type(skeleton)  # the Auto class insists on a path
    model, info = factory.from_pretrained(
        None, config=skeleton.config, state_dict=state, dtype=dtype or config.dtype, output_loading_info=True
    )
    return model, info


def refuse_missing(path: Path, missing: Collection[str]) -> None:
    """transformers fills what a checkpoint lacks with random numbers; here it is refused."""
    if missing:
        raise InputError(
            f"{path}: {len(missing)} tensors are missing ({', '.join(sorted(missing)[:3])}, ...)",
            hint="the checkpoint is not complete, or its config.json belongs to another one",
        )


def weight_index(path: Path) -> Path | None:
    """The index over a checkpoint's weight files, if it has one."""
    prefixes = sorted({form.weights_prefix for form in FORMATS.values()}, key=lambda prefix: prefix != "model")
    return next((file for prefix in prefixes if (file := path / f"{prefix}.safetensors.index.json").is_file()), None)


def weight_files(path: Path) -> dict[str, Path]:
    """Tensor name -> file, from the index or from the single file.

    Raises InputError if there are no safetensors files or the index names one that is not there.
    """
    if (index := weight_index(path)) is not None:
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(f, str) and "/" not in f for f in names.values()):
            raise InputError(f"{index}: no usable weight_map")
        return {name: path / file for name, file in names.items()}
    single = path / "model.safetensors"
    if not single.is_file():
        pickled = next(path.glob("*.bin"), None)
        raise InputError(
            f"{path}: no model.safetensors",
            hint=f"{pickled.name} is a pickle, which ctp never opens: convert it with save_pretrained"
            if pickled
            else "give a folder that holds safetensors weights",
        )
    from safetensors import safe_open

    try:
        with safe_open(single, "pt") as handle:
            return dict.fromkeys(handle.keys(), single)
    except (SafetensorError, OSError) as error:
        raise damaged(single, error) from None


def check_weight_files(path: Path) -> None:
    """Every weight file is there, and its header agrees with its length; nothing of the tensors is read."""
    from safetensors import safe_open

    for file in sorted(set(weight_files(path).values())):
        if not file.is_file():
            raise InputError(
                f"{path}: {file.name} is missing",
                hint="the checkpoint is not complete: copy or make it again",
            )
        try:
            _cache_header(file)
            with safe_open(file, "pt") as handle:
                handle.keys()
        except (SafetensorError, OSError) as error:
            raise damaged(file, error) from None


def _cache_header(file: Path) -> None:
    """Read the header and nothing after it: opening a file the usual way, Linux reads megabytes ahead."""
    if hasattr(os, "posix_fadvise"):
        with file.open("rb", buffering=0) as handle:
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
            handle.read(min(int.from_bytes(handle.read(8), "little"), _MAX_HEADER_BYTES))


def damaged(file: Path, error: Exception) -> InputError:
    return InputError(f"{file}: damaged or cut off ({first_line(error)})", hint="copy, download or make it again")


def decoder_embedding(model: PreTrainedModel) -> nn.Embedding:
    """The token embedding table."""
    table = model.get_input_embeddings()
    assert isinstance(table, nn.Embedding), type(table)
    return table


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """transformers' own bars and notes would cut through ours."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def first_line(error: Exception) -> str:
    text = json.dumps(str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__)
    return text.strip('"')[:200]
