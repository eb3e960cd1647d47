"""A recipe: what to do, with every default stated once, here. Loads YAML and `--set` overrides; imports no torch.

A recipe file states only what differs from the defaults. The command line builds the same sections.
"""

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from ctp_cli.errors import RecipeError

_CHARACTERS = 200_000
"""Of a recipe; real ones have a few thousand."""
_PROBLEMS = 20
"""Of a recipe, told at once."""
_SHOWN = 300
"""Characters of what was given, in a message."""
_NM = re.compile(r"^(\d+):(\d+)$")
_TIME = re.compile(r"^(\d+(?:\.\d+)?)(s|m|h)$")
_SIZE = re.compile(r"^(\d+(?:\.\d+)?) ?(MB|GB|TB)$", re.IGNORECASE)
_UNIT_BYTES = {"MB": 1e6, "GB": 1e9, "TB": 1e12}
_UNIT_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0}


def _check_sparsity(value: float | str | None) -> float | str | None:
    if isinstance(value, str):
        match = _NM.match(value)
        if match is None:
            try:
                value = float(value)
            except ValueError:
                raise ValueError("give a fraction such as 0.5, or n:m such as '2:4'") from None
        else:
            kept, of = int(match[1]), int(match[2])
            if not 0 < kept < of <= 64:
                raise ValueError(f"n:m keeps n of every m weights and needs 0 < n < m <= 64, got {value}")
            return value
    if value is not None and value >= 1 and value.is_integer():
        raise ValueError(f"{value:g} is not a fraction; YAML reads an unquoted 2:4 as a number: write '2:4'")
    if value is not None and not 0 < value < 1:
        raise ValueError(f"a fraction lies between 0 and 1, got {value:g}")
    return value


def _read_time(value: Any) -> Any:
    if isinstance(value, str):
        match = _TIME.match(value)
        if match is None:
            raise ValueError("give a time such as 90s, 30m or 1.5h")
        return float(match[1]) * _UNIT_SECONDS[match[2]]
    return value


def _read_size(value: Any) -> Any:
    if isinstance(value, str):
        match = _SIZE.match(value)
        if match is None:
            raise ValueError("give a size such as 500MB, 4GB or 1.5TB")
        size = float(match[1]) * _UNIT_BYTES[match[2].upper()]
        if not math.isfinite(size):
            raise ValueError("is more than any machine has")
        return int(size)
    return value


Bytes = Annotated[int, BeforeValidator(_read_size), Field(gt=0)]
Seconds = Annotated[float, BeforeValidator(_read_time), Field(gt=0, allow_inf_nan=False)]
Sparsity = Annotated[float | str | None, AfterValidator(_check_sparsity)]


