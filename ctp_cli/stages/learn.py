"""Learn a prompt on one or several checkpoints and save it with everything it came from."""

import contextlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType, ProjectConfiguration
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.cache_utils import Cache

from ctp_cli.artifact import (
    IDENTITY,
    Workspace,
    file_fingerprint,
    folder_fingerprint,
    manifest_of,
    refuse_existing,
    unfinished,
    workspace,
)
from ctp_cli.benchmark.figures import learning_figure
from ctp_cli.data.batches import WholeText
from ctp_cli.data.windows import bos_of
from ctp_cli.errors import CtpError, InputError, NotFiniteError, RecipeError, UnknownTokenError
from ctp_cli.evaluation.perplexity import perplexity
from ctp_cli.files import read_json
from ctp_cli.models.loading import decoder_embedding, load_model, load_tokenizer
from ctp_cli.models.precision import wider_is_faster
from ctp_cli.models.processes import lost_process_is_said
from ctp_cli.models.resolve import ResolvedModel
from ctp_cli.models.sharding import Frozen, load_sharded
from ctp_cli.progress import SILENT, Progress
from ctp_cli.prompts.checkpointing import checkpoint_blocks
from ctp_cli.prompts.file import (
    PROMPT_FILE,
    KvPrefix,
    Prompt,
    PromptMetadata,
    data_of,
    fingerprint_embedding,
    fingerprint_tokenizer,
    load_prompt,
    save_prompt,
)
from ctp_cli.prompts.losses import KvPrefixLoss, PromptedLoss, SoftPromptLoss
from ctp_cli.prompts.prefix import bos_prefix
from ctp_cli.prompts.teacher import FILES, Teacher
from ctp_cli.prompts.training import LearningSettings, Progressing, from_main, learn
from ctp_cli.prompts.vocab import carries_prompt
from ctp_cli.recipe import LearnSection
from ctp_cli.stages.learning_text import LearningText, learning_text
from ctp_cli.stages.start import earlier_file, refuse_strangers, start

KIND = "prompt"
_STATE = "state.safetensors"
_DEFAULT_SECONDS = 1800.0
_LEARNING_RATES = {"soft-prompt": 1e-2, "kv-prefix": 3e-2}


@dataclass(frozen=True)
class LearnReport:
    """The prompt file and how validation perplexity went, from the start to the best; over several checkpoints it is
    their geometric mean."""

    path: Path
    prompt_file: Path
    steps: int
    best_step: int
    start_perplexity: float
    best_perplexity: float
    unprompted_perplexity: float
    seconds: float
    history: tuple[tuple[int, float], ...]


@lost_process_is_said()
def learn_prompt(
    section: LearnSection,
    *,
    models: Sequence[ResolvedModel],
    output: Path,
    teacher: ResolvedModel | None = None,
    device: str = "cpu",
    force: bool = False,
    progress: Progress = SILENT,
) -> LearnReport:
    """Several `models` are compressions of one model, and the prompt is learned for all of them.

    `teacher` is the model that `section.teacher` names.

    Raises CtpError kinds for what the user can mend; unfinished work is kept and gone on from.
    """
    _check_before_reading(section, models, teacher, output, device, force)
    tokenizer = load_tokenizer(models[0].path)
    if section.bos:
        bos_of(tokenizer)  # a tokenizer without one is refused before the models are read
    _refuse_stitched(models)
    text = learning_text(section, models[0], tokenizer)
    identity = _identity(section, models, teacher, text)
    accelerator = _accelerator(section, device, output)
    _check_can_be_shared(section, accelerator.num_processes)
    dtype = from_main(
        _dtype(section, models, device, output, identity, accelerator.num_processes if section.shard else 1)
    )
    identity["held_in"] = dtype
    networks = _load_all(section, models, dtype, device, progress)
    tables = [one(lambda model: fingerprint_embedding(decoder_embedding(model).weight)) for one in networks]
    refuse_strangers(models, tables, tokenizer)
    _check_teacher(teacher, models[0], tokenizer)
    earlier = earlier_file(section)
    data = None if earlier is None else data_of(load_prompt(earlier))
    job = _Job(section, models, tokenizer, text, networks, tables[0], data)
    module = job.module()
    if isinstance(text.batches, WholeText):  # of others, batch by batch
        module.check_ids(text.batches.ids_T)
    main = accelerator.is_main_process
    place = workspace(output, kind=KIND, identity=identity, force=force) if main else contextlib.nullcontext()
    with place as space:
        state_path = unfinished(output) / _STATE
        accelerator.wait_for_everyone()
        if space is not None and space.resumed and state_path.exists():
            progress.say(f"going on with the unfinished work in {space.path}")
        with _left_nowhere_to_go_on(space, state_path):
            accelerator.init_trackers("learn")
            unprompted = job.perplexity(module, prompted=False)
            progress.say(f"validation perplexity without a prompt: {unprompted:.3f}")
            state = learn(
                module,
                text.batches,
                settings=_settings(section),
                validate=lambda: job.perplexity(module),
                accelerator=accelerator,
                state_path=state_path,
                teacher=None if teacher is None else _teacher(job, teacher, state_path.parent, device),
                progress=progress,
            )
        accelerator.end_training()
        report = _report(output, state, unprompted)
        if space is not None:
            _save(space, job, module.learned(state.best), state, report, device=str(accelerator.device))
    return report


