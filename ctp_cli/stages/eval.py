"""Perplexity of several checkpoints and prompts on several texts, in one table."""

import contextlib
import itertools
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache

from ctp_cli.artifact import Workspace, file_fingerprint, folder_fingerprint, manifest_of, refuse_existing, workspace
from ctp_cli.data.sources import Text, load_text
from ctp_cli.data.windows import bos_of, token_ids, windows
from ctp_cli.errors import GateFailedError, InputError
from ctp_cli.evaluation.perplexity import Perplexity, compare, perplexity
from ctp_cli.files import write_json
from ctp_cli.models.loading import decoder_embedding, load_config, load_model, load_tokenizer, packed_format
from ctp_cli.models.resolve import ResolvedModel
from ctp_cli.progress import SILENT, Progress
from ctp_cli.prompts.file import PROMPT_FILE, AnyPrompt, check_fits, data_of, load_prompt, parsed_data
from ctp_cli.prompts.prefix import behind_bos, bos_before, bos_prefix, prefix_of, rows_prefix
from ctp_cli.prompts.vocab import token_names
from ctp_cli.recipe import EvalSection
from ctp_cli.stages.compress import default_text

log = logging.getLogger(__name__)

KIND = "evaluation"
OTHER_TOKENS = "other tokens: not comparable"


@dataclass(frozen=True)
class Target:
    """One row of the table: a checkpoint, and a prompt file or None. `label` must be unique."""

    label: str
    model: ResolvedModel
    prompt: Path | None = None


@dataclass(frozen=True)
class Score:
    """One cell. `against_first` compares with the first target on the same windows, None for the first itself."""

    label: str
    text: str
    perplexity: float
    standard_error: float
    against_first: str | None
    details: dict[str, Any]


@dataclass(frozen=True)
class EvalReport:
    """Scores in the order of targets, then texts; `output` is None where nothing was to be saved."""

    scores: tuple[Score, ...]
    convention: str
    output: Path | None
    warnings: tuple[str, ...]

    def value(self, label: str, text: str) -> tuple[float, float]:
        score = next(s for s in self.scores if s.label == label and s.text == text)
        return score.perplexity, score.standard_error

    def texts(self) -> list[str]:
        return list(dict.fromkeys(score.text for score in self.scores))

    def labels(self) -> list[str]:
        return list(dict.fromkeys(score.label for score in self.scores))


def evaluate(
    section: EvalSection,
    *,
    targets: Sequence[Target],
    output: Path | None = None,
    device: str = "cpu",
    force: bool = False,
    progress: Progress = SILENT,
) -> EvalReport:
    """Raises CtpError kinds for models, prompts or texts that cannot be used; nothing is left behind then."""
    if output is not None:
        refuse_existing(output, *(path for one in targets for path in (one.model.path, one.prompt)), force=force)
    specs = section.ppl or (f"{default_text(targets[0].model)}:test",)
    texts = [load_text(spec, default_part="test") for spec in specs]
    if len({text.label for text in texts}) < len(texts):
        raise InputError("two texts have the same label", hint="write LABEL=FILE[:COLUMN] to tell them apart")
    prompts = {target.label: _load_prompt(section, target) for target in targets}
    tokens = {target.label: _windows(section, target, texts) for target in targets}
    warnings = _overlaps({target.label: _prompt_data(target, prompts[target.label]) for target in targets}, texts)
    if section.packed and all(packed_format(load_config(t.model.path), t.model.path) is None for t in targets):
        progress.say("no effect: packed, since no model here is quantized")
    identity = {"eval": section.model_dump(), "inputs": _inputs(targets)}
    base_model = (manifest_of(targets[0].model.path) or {}).get("base_model", targets[0].model.name)
    place = contextlib.nullcontext() if output is None else workspace(output, kind=KIND, identity=identity, force=force)
    with place as space:  # an output that cannot be made is refused before the work, not after it
        results = _measure(section, targets, prompts, tokens, device, progress)
        report = _report(section, targets, texts, results, tokens, output, warnings)
        if space is not None:
            _save(section, base_model, report, space)
    return report


def check_gate(section: EvalSection, report: EvalReport) -> None:
    """Raises GateFailedError if any perplexity is above `max_ppl`."""
    over = [s for s in report.scores if section.max_ppl is not None and not s.perplexity <= section.max_ppl]
    if over:
        lines = ", ".join(f"{s.label} on {s.text}: {s.perplexity:.2f}" for s in over)
        raise GateFailedError(f"perplexity above max_ppl {section.max_ppl:g}: {lines}")


