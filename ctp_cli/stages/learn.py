"""Learn a prompt on a checkpoint and save it with everything it came from."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ctp_cli.artifact import folder_fingerprint, manifest_of, refuse_existing, workspace
from ctp_cli.benchmark.figures import learning_figure
from ctp_cli.data.sources import Text, known_names, load_text
from ctp_cli.data.windows import token_ids, windows
from ctp_cli.errors import InputError, RecipeError
from ctp_cli.evaluation.perplexity import perplexity
from ctp_cli.models.loading import decoder_embedding, load_model, load_tokenizer
from ctp_cli.models.resolve import ResolvedModel
from ctp_cli.progress import SILENT, Progress
from ctp_cli.prompts.file import (
    PROMPT_FILE,
    Prompt,
    PromptMetadata,
    fingerprint_embedding,
    fingerprint_tokenizer,
    save_prompt,
)
from ctp_cli.prompts.training import LearningSettings, Progressing, learn, random_rows
from ctp_cli.recipe import LearnSection
from ctp_cli.stages.compress import default_text

KIND = "prompt"
_STATE = "state.safetensors"
_HELD_OUT = 0.1
_DEFAULT_SECONDS = 1800.0


@dataclass(frozen=True)
class LearnReport:
    """The prompt file and how validation perplexity went, from the random start to the best."""

    path: Path
    prompt_file: Path
    steps: int
    best_step: int
    start_perplexity: float
    best_perplexity: float
    unprompted_perplexity: float
    seconds: float
    history: tuple[tuple[int, float], ...]


def learn_prompt(
    section: LearnSection,
    *,
    model: ResolvedModel,
    output: Path,
    device: str = "cpu",
    force: bool = False,
    progress: Progress = SILENT,
) -> LearnReport:
    """Raises CtpError kinds for what the user can mend; unfinished work is kept and gone on from."""
    refuse_existing(output, force=force, reads=model.path)
    if section.mixed_precision == "fp16" and device == "cpu":
        raise RecipeError("learn.mixed_precision: fp16 needs a GPU", hint="use bf16 or no on a CPU")
    tokenizer = load_tokenizer(model.path)
    text, validation = _texts(section, model)
    ids_T = token_ids(text, tokenizer)
    windows(ids_T, section.seqlen, text=text, at_least=section.batch_size + 1)
    selection_NT = windows(
        token_ids(validation, tokenizer),
        section.seqlen,
        most=section.validation_windows,
        text=validation,
        at_least=2,
    )
    identity = {
        "model": {"name": model.name, "sha256": folder_fingerprint(model.path)},
        "learn": section.model_dump(exclude={"text", "validation"}),
        "text": {"source": text.source, "sha256": text.sha256},
        "validation": {"source": validation.source, "sha256": validation.sha256},
    }
    accelerator = Accelerator(cpu=device == "cpu", mixed_precision=section.mixed_precision)
    if accelerator.num_processes > 1:
        raise RecipeError("learn works in one process so far", hint="start it without accelerate launch")
    network = load_model(model.path, device=device)
    with workspace(output, kind=KIND, identity=identity, force=force) as space:
        if space.resumed and (space.path / _STATE).exists():
            progress.say(f"going on with the unfinished work in {space.path}")

        def validate(prompt_PD: Tensor | None) -> float:
            batch = section.batch_size
            return perplexity(network, selection_NT, prompt_PD=prompt_PD, batch_size=batch).value()

        unprompted = validate(None)
        progress.say(f"validation perplexity without a prompt: {unprompted:.3f}")
        state = learn(
            network,
            ids_T,
            _start(section, network, tokenizer),
            seqlen=section.seqlen,
            settings=_settings(section),
            validate=validate,
            accelerator=accelerator,
            state_path=space.path / _STATE,
            progress=progress,
        )
        _save(space.path, section, model, network, tokenizer, text, validation, state)
        report = _report(space.output, state, unprompted)
        space.finish(
            {
                "recipe": {
                    "model": str(model.path),
                    "learn": section.model_dump() | {"steps": state.planned_steps},
                },
                "inputs": identity,
                "seed": section.seed,
                "device": str(accelerator.device),
                "base_model": _base_name(model),
                "results": {
                    "unprompted_validation_perplexity": unprompted,
                    "best_validation_perplexity": state.best_perplexity,
                    "best_step": state.best_step,
                    "steps": state.step,
                    "planned_steps": state.planned_steps,
                    "learning_seconds": round(state.seconds, 1),
                    "history": state.history,
                },
            },
            scratch=(_STATE,),
        )
    return report


def _texts(section: LearnSection, model: ResolvedModel) -> tuple[Text, Text]:
    """Training and selection text. A local file without a selection text of its own gives up its last tenth."""
    spec = section.text or default_text(model)
    text = load_text(spec, default_part="train")
    if section.validation is not None:
        validation = load_text(section.validation, default_part="validation")
    elif spec.split(":")[0] in known_names():
        validation = load_text(spec.split(":")[0], default_part="validation")
    else:
        cut = int(len(text.content) * (1 - _HELD_OUT))
        validation = Text(text.label, f"{text.source} (last tenth)", text.content[cut:])
        text = Text(text.label, f"{text.source} (first nine tenths)", text.content[:cut])
    if text.sha256 == validation.sha256:
        raise InputError(
            f"learn.validation is the text learned from ({text.source})",
            hint="choose the prompt on other text",
        )
    return text, validation


def _whole(section: LearnSection, model: ResolvedModel) -> Text:
    """The text as given, before a part of it was set aside: `eval` warns where it is reported on."""
    return load_text(section.text or default_text(model), default_part="train")


def _start(section: LearnSection, network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    special = set(tokenizer.all_special_ids)
    known = min(len(tokenizer), decoder_embedding(network).num_embeddings)
    usable = torch.tensor([i for i in range(known) if i not in special])
    generator = torch.Generator().manual_seed(section.seed)
    return random_rows(decoder_embedding(network), section.tokens, usable, generator).cpu()


def _settings(section: LearnSection) -> LearningSettings:
    return LearningSettings(
        steps=section.steps,
        max_seconds=_DEFAULT_SECONDS if section.steps is None and section.max_time is None else section.max_time,
        **section.model_dump(
            include={
                "batch_size",
                "learning_rate",
                "warmup_share",
                "gradient_clip",
                "weight_decay",
                "validate_every",
                "patience",
                "seed",
            }
        ),
    )


def _save(
    folder: Path,
    section: LearnSection,
    model: ResolvedModel,
    network: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: Text,
    validation: Text,
    state: Progressing,
) -> None:
    metadata = PromptMetadata(
        base_model=_base_name(model),
        tokenizer_fingerprint=fingerprint_tokenizer(tokenizer),
        embedding_fingerprint=fingerprint_embedding(decoder_embedding(network).weight),
        compression=json.dumps(_compression(model)),
        data=json.dumps(
            {
                "text": text.source,
                "text_sha256": text.sha256,
                "file_sha256": _whole(section, model).sha256,
                "validation": validation.source,
                "validation_sha256": validation.sha256,
            }
        ),
        steps=state.best_step,
        seed=section.seed,
        validation_perplexity=state.best_perplexity,
    )
    save_prompt(folder / PROMPT_FILE, Prompt(state.best_PD.float(), metadata))
    learning_figure(state.history, folder / "learning.png", title=f"Learning a prompt on {model.name}")


def _manifest(model: ResolvedModel) -> dict[str, Any]:
    return manifest_of(model.path) or {}


def _base_name(model: ResolvedModel) -> str:
    return str(_manifest(model).get("base_model") or model.name)


def _compression(model: ResolvedModel) -> dict[str, Any] | None:
    """What the checkpoint says about its compression; None for an uncompressed model."""
    section: dict[str, Any] | None = _manifest(model).get("recipe", {}).get("compress")
    return section


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