@dataclass(frozen=True)
class _Job:
    """What is learned from what: all that is read before learning."""

    section: LearnSection
    models: Sequence[ResolvedModel]
    tokenizer: PreTrainedTokenizerBase
    text: LearningText
    networks: list[Frozen]
    table: str
    """Fingerprint of the models' embedding table."""
    earlier: dict[str, Any] | None
    """What an earlier prompt that this one starts from says of its texts."""

    def module(self) -> PromptedLoss:
        section, text, model = self.section, self.text, self.models[0]
        begin = self.networks[0](lambda network: start(section, network, self.tokenizer, text.batches, model))
        if section.method == "soft-prompt":
            return SoftPromptLoss(self.networks, begin, bos_id=self.bos_id)
        return KvPrefixLoss(self.networks, begin)

    def perplexity(self, module: PromptedLoss, *, prompted: bool = True) -> float:
        """Of the text that chooses the prompt; over several models the geometric mean."""
        windows_NT, batch_size = self.text.selection_NT, self.section.batch_size
        prefixes = [
            module.prefix(which) if prompted else self._bos_alone(one) for which, one in enumerate(self.networks)
        ]
        values = [
            one(
                lambda network, prefix=prefix: perplexity(network, windows_NT, prefix=prefix, batch_size=batch_size)
            ).value()
            for one, prefix in zip(self.networks, prefixes, strict=True)
        ]
        return math.exp(sum(map(math.log, values)) / len(values))

    @property
    def bos_id(self) -> int | None:
        return bos_of(self.tokenizer) if self.section.bos else None

    def _bos_alone(self, network: Frozen) -> Cache | None:
        bos_id = self.bos_id
        return None if bos_id is None else network(lambda model: bos_prefix(model, bos_id))

    def metadata(self, state: Progressing) -> PromptMetadata:
        compressions = [_compression(model) for model in self.models]
        return PromptMetadata(
            kind=self.section.method,
            layout="bos-prompt-text" if self.section.bos else "prompt-text",
            bos_token_id=self.bos_id,
            base_model=_base_name(self.models[0]),
            tokenizer_fingerprint=fingerprint_tokenizer(self.tokenizer),
            embedding_fingerprint=self.table,
            compression=json.dumps(compressions[0] if len(self.models) == 1 else compressions),
            data=json.dumps(self.text.data | ({} if self.earlier is None else {"init": self.earlier})),
            steps=state.best_step,
            dtype=self.dtype,
            seed=self.section.seed,
            validation_perplexity=state.best_perplexity,
        )

    @property
    def dtype(self) -> str:
        return str(self.networks[0].model.dtype).removeprefix("torch.")


@contextlib.contextmanager
def _left_nowhere_to_go_on(space: Workspace | None, state: Path) -> Iterator[None]:
    """Where learning diverges, or comes to tokens that the model does not know, the same command would do so again;
    what is at fault before anything was learned is to be mended, and leaves nothing.
    """
    try:
        yield
    except CtpError as error:
        again = isinstance(error, NotFiniteError | UnknownTokenError)
        if space is not None and (again or not state.exists()):
            space.discard()
        raise