def _load_prompt(section: EvalSection, target: Target) -> AnyPrompt | None:
    if target.prompt is None:
        return None
    prompt = load_prompt(target.prompt)
    _check_bos(section, target, behind=prompt.metadata.layout == "bos-prompt-text")
    return prompt


def _check_bos(section: EvalSection, target: Target, *, behind: bool) -> None:
    if behind != section.bos:
        raise InputError(
            f"{target.label}: its prompt was learned {'behind' if behind else 'without'} a BOS",
            hint="use --bos, then all targets have one" if behind else "leave out --bos",
        )


def _windows(section: EvalSection, target: Target, texts: Sequence[Text]) -> dict[str, Tensor]:
    tokenizer = load_tokenizer(target.model.path)
    most = None if section.windows is None else section.windows * section.seqlen
    return {
        text.label: windows(
            token_ids(text, tokenizer, most=most), section.seqlen, most=section.windows, text=text, at_least=2
        )
        for text in texts
    }


def _measure(
    section: EvalSection,
    targets: Sequence[Target],
    prompts: dict[str, AnyPrompt | None],
    tokens: dict[str, dict[str, Tensor]],
    device: str,
    progress: Progress,
) -> dict[tuple[str, str], Perplexity]:
    results: dict[tuple[str, str], Perplexity] = {}
    for path in dict.fromkeys(target.model.path for target in targets):
        packed = section.packed and packed_format(load_config(path), path) is not None
        network = load_model(path, device=device, packed=packed)
        on_it = [target for target in targets if target.model.path == path]
        # all prompts are checked before the first figure is computed
        prefixes = {target.label: _prefix(section, target, prompts[target.label], network) for target in on_it}
        for target in on_it:
            for label, windows_NT in tokens[target.label].items():
                result = perplexity(
                    network,
                    windows_NT,
                    prefix=prefixes[target.label].cache,
                    batch_size=section.batch_size,
                    progress=progress,
                )
                results[target.label, label] = replace(result, prompt_tokens=prefixes[target.label].prompt_tokens)
                progress.say(f"{target.label}: perplexity {result.value():.3f} on {label}")
        del network, prefixes  # let go of one model before the next one is read
    return results


class _Prefix(NamedTuple):
    """What stands before every window; a BOS is no prompt token, and no convention counts it."""

    cache: Cache | None
    prompt_tokens: int


def _prefix(section: EvalSection, target: Target, prompt: AnyPrompt | None, network: PreTrainedModel) -> _Prefix:
    """A given prompt, that which is stitched into the checkpoint, or a BOS."""
    path = str(target.model.path)
    tokenizer = load_tokenizer(target.model.path)
    stitched, behind = _stitched(network, tokenizer)
    if prompt is not None:
        if stitched is not None:
            raise InputError(f"{path} already carries a prompt", hint="evaluate it without --prompt")
        table = decoder_embedding(network).weight
        for line in check_fits(prompt, tokenizer=tokenizer, embedding=table, model=path):
            log.warning("%s", line)
        behind = prompt.metadata.layout == "bos-prompt-text"
    if stitched is not None:
        _check_bos(section, target, behind=behind)
    if prompt is not None:
        cache = prefix_of(prompt, network, name=path, bos_id=bos_before(prompt, tokenizer))
    elif stitched is not None:
        cache = rows_prefix(behind_bos(stitched, network, bos_of(tokenizer) if behind else None), network)
    elif section.bos:
        return _Prefix(bos_prefix(network, bos_of(tokenizer)), 0)
    else:
        return _Prefix(None, 0)
    return _Prefix(cache, cache.get_seq_length() - behind)


def _stitched(network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[Tensor | None, bool]:
    """The rows of a prompt in the vocabulary, and whether it stands behind a BOS."""
    vocabulary = tokenizer.get_vocab()
    count = sum(1 for name in vocabulary if name.startswith("<|ctp_"))
    if count == 0:
        return None, False
    ids = [vocabulary[name] for name in token_names(count)]
    rows: Tensor = decoder_embedding(network)(torch.tensor(ids, device=network.device))
    return rows, tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]