class Section(BaseModel):
    """Strict: an unknown key is an error, and a section never changes once made."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _text_is_text(cls, value: Any) -> Any:
        """YAML can spell what no file name and no text can hold."""
        for text in value if isinstance(value, tuple) else (value,):
            if isinstance(text, str) and ("\0" in text or any("\ud800" <= letter <= "\udfff" for letter in text)):
                raise ValueError("a text without NUL characters and half surrogate pairs is needed")
        return value

    def without_effect(self) -> list[str]:
        """What was changed from its default and changes nothing beside the other settings: 'NAME without OTHER'."""
        return [
            f"{name} without {needed}"
            for needed, (given, names) in self._effects().items()
            if not given
            for name in names
            if getattr(self, name) != type(self).model_fields[name].default
        ]

    def _effects(self) -> dict[str, tuple[bool, tuple[str, ...]]]:
        """What is needed, whether it is given, and the settings that have no effect without it."""
        return {}


class CompressSection(Section):
    """`ctp compress`: what is pruned, what is quantized, how, and on which text."""

    sparsity: Sparsity = None
    """Fraction of each layer's weights set to zero, or 'n:m': n of every m inputs are kept. None: no pruning."""
    bits: Literal[2, 3, 4, 8] | None = None
    """Bits per kept weight, without scales. None: no quantization."""
    group_size: Literal["auto", "row"] | Annotated[int, Field(ge=8)] = "auto"
    """Inputs that share a scale. auto: the largest of 128, 64, 32 that divides every layer; row: one per output."""
    symmetric: bool = True
    """Zero in the middle of the grid (vLLM needs it); False: a zero point per group."""
    mse_clip: bool = True
    """Shrink each group's range to the one with the least squared error instead of its full range."""
    act_order: Literal["none", "column", "group", "static"] = "group"
    """Columns with larger inputs first. column: freely, groups then scattered (desc_act); group: group by group, groups
    stay contiguous; static: freely, groups stay contiguous and their scales are those of the weights as given."""
    true_sequential: bool = True
    """Within a block, each layer sees the outputs of the layers before it already compressed."""
    target: Literal["full", "layer"] = "layer"
    """What new weights reproduce: the full model's outputs in their place, or their own old ones (GPTQ, SparseGPT)."""
    tune_windows: Annotated[int, Field(ge=0)] = 0
    """Windows on which the compressed model learns to predict what the full model does. 0: no tuning."""
    tune: Literal["weights", "scales"] = "weights"
    """What learns. weights: kept weights after pruning, then scales after quantization; scales: scales only."""
    tune_learning_rate: Annotated[float, Field(gt=0, le=1e6)] = 2e-3
    dampening: Annotated[float, Field(gt=0, lt=1)] = 0.01
    """Added to the Hessian's diagonal; a share of its mean (percdamp in GPTQ)."""
    pruner: Literal["alternating", "sparsegpt", "wanda", "magnitude"] = "alternating"
    """alternating: least-squares fits of what is kept and swaps against what is not, in turns, then quantization."""
    rounds: Annotated[int, Field(ge=1, le=100)] = 3
    """Turns of the alternating pruner."""
    allocation: Literal["uniform", "owl"] = "uniform"
    """uniform: every layer is pruned to the same fraction; owl: blocks with more outliers less, with the same mean."""
    quantizer: Literal["gptq", "rtn"] = "gptq"
    """rtn is round-to-nearest."""
    refine: Annotated[int, Field(ge=0, le=1000)] = 4
    """Sweeps of coordinate descent over GPTQ's codes: each in turn becomes the best one while all others stay."""
    calibration: str | None = None
    """Text to calibrate on; see `ctp compress --help`. None: pydoc for the embedded model, c4 otherwise."""
    windows: Annotated[int, Field(ge=1)] = 64
    """Calibration windows."""
    seqlen: Annotated[int, Field(ge=8)] = 1024
    """Tokens per calibration window."""
    bos: bool = False
    """The tokenizer's BOS is the first token of every window, as models that were trained so want it (Gemma)."""
    max_memory: Bytes | None = None
    """Memory for the whole process, e.g. 4GB. Where it is short, hidden states between two blocks go to files in the
    unfinished output's folder, and a block is run again for each set of its layers: slower, with the same result.
    None: no limit."""
    format: Literal["auto", "dense", "gptq", "compressed-tensors", "ctp"] = "auto"
    """auto: ctp where weights are pruned and quantized, gptq where they are quantized alone, dense otherwise."""

    @model_validator(mode="after")
    def _something_to_do(self) -> "CompressSection":
        if self.sparsity is None and self.bits is None:
            raise ValueError("nothing to do: give sparsity, bits or both")
        if self.format == "compressed-tensors" and self.act_order == "column":
            raise ValueError("format compressed-tensors has no scattered groups: use act_order group, or format gptq")
        if self.format not in ("auto", "dense") and self.bits is None:
            raise ValueError(f"format {self.format} stores quantized weights: give bits, or format dense")
        if self.target == "full" and not self.true_sequential:
            raise ValueError("target full needs true_sequential, or layers would share an error: use target layer")
        if self.act_order == "column" and self.tune_windows:
            raise ValueError("tuning scales needs groups of neighbouring inputs: use act_order group, static or none")
        if self.allocation != "uniform" and not isinstance(self.sparsity, float):
            raise ValueError(f"allocation {self.allocation} needs a fraction to prune; n:m is the same everywhere")
        if self.act_order in ("column", "static") and isinstance(self.sparsity, str):
            raise ValueError(f"act_order {self.act_order} tears n:m blocks apart: use group or none")
        return self

    def _effects(self) -> dict[str, tuple[bool, tuple[str, ...]]]:
        prunes, quantizes, tunes = self.sparsity is not None, self.bits is not None, self.tune_windows > 0
        gptq = quantizes and self.quantizer == "gptq"
        sparsegpt = prunes and self.pruner == "sparsegpt"
        fits = prunes and self.pruner in ("alternating", "sparsegpt")
        effects = {
            "sparsity": (prunes, ("pruner", "rounds")),
            "bits": (quantizes, ("group_size", "symmetric", "mse_clip", "quantizer", "refine")),
            "tune_windows": (tunes, ("tune", "tune_learning_rate")),
            "quantizer gptq or pruner sparsegpt": (gptq or sparsegpt, ("act_order",)),
            "quantizer gptq, or pruner alternating or sparsegpt": (gptq or fits, ("target", "dampening")),
        }
        if prunes:
            effects["pruner alternating"] = self.pruner == "alternating", ("rounds",)
        if quantizes:
            effects["quantizer gptq"] = gptq, ("refine",)
        return effects

    @property
    def stored_as(self) -> str:
        """The format, auto made definite."""
        if self.format != "auto":
            return self.format
        if self.bits is None:
            return "dense"
        return "gptq" if self.sparsity is None else "ctp"