def _save(
    space: Workspace, job: _Job, learned: Tensor, state: Progressing, report: LearnReport, *, device: str
) -> None:
    section = job.section
    prompt_type = Prompt if section.method == "soft-prompt" else KvPrefix
    save_prompt(space.path / PROMPT_FILE, prompt_type(learned, job.metadata(state)))
    names = ", ".join(one.name for one in job.models)
    learning_figure(state.history, space.path / "learning.png", title=f"Learning a prompt on {names}")
    space.finish(
        {
            "recipe": {
                "models": [str(one.path) for one in job.models],
                "learn": section.model_dump() | {"steps": state.planned_steps},
            },
            "inputs": space.identity,
            "seed": section.seed,
            "device": device,
            "dtype": job.dtype,
            "weight_bytes_per_process": sum(one.held_bytes() for one in job.networks),
            "base_model": _base_name(job.models[0]),
            "results": {
                "unprompted_validation_perplexity": report.unprompted_perplexity,
                "best_validation_perplexity": state.best_perplexity,
                "best_step": state.best_step,
                "steps": state.step,
                "planned_steps": state.planned_steps,
                "learning_rate": state.learning_rate,
                "learning_seconds": round(state.seconds, 1),
                "history": state.history,
            },
        },
        scratch=(_STATE, FILES),
    )


def _check_before_reading(
    section: LearnSection,
    models: Sequence[ResolvedModel],
    teacher: ResolvedModel | None,
    output: Path,
    device: str,
    force: bool,
) -> None:
    read = [*models, teacher] if teacher is not None else models
    refuse_existing(output, *(one.path for one in read), earlier_file(section), force=force)
    for one in models:
        manifest_of(one.path)  # a damaged one is refused before anything is learned
    if section.mixed_precision == "fp16" and device == "cpu":
        raise RecipeError("learn.mixed_precision: fp16 needs a GPU", hint="use bf16 or no on a CPU")


def _refuse_stitched(models: Sequence[ResolvedModel]) -> None:
    for model in models:
        if carries_prompt(load_tokenizer(model.path)):
            raise InputError(
                f"{model.path} already carries a prompt",
                hint="learn on the checkpoint without it (ctp unstitch); --init starts from an earlier prompt",
            )


