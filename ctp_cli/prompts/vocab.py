"""Give a tokenizer the prompt's tokens, and make it put them before every text and chat, exactly once."""

import copy
import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from transformers import AddedToken, AutoTokenizer, PreTrainedTokenizerBase

from ctp_cli.errors import InputError
from ctp_cli.prompts.file import Layout

logger = logging.getLogger(__name__)

_KEPT_FILES = {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"}
_PROBE_TEXTS = ("Hello world", "  two\n\nlines, naïve", "")
_QUIET = {"verbose": False}  # where a prompt is longer than the tokenizer's limit: no model reads the probes
_PROBE_CHATS = (
    [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ],
    [{"role": "user", "content": "a"}],
    [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}],
)


@dataclass(frozen=True)
class StitchedTokenizer:
    """A tokenizer's new content, not yet on disk. `token_ids` are the prompt's, in order."""

    tokenizer: PreTrainedTokenizerBase
    backend: dict[str, Any]
    token_ids: tuple[int, ...]
    head_ids: tuple[int, ...]
    """Ids before every text: the prompt's, after the BOS where the layout has one."""
    notes: tuple[str, ...]


def token_names(count: int) -> list[str]:
    return [f"<|ctp_{index}|>" for index in range(count)]


def token_ids(tokenizer: PreTrainedTokenizerBase, names: Sequence[str]) -> tuple[int, ...]:
    ids = tokenizer.convert_tokens_to_ids(list(names))
    assert isinstance(ids, list)
    return tuple(ids)