def _prompt_data(target: Target, prompt: AnyPrompt | None) -> dict[str, Any]:
    """What a given prompt, or that which is stitched into the checkpoint, says of its texts."""
    if prompt is not None:
        return data_of(prompt)
    stitched = (manifest_of(target.model.path) or {}).get("prompt")
    return parsed_data(stitched.get("data")) if isinstance(stitched, dict) else {}


def _overlaps(known: dict[str, dict[str, Any]], texts: Sequence[Text]) -> tuple[str, ...]:
    """A figure on text that made or chose the prompt is not a result; say so."""
    warnings = []
    for (label, latest), text in itertools.product(known.items(), texts):
        data: Any = latest
        while isinstance(data, dict):
            how = [
                verb
                for what, verb in (("text", "learned from"), ("validation", "chosen on"), ("file", "learned from"))
                if data.get(f"{what}_sha256") == text.sha256
            ]
            if how:
                warnings.append(f"{label}: its prompt was {how[0]} {text.label}; that figure is not a result")
            elif _begins_alike(data, text):
                warnings.append(
                    f"{label}: its prompt was learned from a text that begins as {text.label} does; that figure is not "
                    "a result"
                )
            data = data.get("init")  # of the prompt that this one was learned from
    return tuple(dict.fromkeys(warnings))


def _begins_alike(data: dict[str, Any], text: Text) -> bool:
    """Whatever its form. Of a text that was streamed, and read whole by nobody, its name may be all that is known."""
    beginnings = data.get("text_beginnings")
    if not isinstance(beginnings, list):
        return False
    return text.beginning in beginnings if beginnings else data.get("text") == text.source


def _report(
    section: EvalSection,
    targets: Sequence[Target],
    texts: Sequence[Text],
    results: dict[tuple[str, str], Perplexity],
    tokens: dict[str, dict[str, Tensor]],
    output: Path | None,
    warnings: tuple[str, ...],
) -> EvalReport:
    scores = []
    for target in targets:
        for text in texts:
            result = results[target.label, text.label]
            first = results[targets[0].label, text.label]
            same = torch.equal(tokens[targets[0].label][text.label], tokens[target.label][text.label])
            scores.append(
                Score(
                    label=target.label,
                    text=text.label,
                    perplexity=result.value(section.convention),
                    standard_error=result.standard_error,
                    against_first=None if target is targets[0] else _against(first, result) if same else OTHER_TOKENS,
                    details={
                        "source": text.source,
                        "sha256": text.sha256,
                        "seqlen": section.seqlen,
                        "windows": result.window_nll_N.numel(),
                        "scored_tokens": result.scored_tokens,
                        "prompt_tokens": result.prompt_tokens,
                        "bos": section.bos,
                        "convention": section.convention,
                        "mean_nll": result.window_nll_N.sum().item() / result.scored_tokens,
                    },
                )
            )
    return EvalReport(tuple(scores), section.convention, output, warnings)


def _against(first: Perplexity, other: Perplexity) -> str:
    difference = compare(first, other)
    if not difference.measurable:
        return "no measurable difference"
    return f"{difference.mean:+.3f} ± {difference.standard_error:.3f} nats/token"


def _inputs(targets: Sequence[Target]) -> list[dict[str, Any]]:
    return [
        {
            "label": target.label,
            "model": {"name": target.model.name, "sha256": folder_fingerprint(target.model.path)},
            "prompt": None if target.prompt is None else file_fingerprint(_prompt_file(target.prompt)),
        }
        for target in targets
    ]


def _save(section: EvalSection, base_model: str, report: EvalReport, space: Workspace) -> None:
    write_json(space.path / "scores.json", document(report))
    space.finish(
        {
            "recipe": {"eval": section.model_dump()},
            "inputs": space.identity["inputs"],
            "base_model": base_model,
            "results": "scores.json",
        }
    )


def _prompt_file(path: Path) -> Path:
    return path / PROMPT_FILE if path.is_dir() else path


def document(report: EvalReport) -> dict[str, Any]:
    """The report as JSON: scores with everything needed to check them."""
    return {
        "convention": report.convention,
        "warnings": list(report.warnings),
        "scores": [
            {
                "label": s.label,
                "text": s.text,
                "perplexity": s.perplexity,
                "standard_error": s.standard_error,
                "against_first": s.against_first,
                **s.details,
            }
            for s in report.scores
        ],
    }
