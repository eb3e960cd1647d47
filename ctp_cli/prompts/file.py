"""The prompt file: one tensor and where it came from, in one safetensors file; and whether it fits a model."""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerBase

from ctp_cli.errors import InputError
from ctp_cli.files import whole_file
from ctp_cli.prompts.shards import TensorEntry, read_header

PROMPT_FILE = "prompt.safetensors"
TENSOR, KV_TENSOR = "prompt_embeddings", "key_values"
FORMAT_VERSION = 1
MAX_TOKENS, MAX_WIDTH = 65_536, 1_048_576
_MAX_KV = (4096, 2, 4096, MAX_TOKENS, 4096)

Kind = Literal["soft-prompt", "kv-prefix"]
Layout = Literal["prompt-text", "bos-prompt-text"]


@dataclass(frozen=True)
class PromptMetadata:
    """Where a prompt came from. None is "not known": such a fact is reported as unverified, never guessed."""

    kind: Kind = "soft-prompt"
    layout: Layout = "prompt-text"
    """What stands before the text: the prompt, or the BOS token and then the prompt. A kv-prefix has keys and values of
    all that stands there, so of the latter its first ones are the BOS token's."""
    bos_token_id: int | None = None
    """The token of layout bos-prompt-text."""
    base_model: str | None = None
    """Name or hub id of the model before compression."""
    tokenizer_fingerprint: str | None = None
    embedding_fingerprint: str | None = None
    compression: str | None = None
    """JSON of the compression it was learned on; another compression of the same model is welcome."""
    data: str | None = None
    """The text it was learned from."""
    steps: int | None = None
    """Optimizer steps until the prompt was at its best."""
    dtype: str | None = None
    """Of the model's weights while it was learned; of several models, the first one's."""
    seed: int | None = None
    validation_perplexity: float | None = None
    """The best one, which selected this prompt."""
    format_version: int = FORMAT_VERSION


@dataclass(frozen=True, eq=False)
class Prompt:
    """A learned prompt. Shapes: embeddings (num_virtual_tokens, embedding_dim) float32, in the space of
    inputs_embeds.
    """

    embeddings: torch.Tensor
    metadata: PromptMetadata = PromptMetadata()

    def __post_init__(self) -> None:
        assert self.embeddings.dim() == 2 and self.embeddings.dtype == torch.float32, self.embeddings

    @property
    def num_virtual_tokens(self) -> int:
        return self.embeddings.shape[0]

    @property
    def embedding_dim(self) -> int:
        return self.embeddings.shape[1]


@dataclass(frozen=True, eq=False)
class KvPrefix:
    """Learned keys and values that stand before a text in every layer's cache.

    Shapes: key_values (layers, 2, key-value heads, num_virtual_tokens, head width) float32, keys first, as they stand
    in the cache: positions are already applied to them.
    """

    key_values: torch.Tensor
    metadata: PromptMetadata = PromptMetadata(kind="kv-prefix")

    def __post_init__(self) -> None:
        assert self.key_values.dim() == 5 and self.key_values.dtype == torch.float32, self.key_values

    @property
    def num_virtual_tokens(self) -> int:
        return self.key_values.shape[3]


AnyPrompt = Prompt | KvPrefix


def save_prompt(path: Path, prompt: AnyPrompt, *, dtype: torch.dtype | None = None) -> None:
    """Write the prompt to `path`; whoever reads it meanwhile sees the old file or the new one, never a part.

    `dtype` None is float32. Raises InputError for numbers that do not fit into another.
    """
    name, tensor = (TENSOR, prompt.embeddings) if isinstance(prompt, Prompt) else (KV_TENSOR, prompt.key_values)
    tensor = in_dtype(tensor, dtype)
    header = {field.name: getattr(prompt.metadata, field.name) for field in fields(PromptMetadata)}
    strings = {name: str(value) for name, value in header.items() if value is not None}
    with whole_file(path) as beside:
        save_file({name: tensor.detach().cpu().contiguous()}, beside, metadata=strings)
        _sort_header(beside)


