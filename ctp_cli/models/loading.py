"""Load a checkpoint folder, dense or quantized, as a frozen transformers model in evaluation mode."""

import contextlib
import copy
import json
import math
import os
import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from ctp_kernels.memory import keep_no_freed_memory
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from ctp_cli.checkpoints.formats import FORMATS, LayerFormat, format_of, read_dense_state, read_packed_state
from ctp_cli.errors import CtpError, InputError, UnknownTokenError, is_out_of_memory
from ctp_cli.files import read_json

_MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit
_LAYER_COUNT = re.compile(r"layers?$")
_MOST_LAYERS = 1024
_LONGEST_NAME = 255  # of a file, nearly everywhere
_ANY_VALUES = 16_000_000
"""Parameters that a model may lack for the moment: what is missing is told by name."""


@contextlib.contextmanager
def unusable_is_said(what: str, *, hint: str | None = None) -> Iterator[None]:
    """Whatever a library raises over a damaged or foreign file becomes an InputError: `what`, and its own words.

    Their types do not tell: tokenizers and huggingface_hub raise a bare Exception, others all of Python's.
    """
    try:
        yield
    except CtpError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise InputError(f"{what} ({first_line(error)})", hint=hint) from None


def load_config(path: Path) -> Any:
    """The model's configuration. Raises InputError if there is none or it is not understood."""
    _check_depth(path / "config.json")
    with unusable_is_said(f"{path}: config.json is not usable", hint="is the folder complete?"):
        return AutoConfig.from_pretrained(path, trust_remote_code=False)


def _check_depth(file: Path) -> None:
    """transformers makes a module for every layer that is asked for, and some lists, before any weight is seen."""
    sections: list[Any] = [read_json(file)]
    while sections:
        for key, value in sections.pop().items():
            if isinstance(value, dict):
                sections.append(value)
            elif isinstance(value, int | float) and _LAYER_COUNT.search(key) and value > _MOST_LAYERS:
                raise InputError(f"{file}: {key} {value:g} is more than {_MOST_LAYERS}", hint="is the file damaged?")


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer saved beside a model. Raises InputError if it is missing or damaged."""
    with unusable_is_said(f"{path}: the tokenizer cannot be loaded", hint="is the folder complete?"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    for circumstance in ("local_files_only", "is_local"):
        # how it was loaded this time; it would be saved with the tokenizer and make equal checkpoints differ
        tokenizer.init_kwargs.pop(circumstance, None)
    if not isinstance(tokenizer.model_max_length, int | float):
        raise InputError(
            f"{path}: model_max_length of tokenizer_config.json is no number", hint="mend it, or take it out"
        )
    return tokenizer


def load_model(
    path: Path, *, dtype: torch.dtype | None = None, device: str = "cpu", packed: bool = False
) -> PreTrainedModel:
    """A causal language model with all parameters frozen, in eval mode.

    `dtype` None keeps the checkpoint's. Codes are dequantized into dense layers, one layer at a time, or with `packed`
    kept as format ctp has them, in `PackedLinear` layers.
    Raises InputError for a missing, damaged or unsupported checkpoint, or a dense one with `packed`.
    """
    config = load_config(path)
    form = packed_format(config, path)
    if packed and form is None:
        raise InputError(f"{path}: not quantized, so there is nothing to keep packed", hint="leave out --packed")
    stored = check_weight_files(path)
    if form is None:
        check_size(path, dense_skeleton(config)[0], stored)
    with unusable_weights_are_said(path), quiet_transformers():
        if form is None:
            factory: Any = AutoModelForCausalLM
            model, info = factory.from_pretrained(
                path, dtype=dtype or "auto", trust_remote_code=False, output_loading_info=True
            )
        elif packed:
            model, info = _load_packed(path, config, form, dtype)
        else:
            model, info = _load_dequantized(path, config, form, dtype)
    refuse_missing(path, info["missing_keys"])
    frozen: PreTrainedModel = model.to(device).eval().requires_grad_(False)
    return frozen


def unusable_weights_are_said(path: Path) -> contextlib.AbstractContextManager[None]:
    return unusable_is_said(f"{path}: the weights cannot be loaded", hint="download or compress the model again")


def packed_format(config: Any, path: Path) -> LayerFormat | None:
    """The format of the checkpoint's quantized layers, None where it has none. Raises InputError for an unknown one."""
    quantization = getattr(config, "quantization_config", None)
    if quantization is None:
        return None
    return format_of(quantization if isinstance(quantization, dict) else quantization.to_dict(), path)


def dense_skeleton(config: Any) -> tuple[PreTrainedModel, set[str]]:
    """The model without weights and without quantization, and the names of its layers that store (in, out).

    Raises InputError for sizes of which no model can be made.
    """
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    what = f"{config.name_or_path}: no model can be made of config.json"
    with unusable_is_said(what, hint="is the folder complete?"), torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    return skeleton, {name for name, module in skeleton.named_modules() if type(module).__name__ == "Conv1D"}