def _check_teacher(teacher: ResolvedModel | None, model: ResolvedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    if teacher is not None and fingerprint_tokenizer(load_tokenizer(teacher.path)) != fingerprint_tokenizer(tokenizer):
        raise InputError(
            f"{teacher.path} has another tokenizer than {model.path}", hint="a teacher reads the same tokens"
        )


def _identity(
    section: LearnSection, models: Sequence[ResolvedModel], teacher: ResolvedModel | None, text: LearningText
) -> dict[str, Any]:
    """By which unfinished work is known again."""
    earlier = earlier_file(section)
    return {
        "models": [{"name": one.name, "sha256": folder_fingerprint(one.path)} for one in models],
        "teacher": None if teacher is None else folder_fingerprint(teacher.path),
        "init": None if earlier is None else file_fingerprint(earlier),
        "learn": section.model_dump(exclude={"text", "validation", "tracker", "shard"}),
        **text.identity,
    }


def _check_can_be_shared(section: LearnSection, processes: int) -> None:
    if section.batch_size % processes:
        raise RecipeError(
            f"learn.batch_size: {section.batch_size} sequences cannot be shared evenly by {processes} processes",
            hint="choose a multiple",
        )
    if section.shard and processes == 1:
        raise RecipeError(
            "learn.shard: this is one process, which has to hold the whole model",
            hint="start several: torchrun --nproc-per-node 2 -m ctp_cli learn ... --shard",
        )


def _load_all(
    section: LearnSection, models: Sequence[ResolvedModel], dtype: str, device: str, progress: Progress
) -> list[Frozen]:
    if dtype != section.dtype and dtype != "checkpoint":
        progress.say(f"weights are held in {dtype}, which is faster on this processor; --dtype checkpoint: as stored")
    held = None if dtype == "checkpoint" else getattr(torch, dtype)
    networks = [_load(one.path, held, device, section) for one in models]
    if section.shard:
        part, whole = (sum(size(one) for one in networks) / 1e9 for size in (Frozen.held_bytes, Frozen.whole_bytes))
        progress.say(f"weights are sharded: {part:.3f} of {whole:.3f} GB in this process")
    return networks


def _load(path: Path, dtype: torch.dtype | None, device: str, section: LearnSection) -> Frozen:
    if section.shard:
        return load_sharded(path, dtype=dtype, device=device)
    network = load_model(path, dtype=dtype, device=device, packed=section.packed)
    if section.gradient_checkpointing:
        checkpoint_blocks(network)
    return Frozen(network)


def _dtype(
    section: LearnSection,
    models: Sequence[ResolvedModel],
    device: str,
    output: Path,
    identity: Mapping[str, Any],
    shards: int,
) -> str:
    """The section's, auto made definite; work that goes on keeps what was chosen when it began, whatever is free now.

    Which of the two it is shows in the prompt's bits.
    """
    if section.dtype != "auto":
        return section.dtype
    file = unfinished(output) / IDENTITY
    before = read_json(file) if file.exists() else None
    held_in = before.get("held_in") if isinstance(before, dict) else None
    known = held_in in get_args(LearnSection.model_fields["dtype"].annotation)
    if known and before == json.loads(json.dumps({**identity, "held_in": held_in}, default=str)):
        return str(held_in)
    in_16_bits = section.packed or section.mixed_precision != "no"  # packed: memory is what counts
    wider = not in_16_bits and wider_is_faster(models, device=device, shards=shards)
    return "float32" if wider else "checkpoint"


def _accelerator(section: LearnSection, device: str, output: Path) -> Accelerator:
    if section.tracker is not None:
        known = [str(tracker) for tracker in LoggerType.list() if str(tracker) != "all"]
        if section.tracker not in known:
            raise RecipeError(f"learn.tracker: {section.tracker} is unknown", hint=f"use one of {', '.join(known)}")
        if section.tracker not in [str(tracker) for tracker in get_available_trackers()]:
            raise RecipeError(f"learn.tracker: {section.tracker} is not installed", hint="install it with pip")
    logs = ProjectConfiguration(logging_dir=str(unfinished(output) / "logs"))
    return Accelerator(
        cpu=device == "cpu",
        mixed_precision=section.mixed_precision,
        log_with=section.tracker,
        project_config=logs,
    )


def _teacher(job: _Job, model: ResolvedModel, folder: Path, device: str) -> Teacher:
    section = job.section
    return Teacher(
        lambda: _load(model.path, None, device, section.model_copy(update={"packed": False})),
        folder,
        section.teacher_share,
        section.teacher_tokens,
        section.shard,
        job.bos_id,
        job.networks[0].model.get_output_embeddings().weight.shape[0],
    )


def _rates(section: LearnSection) -> tuple[float, ...]:
    usual = _LEARNING_RATES[section.method]
    if section.learning_rate == "auto":
        return tuple(usual * factor for factor in (1.0, 0.3, 3.0))
    return (section.learning_rate or usual,)


def _settings(section: LearnSection) -> LearningSettings:
    return LearningSettings(
        steps=section.steps,
        max_seconds=_DEFAULT_SECONDS if section.steps is None and section.max_time is None else section.max_time,
        learning_rates=_rates(section),
        **section.model_dump(
            include={
                "batch_size",
                "warmup_share",
                "gradient_clip",
                "weight_decay",
                "validate_every",
                "patience",
                "seed",
            }
        ),
    )


def _manifest(model: ResolvedModel) -> dict[str, Any]:
    return manifest_of(model.path) or {}


def _base_name(model: ResolvedModel) -> str:
    return str(_manifest(model).get("base_model") or model.name)


def _compression(model: ResolvedModel) -> dict[str, Any] | None:
    """What the checkpoint says about its compression; None for an uncompressed model."""
    recipe = _manifest(model).get("recipe")
    return recipe.get("compress") if isinstance(recipe, dict) else None


def _report(path: Path, state: Progressing, unprompted: float) -> LearnReport:
    return LearnReport(
        path=path,
        prompt_file=path / PROMPT_FILE,
        steps=state.step,
        best_step=state.best_step,
        start_perplexity=state.history[0][1],
        best_perplexity=state.best_perplexity,
        unprompted_perplexity=unprompted,
        seconds=state.seconds,
        history=tuple(state.history),
    )