def in_dtype(x: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """x in another dtype, None for its own. Raises InputError for numbers that do not fit."""
    cast = x if dtype is None else x.to(dtype)
    if not torch.isfinite(cast).all():
        raise InputError(f"not all numbers of the prompt fit into {dtype}", hint="use --dtype bfloat16 or float32")
    return cast


def _sort_header(file: Path) -> None:
    """safetensors writes metadata in an order that changes from run to run; equal prompts should be equal files."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8 : 8 + length]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    file.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])


def load_prompt(path: Path) -> AnyPrompt:
    """Read a prompt from its file, or from the folder that holds `prompt.safetensors`.

    Other tools' files are welcome if they hold the tensor `prompt_embeddings`; what they do not say stays None.
    Raises InputError for anything else, before memory is taken.
    """
    file = path / PROMPT_FILE if path.is_dir() else path
    if not file.is_file():
        where = f"{path}: holds no {PROMPT_FILE}" if path.is_dir() else f"{path}: no such file"
        raise InputError(where, hint=f"give the {PROMPT_FILE} that `ctp learn` made, or its folder")
    header = read_header(file)
    metadata = _metadata(file, header.metadata)
    name = KV_TENSOR if metadata.kind == "kv-prefix" else TENSOR
    _check_tensor(file, header.tensors, name)
    try:
        tensor = load_file(file)[name].to(torch.float32)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file}: damaged ({error})", hint="copy it again, or learn the prompt again") from None
    if not torch.isfinite(tensor).all():
        raise InputError(f"{file}: the prompt holds NaN or infinite values", hint="learn it again with a lower rate")
    return Prompt(tensor, metadata) if name == TENSOR else KvPrefix(tensor, metadata)


def data_of(prompt: AnyPrompt) -> dict[str, Any]:
    """What the prompt says of the texts that made and chose it."""
    return parsed_data(prompt.metadata.data)


def parsed_data(data: object) -> dict[str, Any]:
    """Other tools may have written anything there."""
    try:
        parsed = json.loads(data) if isinstance(data, str) else None
    except (ValueError, RecursionError):
        return {}
    return parsed if isinstance(parsed, dict) else {}


def load_soft_prompt(path: Path, *, why: str) -> Prompt:
    """Raises InputError, with `why`, for a prompt of another kind."""
    prompt = load_prompt(path)
    if not isinstance(prompt, Prompt):
        raise InputError(f"{path}: a {prompt.metadata.kind}, {why}", hint="learn one with --method soft-prompt")
    return prompt


def _check_tensor(file: Path, tensors: Mapping[str, TensorEntry], name: str) -> None:
    entry = tensors.get(name)
    if entry is None:
        held = ", ".join(sorted(tensors)[:3]) or "nothing"
        raise InputError(f"{file}: holds no tensor {name} (it holds {held})", hint="is this a prompt file?")
    shape = "x".join(map(str, entry.shape))
    if entry.dtype not in ("F32", "F16", "BF16"):
        raise InputError(f"{file}: {name} is {entry.dtype}, expected F32", hint="is this a prompt file?")
    most, wanted = (
        ((MAX_TOKENS, MAX_WIDTH), "virtual tokens x embedding width")
        if name == TENSOR
        else (_MAX_KV, "layers x 2 x heads x virtual tokens x head width")
    )
    if len(entry.shape) != len(most) or not all(0 < n <= m for n, m in zip(entry.shape, most, strict=True)):
        raise InputError(
            f"{file}: {name} is {shape}, expected {wanted}",
            hint="is this a prompt file?",
        )


def _metadata(file: Path, strings: Mapping[str, str]) -> PromptMetadata:
    given: dict[str, Any] = {
        field.name: strings[field.name] for field in fields(PromptMetadata) if field.name in strings
    }
    readers = {"bos_token_id": int, "steps": int, "seed": int, "validation_perplexity": float, "format_version": int}
    for name, reader in readers.items():
        try:
            given.update({name: reader(given[name])} if name in given else {})
        except ValueError:
            raise InputError(f"{file}: header field {name} is {given[name]!r}, not a number") from None
    if given.get("format_version", FORMAT_VERSION) > FORMAT_VERSION:
        raise InputError(
            f"{file}: prompt format {given['format_version']}, this ctp reads {FORMAT_VERSION}",
            hint="update ctp",
        )
    for name, allowed in (("kind", get_args(Kind)), ("layout", get_args(Layout))):
        if given.get(name, allowed[0]) not in allowed:
            raise InputError(f"{file}: header field {name} is {given[name]!r}, expected {' or '.join(allowed)}")
    if not math.isfinite(given.get("validation_perplexity", 0.0)):
        given.pop("validation_perplexity")
    return PromptMetadata(**given)


def fingerprint_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 over what turns text into ids: every token with its id, and the merges or scores.

    What a tokenizer adds around the text, pads or cuts is no part of it, nor is the class that loaded it.
    """
    content: dict[str, Any] = {"vocab": sorted(tokenizer.get_vocab().items())}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        model = json.loads(backend.to_str())["model"]
        content["merges"] = [pair.split(" ") if isinstance(pair, str) else pair for pair in model.get("merges") or []]
        content["scores"] = model["vocab"] if isinstance(model.get("vocab"), list) else None
    return hashlib.sha256(json.dumps(content, ensure_ascii=True).encode()).hexdigest()


def fingerprint_embedding(weight: torch.Tensor) -> str:
    """sha256 over the shape and the signs of an embedding table (rows, width).

    Compression leaves the table alone but may store it in another float format; a sign survives every such
    cast where bytes do not (bfloat16 to float16 loses the smallest values).
    """
    digest = hashlib.sha256(str(tuple(weight.shape)).encode())
    powers = 2 ** torch.arange(8, dtype=torch.uint8)
    for rows in weight.detach().split(8192):  # bounded memory for tables of gigabytes
        signs = torch.signbit(rows).flatten().to("cpu", torch.uint8)
        signs = torch.nn.functional.pad(signs, (0, -signs.numel() % 8))
        digest.update((signs.view(-1, 8) * powers).sum(1, dtype=torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def check_fits(
    prompt: AnyPrompt, *, tokenizer: PreTrainedTokenizerBase, embedding: torch.Tensor, model: str
) -> tuple[str, ...]:
    """Refuse a prompt that was learned for another model; return a line per fact that could not be verified.

    `embedding` is the model's input embedding table (rows, width). A prompt that was learned on another
    compression of the same model fits. Raises InputError with the reason.
    """
    facts = prompt.metadata
    width = embedding.shape[1]
    learned_on = f" (learned on {facts.base_model})" if facts.base_model else ""
    if isinstance(prompt, Prompt) and prompt.embedding_dim != width:
        raise InputError(
            f"the prompt{learned_on} is {prompt.embedding_dim} wide, the embeddings of {model} are {width}",
            hint="a prompt fits compressions of the model it was learned on, not other models",
        )
    checks = (
        ("tokenizer", facts.tokenizer_fingerprint, lambda: fingerprint_tokenizer(tokenizer)),
        ("embedding table", facts.embedding_fingerprint, lambda: fingerprint_embedding(embedding)),
    )
    unverified = []
    for what, expected, compute in checks:
        if expected is None:
            unverified.append(f"the prompt does not say which {what} it was learned with: not verified")
        elif expected != compute():
            raise InputError(
                f"the prompt{learned_on} was learned with another {what} than that of {model}",
                hint="a prompt fits compressions of the model it was learned on, not other models",
            )
    return tuple(unverified)