def _load_dequantized(
    path: Path, config: Any, form: LayerFormat, dtype: torch.dtype | None
) -> tuple[Any, dict[str, Any]]:
    skeleton, transposed = dense_skeleton(config)
    dtype = dtype or config.dtype or torch.float16
    state = read_dense_state(weight_files(path), form, dtype=dtype, transposed=transposed)
    check_size(path, skeleton, sum(tensor.numel() for tensor in state.values()))
    return _from_state(skeleton, state, dtype)


def _load_packed(path: Path, config: Any, form: LayerFormat, dtype: torch.dtype | None) -> tuple[Any, dict[str, Any]]:
    from ctp_cli.checkpoints.packed_generation import make_fast
    from ctp_cli.checkpoints.packed_linear import PackedLinear, prepare_layers

    skeleton, transposed = dense_skeleton(config)
    dtype = dtype or config.dtype or torch.float16
    keep_no_freed_memory()
    state, layers, settings = read_packed_state(weight_files(path), form, dtype=dtype)
    in_layers = sum(8 * parts.get("mask", parts["codes"]).numel() for parts in layers.values())  # or fewer, by the bits
    check_size(path, skeleton, sum(tensor.numel() for tensor in state.values()) + in_layers)
    promised = {f"{name}.weight": Promise(0, skeleton.get_parameter(f"{name}.weight").shape) for name in layers}
    model, info = _from_state(skeleton, {**state, **promised}, dtype)
    for name, parts in layers.items():
        linear = model.get_submodule(name)
        outputs = parts["scales"].shape[0]
        inputs = linear.weight.numel() // outputs
        if outputs != linear.weight.shape[name in transposed]:
            raise InputError(
                f"{path}: {name} has {outputs} outputs, in its config.json {linear.weight.shape[name in transposed]}",
                hint="copy, download or make it again",
            )
        packed = PackedLinear(settings, inputs, outputs, parts, bias=False)
        packed.bias = linear.bias
        model.set_submodule(name, packed)
    prepare_layers(model)
    make_fast(model, attention=True)
    return model, info


def _from_state(skeleton: PreTrainedModel, state: dict[str, Any], dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
    factory: Any = type(skeleton)  # the Auto class insists on a path
    model, info = factory.from_pretrained(
        None, config=skeleton.config, state_dict=state, dtype=dtype, output_loading_info=True
    )
    return model, info


class Promise:
    """Stands for a stored tensor where transformers loads a checkpoint: it becomes a tensor without memory.

    Its number is the storage offset of that tensor, by which the parameter it turned into is known again whatever that
    parameter is called.
    """

    def __init__(self, number: int, shape: Sequence[int]) -> None:
        self._number, self._shape = number, torch.Size(shape)

    def __getitem__(self, _: object) -> "Promise":
        return self

    def to(self, *, dtype: torch.dtype, **_: Any) -> Tensor:
        return torch.empty(self._number + self._shape.numel(), dtype=dtype, device="meta")[self._number :].view(
            self._shape
        )


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


def _is_file_name(name: object) -> bool:
    return isinstance(name, str) and not {"/", "\0"} & set(name) and len(name) <= _LONGEST_NAME


def weight_files(path: Path) -> dict[str, Path]:
    """Tensor name -> file, from the index or from the single file.

    Raises InputError if there are no safetensors files or the index names one that is not there.
    """
    if (index := weight_index(path)) is not None:
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict) or not all(map(_is_file_name, names.values())):
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


def check_size(path: Path, skeleton: PreTrainedModel, stored: int) -> None:
    """transformers makes all of a model before it sees that sizes do not agree; `stored`: values in the files."""
    asked = sum(parameter.numel() for parameter in skeleton.parameters())
    if asked > 2 * stored + _ANY_VALUES:
        raise InputError(
            f"{path}: config.json describes a model of {asked:,} parameters, the weight files hold {stored:,}",
            hint="the checkpoint is not complete, or its config.json belongs to another one",
        )


def check_weight_files(path: Path) -> int:
    """Every weight file is there, and its header agrees with its length; nothing of the tensors is read.

    Returns the number of values stored.
    """
    from safetensors import safe_open

    stored = 0
    for file in sorted(set(weight_files(path).values())):
        if not file.is_file():
            raise InputError(
                f"{path}: {file.name} is missing",
                hint="the checkpoint is not complete: copy or make it again",
            )
        try:
            _cache_header(file)
            with safe_open(file, "pt") as handle:
                stored += sum(math.prod(handle.get_slice(name).get_shape()) for name in handle.keys())  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise damaged(file, error) from None
    return stored


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


def check_ids(ids: Tensor, model: PreTrainedModel) -> None:
    """Raises UnknownTokenError for token ids that have no row in the embedding table."""
    rows = decoder_embedding(model).num_embeddings
    if ids.numel() and int(ids.max()) >= rows:
        raise UnknownTokenError(
            f"the text holds token id {int(ids.max())}, the model has {rows} embeddings",
            hint="is the tokenizer that of this model?",
        )


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