def carries_prompt(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether it is one of a stitched checkpoint."""
    return token_names(1)[0] in tokenizer.get_vocab()


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, *, layout: Layout) -> None:
    """Raises InputError for a tokenizer that cannot carry a prompt."""
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise InputError(
            f"{type(tokenizer).__name__} is not backed by the tokenizers library: it cannot carry a prompt",
            hint="use --format peft, which leaves the tokenizer alone",
        )
    if carries_prompt(tokenizer):
        raise InputError("this checkpoint already carries a prompt", hint="stitch onto the checkpoint it was made from")
    if layout == "bos-prompt-text" and tokenizer.bos_token_id is None:
        raise InputError("the prompt stands after a BOS token, which this tokenizer does not have")


def extend_tokenizer(tokenizer: PreTrainedTokenizerBase, count: int, *, layout: Layout) -> StitchedTokenizer:
    """Add `count` prompt tokens and put them before every text and chat; `tokenizer` itself is left alone.

    Raises InputError for a tokenizer that cannot carry a prompt.
    """
    check_tokenizer(tokenizer, layout=layout)
    extended = copy.deepcopy(tokenizer)
    names = token_names(count)
    extended.add_tokens([AddedToken(name, special=True, normalized=False) for name in names], special_tokens=True)
    ids = token_ids(extended, names)
    head = [(str(tokenizer.bos_token), int(tokenizer.bos_token_id))] if layout == "bos-prompt-text" else []
    head += zip(names, ids, strict=True)
    backend = json.loads(extended.backend_tokenizer.to_str())
    backend["truncation"] = backend["padding"] = None  # the caller's momentary state, not the tokenizer's
    backend["post_processor"], notes = _prefixed_post_processor(backend["post_processor"], head, tokenizer)
    if extended.chat_template:
        extended.chat_template = _prefixed_chats(tokenizer, names, layout)
    return StitchedTokenizer(extended, backend, ids, tuple(i for _, i in head), tuple(notes))


def _prefixed_post_processor(
    existing: dict[str, Any] | None, head: Sequence[tuple[str, int]], tokenizer: PreTrainedTokenizerBase
) -> tuple[dict[str, Any], list[str]]:
    """The post-processor with `head` in place of whatever stood before the text; everything else stays."""
    parts = [] if existing is None else existing["processors"] if existing["type"] == "Sequence" else [existing]
    kinds = [part["type"] for part in parts]
    if unknown := sorted(set(kinds) - {"ByteLevel", "TemplateProcessing"}):
        raise InputError(
            f"the tokenizer's post-processor {', '.join(unknown)} cannot carry a prompt",
            hint="use --format peft",
        )
    if kinds.count("TemplateProcessing") > 1:
        raise InputError(
            "the tokenizer applies two templates: where the prompt belongs is not clear",
            hint="use --format peft",
        )
    template: dict[str, Any] = next(
        (part for part in parts if part["type"] == "TemplateProcessing"),
        {
            "type": "TemplateProcessing",
            "single": [_text("A", 0)],
            "pair": [_text("A", 0), _text("B", 1)],
            "special_tokens": {},
        },
    )
    pieces = [{"SpecialToken": {"id": name, "type_id": 0}} for name, _ in head]
    dropped = _leading_specials(template["single"])
    changed = {
        **template,
        "single": pieces + template["single"][len(dropped) :],
        "pair": pieces + template["pair"][len(_leading_specials(template["pair"])) :],
        "special_tokens": {
            **template["special_tokens"],
            **{name: {"id": name, "ids": [token_id], "tokens": [name]} for name, token_id in head},
        },
    }
    others = [name for name in dropped if name not in (tokenizer.bos_token, head[0][0])]
    notes = (
        [f"the tokenizer no longer puts {' '.join(others)} before texts: the prompt was learned without"]
        if others
        else []
    )
    rest = [part for part in parts if part["type"] != "TemplateProcessing"]
    return {"type": "Sequence", "processors": [*rest, changed]}, notes


def _text(sequence: str, type_id: int) -> dict[str, Any]:
    return {"Sequence": {"id": sequence, "type_id": type_id}}


def _leading_specials(pieces: Sequence[dict[str, Any]]) -> list[str]:
    names = []
    for piece in pieces:
        if "SpecialToken" not in piece:
            break
        names.append(piece["SpecialToken"]["id"])
    return names


def _prefixed_chats(tokenizer: PreTrainedTokenizerBase, names: Sequence[str], layout: Layout) -> str | dict[str, str]:
    templates = tokenizer.chat_template
    if isinstance(templates, dict):
        return {name: _prefixed_chat(tokenizer, text, names, layout) for name, text in templates.items()}
    assert isinstance(templates, str)
    return _prefixed_chat(tokenizer, templates, names, layout)


def _prefixed_chat(tokenizer: PreTrainedTokenizerBase, template: str, names: Sequence[str], layout: Layout) -> str:
    """A chat template that begins with [BOS and] the prompt; a BOS the template itself began with is dropped.

    The tokens are written in `{{ }}`, after which a leading newline of the template survives (after `{% %}`
    it would not).
    """
    bos = "{{ bos_token }}" if layout == "bos-prompt-text" else ""
    prompt = "{{ '" + "".join(names) + "' }}"
    match _bos_in_chat(tokenizer, template):
        case "none":
            return bos + prompt + template
        case "variable":
            return bos + "{% set bos_token = '' %}" + prompt + template
        case _:
            body = "{% set ctp_body %}{{ '' }}" + template.removesuffix("\n") + "{% endset %}"
            return body + bos + prompt + "{{ ctp_body[(bos_token | length):] }}"


def _bos_in_chat(tokenizer: PreTrainedTokenizerBase, template: str) -> str:
    """How a chat begins with a BOS: 'none', 'variable' (once), 'repeated' (also later, or written literally).

    A literal BOS counts only if it occurs once: in ChatML `<|im_start|>` may be the BOS and begins every
    turn.
    """
    bos = tokenizer.bos_token
    if bos is None:
        return "none"
    marker = "\ufdd0ctp-bos\ufdd0"
    for messages in _PROBE_CHATS:
        try:
            marked = str(
                tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, bos_token=marker)
            )
            plain = str(tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False))
        except Exception as error:  # a template is a foreign program: it may raise anything
            logger.debug("chat template refused a probe: %s", error)
            continue
        if marked.startswith(marker):
            return "variable" if marked.count(marker) == 1 else "repeated"
        return "repeated" if plain.startswith(bos) and plain.count(bos) == 1 else "none"
    return "none"


def save_tokenizer(stitched: StitchedTokenizer, folder: Path, *, model_max_length: int | None) -> None:
    """Write the tokenizer so that every engine loads it with its post-processor.

    `model_max_length` counts all tokens, the prompt's among them; it replaces a missing limit only.
    """
    before = set(folder.iterdir())
    stitched.tokenizer.save_pretrained(folder, legacy_format=False)
    for path in set(folder.iterdir()) - before:
        if path.is_dir() and path.name != "additional_chat_templates":
            shutil.rmtree(path)
        elif path.is_file() and path.name not in _KEPT_FILES:
            path.unlink()  # vocabulary files of slow classes: they know nothing of the prompt and would win
    backend = tokenizers.Tokenizer.from_str(json.dumps(stitched.backend))
    (folder / "tokenizer.json").write_text(backend.to_str(pretty=True), encoding="utf-8")
    config_file = folder / "tokenizer_config.json"
    config = json.loads(config_file.read_text(encoding="utf-8"))
    # model-specific classes rebuild the post-processor, and so do the two keywords
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    for key in ("add_bos_token", "add_eos_token", "auto_map", "added_tokens_decoder", "fix_mistral_regex"):
        config.pop(key, None)
    if model_max_length is not None and config.get("model_max_length", 1e30) > model_max_length:
        config["model_max_length"] = model_max_length
    config_file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def check_saved_tokenizer(stitched: StitchedTokenizer, base: PreTrainedTokenizerBase, folder: Path) -> None:
    """Load the tokenizer as any engine would, beside the saved config.json, and compare.

    Raises InputError if its class drops the prompt: the checkpoint would silently serve without it.
    """
    loaded = AutoTokenizer.from_pretrained(folder)
    problem = None
    names = token_names(len(stitched.token_ids))
    if token_ids(loaded, names) != stitched.token_ids:
        problem = "gives the prompt's tokens other ids"
    for text in _PROBE_TEXTS:
        bare = base(text, add_special_tokens=False, **_QUIET)["input_ids"]
        ids = loaded(text, **_QUIET)["input_ids"]
        if tuple(ids[: len(stitched.head_ids) + len(bare)]) != (*stitched.head_ids, *bare):
            problem = "does not put the prompt before a text"
        if loaded(text, add_special_tokens=False, **_QUIET)["input_ids"] != bare:
            problem = "tokenizes text in another way"
    if isinstance(loaded.chat_template, str) and not _chat_is_prefixed(loaded, stitched):
        problem = "does not put the prompt once before a chat"
    if problem:
        raise InputError(
            f"the tokenizer, loaded again as {type(loaded).__name__}, {problem}",
            hint="this tokenizer class cannot carry a prompt; use --format peft",
        )


def _chat_is_prefixed(loaded: PreTrainedTokenizerBase, stitched: StitchedTokenizer) -> bool:
    for messages in _PROBE_CHATS:
        try:
            ids = loaded.apply_chat_template(messages, return_dict=False, tokenizer_kwargs=_QUIET)
        except Exception as error:  # a template is a foreign program: it may raise anything
            logger.debug("chat template refused a probe: %s", error)
            continue
        head = stitched.head_ids
        return tuple(ids[: len(head)]) == head and not set(ids[len(head) :]) & set(stitched.token_ids)
    return True