class LearnSection(Section):
    """`ctp learn`: a prompt on frozen models."""

    method: Literal["soft-prompt", "kv-prefix"] = "soft-prompt"
    """soft-prompt: rows among the input embeddings, which any engine serves once stitched; kv-prefix: every layer's
    keys and values (prefix tuning), for engines that take a filled cache."""
    init: str | None = None
    """Where learning starts: 'text:WORDS', or the file of an earlier prompt. None: random token embeddings; for a
    kv-prefix, the beginning of the text learned from."""
    tokens: Annotated[int, Field(ge=1, le=4096)] = 100
    """num_virtual_tokens: rows of the prompt; of a kv-prefix with a BOS, that one too."""
    bos: bool = False
    """The tokenizer's BOS stands before the prompt, as models that were trained so want it (Gemma); a kv-prefix begins
    with its keys and values."""
    steps: Annotated[int, Field(ge=1)] | None = None
    """Optimizer steps. None: as many as fit `max_time`."""
    max_time: Seconds | None = None
    """Seconds of learning: how many steps fit is estimated at the start and at every validation. With neither:
    30 minutes."""
    batch_size: Annotated[int, Field(ge=1)] = 4
    seqlen: Annotated[int, Field(ge=8)] = 512
    """Text tokens per sequence; the prompt stands before them."""
    learning_rate: Annotated[float, Field(gt=0, le=1e6)] | Literal["auto"] | None = None
    """None: 1e-2; for a kv-prefix, in standard deviations of each layer's keys or values, 3e-2. auto: the best of this,
    0.3 and 3 times this after 20 steps with each."""
    warmup_share: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Share of the steps over which the learning rate rises linearly; it then falls linearly to zero."""
    gradient_clip: Annotated[float, Field(gt=0)] = 1.0
    weight_decay: Annotated[float, Field(ge=0, le=1e3)] = 0.0
    teacher: str | None = None
    """The model to learn from beside the text: its likeliest next tokens are part of the loss. The uncompressed model
    is meant. Asked once, before learning; it is not in memory later."""
    teacher_share: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Of the loss; the text has the rest."""
    teacher_tokens: Annotated[int, Field(ge=1, le=1024)] = 32
    """Likeliest tokens kept for each position of the text."""
    text: str | None = None
    """Text to learn from. None: pydoc for the embedded model, c4 otherwise."""
    stream: bool = False
    """Read the text while learning, for what is larger than memory; FILE may then be a pattern, `corpus/*.jsonl`. What
    is read first of a local text is its validation text, unless there is another."""
    shuffle_buffer: Annotated[int, Field(ge=1)] = 1024
    """Windows of a streamed text from which the next one is drawn."""
    validation: str | None = None
    """Text that selects the best prompt: never the text later reported. None: the same source's validation part."""
    validate_every: Annotated[int, Field(ge=1)] = 50
    """Steps between validations; each also saves the state to go on from."""
    validation_windows: Annotated[int, Field(ge=1)] = 16
    patience: Annotated[int, Field(ge=1)] = 10
    """Validations without a better prompt before learning stops."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    shard: bool = False
    """Hold the frozen model in parts, one per process (FSDP2): for models that do not fit one device."""
    dtype: Literal["auto", "checkpoint", "float32", "bfloat16"] = "auto"
    """In which the frozen model is held and multiplied; the prompt is float32 in any case. auto: float32 on a processor
    without 16-bit products where it takes at most half of the free memory, else the checkpoint's."""
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    """accelerate's. Where it is not `no`, dtype auto is the checkpoint's."""
    packed: bool = False
    """Keep the weights of quantized checkpoints packed in memory, a layer dense only while it is multiplied: far less
    memory, more time."""
    gradient_checkpointing: bool = False
    """Make a block's activations again when its gradient is computed, instead of keeping those of all blocks: far less
    memory, a third more time."""
    tracker: str | None = None
    """Of accelerate's: tensorboard, wandb, mlflow, ... Files go to the output's folder `logs`."""

    @model_validator(mode="after")
    def _parts_are_whole_layers(self) -> "LearnSection":
        if self.shard and (self.packed or self.gradient_checkpointing):
            raise ValueError("shard holds dense weights in parts: leave out packed and gradient_checkpointing")
        return self

    def _effects(self) -> dict[str, tuple[bool, tuple[str, ...]]]:
        return {
            "teacher": (self.teacher is not None, ("teacher_share", "teacher_tokens")),
            "stream": (self.stream, ("shuffle_buffer",)),
        }


