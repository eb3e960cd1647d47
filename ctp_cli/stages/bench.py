"""`ctp bench`: latency and memory of a checkpoint against prompt length, as a table, JSON and a figure."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from ctp_kernels.profiling import (
    LatencyReport,
    PositionsError,
    configurations,
    measure_latency,
    random_prompt,
)
from torch import Tensor
from transformers import PreTrainedModel

from ctp_cli import artifact
from ctp_cli.benchmark import latency
from ctp_cli.benchmark.figures import latency_figure
from ctp_cli.errors import GateFailedError, InputError, RecipeError
from ctp_cli.files import write_json
from ctp_cli.models.devices import resolve_device
from ctp_cli.models.loading import decoder_embedding, load_model, weight_files
from ctp_cli.progress import SILENT, Progress
from ctp_cli.prompts.file import PROMPT_FILE, Prompt, load_soft_prompt
from ctp_cli.recipe import BenchSection

KIND = "benchmark"
_SEED = 0  # of the random text and prompt rows, whose values do not change what is measured


@dataclass(frozen=True)
class BenchReport:
    """The finished artifact, what was measured, and the same as the JSON document in it."""

    output: Path
    latency: LatencyReport
    document: dict[str, Any]


def bench(
    section: BenchSection,
    *,
    model_path: Path,
    prompt_path: Path | None,
    output: Path,
    device: str,
    force: bool,
    progress: Progress = SILENT,
) -> BenchReport:
    """Measure the checkpoint at `model_path` and write `output`: latency.json, latency.png and ctp.json.

    `device` is a torch device, or auto: CUDA where there is one. Prompts are the first rows of the file at
    `prompt_path`, and random token embeddings where it is too short or None. Interrupted work starts over.
    Raises: OutputError if the output exists, InputError for a model or prompt that cannot be used,
    RecipeError if the model has too few positions for what the section asks.
    """
    artifact.refuse_existing(output, model_path, prompt_path, force=force)
    where = resolve_device(device)
    if prompt_path and prompt_path.is_dir():
        prompt_path = prompt_path / PROMPT_FILE
    why = "and bench times prompts of many lengths, which it cuts from rows"
    given = load_soft_prompt(prompt_path, why=why) if prompt_path else None
    inputs = {"model": _input(model_path), "prompt": _input(prompt_path) if prompt_path else None}
    identity = {"bench": section.model_dump(), "device": where, "inputs": inputs}
    with artifact.workspace(output, kind=KIND, identity=identity, force=force) as work:
        progress.say(f"loading {model_path.name}")
        model = load_model(model_path, device=where, packed=section.packed)
        generator = torch.Generator().manual_seed(_SEED)
        longest = max(section.prompt_len, default=0)
        prompt_PD, prompt_source = _prompt_rows(model, given, str(prompt_path), longest, generator)
        progress.say(f"prompt: {prompt_source}")
        report = _measure(model, prompt_PD, section, generator, progress)
        document = {
            "model": model_path.name,
            "prompt": prompt_source,
            # on disk; a quantized checkpoint may be larger once it is loaded
            "checkpoint_bytes": sum(file.stat().st_size for file in set(weight_files(model_path).values())),
            **latency.document(report),
        }
        write_json(work.path / "latency.json", document)
        latency_figure(report, work.path / "latency.png", title=f"Latency of {model_path.name}")
        work.finish(
            {
                "recipe": {"model": str(model_path), "device": where, "bench": section.model_dump()},
                "inputs": inputs,
                "seed": _SEED,
                "prompt": prompt_source,
                "results": "latency.json",
            }
        )
    return BenchReport(output, report, document)


def check_gate(section: BenchSection, report: BenchReport) -> None:
    """Raises GateFailedError if the median time per token of any configuration is above `max_latency_ms`."""
    slowest = latency.highest_per_token_ms(report.latency)
    if section.max_latency_ms is not None and slowest > section.max_latency_ms:
        raise GateFailedError(
            f"time per token {slowest:.2f} ms is above max_latency_ms {section.max_latency_ms:g}",
            hint=f"the results are in {report.output}",
        )


def _measure(
    model: PreTrainedModel,
    prompt_PD: Tensor,
    section: BenchSection,
    generator: torch.Generator,
    progress: Progress,
) -> LatencyReport:
    progress.start("measuring", (section.rounds + 1) * len(configurations(section.prompt_len)))
    try:
        return measure_latency(
            model,
            prompt_PD,
            prompt_lengths=section.prompt_len,
            seqlen=section.seqlen,
            new_tokens=section.new_tokens,
            rounds=section.rounds,
            generator=generator,
            on_run=lambda turn: progress.advance(note=f"{turn.prompt_tokens} prompt tokens"),
        )
    except PositionsError as error:
        raise RecipeError(f"bench: {error}", hint="lower seqlen, prompt_len or new_tokens") from None
    finally:
        progress.finish()


def _prompt_rows(
    model: PreTrainedModel, given: Prompt | None, name: str, length: int, generator: torch.Generator
) -> tuple[Tensor, str]:
    """Prompt rows (at least `length`, D) and a line that says where they come from."""
    if given is None:
        return random_prompt(model, length, generator), "random token embeddings (values do not change latency)"
    rows_PD = given.embeddings
    width = decoder_embedding(model).embedding_dim
    if rows_PD.shape[1] != width:
        raise InputError(
            f"{name}: the prompt is {rows_PD.shape[1]} wide, the model's token embeddings are {width}",
            hint="use a prompt learned on this model or on a compressed copy of it",
        )
    missing = length - len(rows_PD)
    if missing <= 0:
        return rows_PD, f"{name} ({len(rows_PD)} rows)"
    filler_PD = random_prompt(model, missing, generator).to(rows_PD.device, rows_PD.dtype)
    return torch.cat([rows_PD, filler_PD]), f"{name} ({len(rows_PD)} rows), then {missing} random token embeddings"


def _input(path: Path) -> dict[str, str]:
    digest = artifact.folder_fingerprint(path) if path.is_dir() else artifact.file_fingerprint(path)
    return {"path": str(path), "sha256": digest}
