"""The text that a prompt is learned from and the text that chooses it."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ctp_cli.data.batches import Batches, StreamedText, WholeText
from ctp_cli.data.sources import HUB_TEXTS, Text, known_names, load_text, split_spec
from ctp_cli.data.streams import Stream, open_stream
from ctp_cli.data.windows import token_ids, windows
from ctp_cli.errors import InputError
from ctp_cli.models.resolve import ResolvedModel
from ctp_cli.recipe import LearnSection
from ctp_cli.stages.compress import default_text

_HELD_OUT = 0.1


@dataclass(frozen=True)
class LearningText:
    batches: Batches
    selection_NT: Tensor
    """Validation windows (N, seqlen)."""
    identity: dict[str, Any]
    """What is known of both texts, by which unfinished work knows them again."""
    data: dict[str, Any]
    """What the prompt says of them: `eval` warns where a figure would be on one of them."""


def learning_text(section: LearnSection, model: ResolvedModel, tokenizer: PreTrainedTokenizerBase) -> LearningText:
    """Raises InputError for texts that are not there, too short, or the same; NetworkError without the hub."""
    spec = section.text or default_text(model)
    if section.stream:
        return _streamed(section, spec, tokenizer)
    whole = load_text(spec, default_part="train")
    text, validation = _texts(section, spec, whole)
    ids_T = token_ids(text, tokenizer)
    windows(ids_T, section.seqlen, text=text, at_least=section.batch_size + 1)
    data = {
        "text": text.source,
        "text_sha256": text.sha256,
        "file_sha256": whole.sha256,
        "text_beginnings": [whole.beginning],
    }
    return LearningText(
        WholeText(ids_T, section.seqlen, section.batch_size, section.seed),
        _selection(section, validation, tokenizer),
        {"text": {"source": text.source, "sha256": text.sha256}, "validation": _identity(validation)},
        data | {"validation": validation.source, "validation_sha256": validation.sha256},
    )


def _texts(section: LearnSection, spec: str, text: Text) -> tuple[Text, Text]:
    """Training and selection text. A local file without a selection text of its own gives up its last tenth."""
    if section.validation is not None:
        validation = load_text(section.validation, default_part="validation")
    elif (name := split_spec(spec)[1]) in known_names():
        validation = load_text(name, default_part="validation")
    else:
        cut = int(len(text.content) * (1 - _HELD_OUT))
        validation = Text(text.label, f"{text.source} (last tenth)", text.content[cut:])
        text = Text(text.label, f"{text.source} (first nine tenths)", text.content[:cut])
    if text.sha256 == validation.sha256:
        raise _same(text.source)
    return text, validation


def _streamed(section: LearnSection, spec: str, tokenizer: PreTrainedTokenizerBase) -> LearningText:
    stream = open_stream(spec)
    beginnings = stream.beginnings()
    validation, held_out = _beside(section, stream, spec, beginnings, tokenizer)
    batches = StreamedText(
        stream,
        tokenizer,
        seqlen=section.seqlen,
        batch_size=section.batch_size,
        buffer=section.shuffle_buffer,
        seed=section.seed,
        held_out=held_out,
    )
    fingerprint = stream.fingerprint()
    return LearningText(
        batches,
        _selection(section, validation, tokenizer),
        {"text": {"source": stream.source, "fingerprint": fingerprint}, "validation": _identity(validation)},
        {
            "text": stream.source,
            "text_fingerprint": fingerprint,
            "text_beginnings": beginnings,
            "validation": validation.source,
            "validation_sha256": validation.sha256,
        },
    )


def _beside(
    section: LearnSection, stream: Stream, spec: str, beginnings: list[str], tokenizer: PreTrainedTokenizerBase
) -> tuple[Text, int]:
    """The selection text of a stream, and how many pieces of the first file it takes: none where it has its own."""
    if section.validation is not None:
        validation = load_text(section.validation, default_part="validation")
        if split_spec(section.validation)[1:] == split_spec(spec)[1:] or validation.beginning in beginnings:
            raise _same(stream.source)
        return validation, 0
    if (name := split_spec(spec)[1]) in HUB_TEXTS:
        return load_text(name, default_part="validation"), 0
    pieces: list[str] = []
    missing = section.validation_windows * section.seqlen
    for piece in stream.pieces(0):
        pieces.append(piece)
        missing -= len(tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"])
        if missing <= 0:
            break
    return Text("", f"{stream.source} (first {len(pieces)} pieces)", "".join(pieces)), len(pieces)


def _selection(section: LearnSection, validation: Text, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    return windows(
        token_ids(validation, tokenizer),
        section.seqlen,
        most=section.validation_windows,
        text=validation,
        at_least=2,
    )


def _identity(text: Text) -> dict[str, str]:
    return {"source": text.source, "sha256": text.sha256}


def _same(source: str) -> InputError:
    return InputError(
        f"learn.validation is the text learned from ({source})",
        hint="choose the prompt on other text",
    )