class StitchSection(Section):
    """`ctp stitch`: prompt + checkpoint -> checkpoint."""

    format: Literal["vocab", "peft", "kv"] = "vocab"
    """vocab: new tokens of an ordinary checkpoint; peft: an adapter, which for a kv-prefix is one of prefix tuning;
    kv: the keys and values the prompt has on this checkpoint."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the tensors written: for vocab, embedding table and head; config.json then says the same, in which engines
    load the whole checkpoint. auto: vocab keeps the checkpoint's; an adapter or cache is float32, like the prompt."""
    vocab_multiple: Annotated[int, Field(ge=1, le=65_536)] | None = None
    """Rows without a token behind the prompt's make the vocabulary a multiple of this (pad_to_multiple_of), for tensor
    cores and tensor parallelism. None: of 64 where the checkpoint's is."""

    @model_validator(mode="after")
    def _has_a_vocabulary(self) -> "StitchSection":
        if self.vocab_multiple is not None and self.format != "vocab":
            raise ValueError(f"vocab_multiple pads a vocabulary, and format {self.format} has none: use format vocab")
        return self


class EvalSection(Section):
    """`ctp eval`: perplexity as defined in the README."""

    ppl: tuple[str, ...] = ()
    """Texts to report on. Empty: pydoc:test for the embedded model, c4 otherwise."""
    seqlen: Annotated[int, Field(ge=8)] = 1024
    windows: Annotated[int, Field(ge=2)] = 256
    """At most this many windows of each text."""
    bos: bool = False
    """The tokenizer's BOS stands before every window and is not scored. Models that were trained so (Gemma) do badly
    without."""
    batch_size: Annotated[int, Field(ge=1)] = 4
    convention: Literal["true", "paper"] = "true"
    """paper: counts prompt positions as the published evaluator did; only for comparison with the publication."""
    packed: bool = False
    """As in learn."""
    max_ppl: Annotated[float, Field(gt=1)] | None = None
    """Gate: finish with exit code 4 if any perplexity is above."""


class BenchSection(Section):
    """`ctp bench`: latency against prompt length."""

    prompt_len: tuple[Annotated[int, Field(ge=0, le=4096)], ...] = (0, 25, 50, 75, 100)
    seqlen: Annotated[int, Field(ge=2)] = 1024
    """Text tokens before the first generated one."""
    new_tokens: Annotated[int, Field(ge=2)] = 16
    """Tokens generated to time one of them."""
    rounds: Annotated[int, Field(ge=1)] = 6
    """Each configuration is measured once per round; configurations take turns. 6 are the fewest for a confidence
    interval of 95%."""
    packed: bool = False
    """Keep the weights of a quantized checkpoint packed in memory, and multiply by the kernels for that."""
    max_latency_ms: Annotated[float, Field(gt=0)] | None = None
    """Gate: finish with exit code 4 if the median time per token is above."""


class Recipe(Section):
    """A whole recipe. A section that is absent is a stage that does not run."""

    model: str = "smollm2-135m"
    output: str
    """Folder for everything the recipe makes, relative to the current folder."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    device: str = "auto"
    compress: CompressSection | None = None
    learn: LearnSection | None = None
    stitch: StitchSection | None = None
    eval: EvalSection | None = None
    bench: BenchSection | None = None

    @model_validator(mode="after")
    def _stages_fit(self) -> "Recipe":
        if not any((self.compress, self.learn, self.stitch, self.eval, self.bench)):
            raise ValueError("nothing to do: name at least one stage (compress, learn, stitch, eval, bench)")
        if self.stitch and not self.learn:
            raise ValueError("stitch needs the prompt that learn makes: add a learn section")
        if self.stitch and self.learn and self.stitch.format == "vocab" and self.learn.method == "kv-prefix":
            raise ValueError("no token can stand for a kv-prefix: set stitch.format to kv or peft")
        if self.learn and self.eval and self.learn.bos != self.eval.bos:
            raise ValueError("a prompt is evaluated as it was learned: set bos in both, learn and eval, or in neither")
        return self


SectionType = TypeVar("SectionType", bound=BaseModel)


def build(section: type[SectionType], given: Mapping[str, Any], *, where: str = "") -> SectionType:
    """A section from what was given (None means not given); every problem is reported at once."""
    try:
        return section.model_validate({key: value for key, value in given.items() if value is not None})
    except ValidationError as error:
        found = error.errors()
        lines = [_problem(section, item, where) for item in found[:_PROBLEMS]]
        if len(found) > _PROBLEMS:
            lines.append(f"and {len(found) - _PROBLEMS} problems more")
        raise RecipeError("\n       ".join(lines)) from None


def load(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe from a YAML file, with `section.key=value` overrides (values are YAML too)."""
    try:
        with path.open(encoding="utf-8") as handle:
            text = handle.read(_CHARACTERS + 1)
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(
            f"{path}: cannot be read ({error})",
            hint="give the path of a recipe, e.g. recipes/quickstart.yaml",
        ) from None
    if len(text) > _CHARACTERS:
        raise RecipeError(f"{path}: longer than {_CHARACTERS:,} characters", hint="is it a recipe?")
    content = _yaml(text, str(path))
    if not isinstance(content, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of sections, found {type(content).__name__}")
    for override in overrides:
        key, separator, value = override.partition("=")
        if not separator or not key:
            raise RecipeError(f"--set {override}: write it as section.key=value")
        _assign(content, key.split("."), _yaml(value, f"--set {override}"), override)
    content = {key: {} if value is None and key in _STAGES else value for key, value in content.items()}
    return build(Recipe, content, where=str(path))


_STAGES = ("compress", "learn", "stitch", "eval", "bench")


class _Loader(yaml.SafeLoader):
    """Without aliases of lists and mappings: a few lines of such can stand for more than any memory holds."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event() if self.check_event(yaml.AliasEvent) else None
        node = super().compose_node(parent, index)
        if event is not None and not isinstance(node, yaml.ScalarNode):
            raise yaml.constructor.ConstructorError(
                None, None, f"*{event.anchor} stands for a list or mapping: write it out", event.start_mark
            )
        return node

    def construct_yaml_int(self, node: Any) -> Any:
        value = super().construct_yaml_int(node)
        if isinstance(value, int) and value.bit_length() > 64:  # Python does not even write those of 5,000 digits
            raise yaml.constructor.ConstructorError(None, None, "a number of more than 64 bits", node.start_mark)
        return value


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def _yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise RecipeError(f"{where}: not YAML ({_short(' '.join(str(error).split()))})") from None
    except (LookupError, AttributeError):  # PyYAML's, at "!!bool 7" or "!!timestamp soon"
        raise RecipeError(f"{where}: not YAML (a value that is not what its tag says)") from None


def _assign(content: dict[Any, Any], keys: list[str], value: Any, override: str) -> None:
    for key in keys[:-1]:
        child = content.get(key)
        if child is None:
            child = content[key] = {}
        if not isinstance(child, dict):
            raise RecipeError(f"--set {override}: {key} is not a section")
        content = child
    content[keys[-1]] = value


def _problem(section: type[BaseModel], item: Any, where: str) -> str:
    path = [str(part) for part in item["loc"] if not _is_branch_label(str(part))]
    place = ".".join(path) or "recipe"
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "extra_forbidden":
        message = "unknown key"
        known = _keys_at(section, path[:-1])
        if close := difflib.get_close_matches(path[-1], known, n=1):
            message += f", did you mean {close[0]}?"
        elif known:
            message += f"; known here: {', '.join(known)}"
    elif item["type"] not in ("missing", "value_error") and not isinstance(item.get("input"), dict):
        message += f" (got {_short(repr(item.get('input')))})"
    return f"{where + ': ' if where else ''}{_short(place)}: {message}"


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."


def _is_branch_label(part: str) -> bool:
    # pydantic adds the branch of a union ("literal['auto','row']", "constrained-int") to the path of a problem
    return part in {"float", "str", "int"} or part.startswith(("literal[", "constrained-", "function-"))


def _keys_at(section: type[BaseModel], path: list[str]) -> list[str]:
    model: Any = section
    for key in path:
        field = model.model_fields.get(key)
        if field is None:
            return []
        options = [field.annotation, *getattr(field.annotation, "__args__", ())]
        model = next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), None)
        if model is None:
            return []
    return list(model.model_fields)
