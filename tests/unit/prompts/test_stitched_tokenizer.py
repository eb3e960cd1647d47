"""Every text and chat begins with the prompt's tokens exactly once, whatever the tokenizer did before."""

import json

import pytest
from tiny_models import CHAT_TEMPLATE, VOCAB_SIZE, tiny_model, tiny_tokenizer
from tokenizers import processors
from transformers import AutoTokenizer, GPTNeoXTokenizer

from ctp_cli.errors import InputError
from ctp_cli.prompts.vocab import check_saved_tokenizer, extend_tokenizer, save_tokenizer, token_names

IDS = [VOCAB_SIZE, VOCAB_SIZE + 1, VOCAB_SIZE + 2]
TOKENS = "".join(token_names(3))
CHAT = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "ho"},
    {"role": "user", "content": "now"},
]
BYTE_LEVEL = processors.ByteLevel(trim_offsets=False)
BOS = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B:1", special_tokens=[("<s>", 1)])
BOS_EOS = processors.TemplateProcessing(
    single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=[("<s>", 1), ("</s>", 2)]
)


def _stitch(tokenizer, folder, layout="prompt-text", family="llama"):
    """Beside a config.json, as AutoTokenizer needs it."""
    tiny_model(family, folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).unlink()
    stitched = extend_tokenizer(tokenizer, 3, layout=layout)
    save_tokenizer(stitched, folder, model_max_length=512)
    check_saved_tokenizer(stitched, tokenizer, folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("layout", ["prompt-text", "bos-prompt-text"])
@pytest.mark.parametrize(
    ("existing", "tail"),
    [
        (None, []),
        (BYTE_LEVEL, []),
        (BOS, []),
        (BOS_EOS, [2]),
        (processors.Sequence([BYTE_LEVEL, BOS_EOS]), [2]),
    ],
)
def test_the_post_processor_puts_the_prompt_before_the_text(existing, tail, layout, tmp_path):
    tokenizer = tiny_tokenizer(bos=False)
    if existing is None:
        content = json.loads(tokenizer.backend_tokenizer.to_str())
        content["post_processor"] = None
        tokenizer._tokenizer = tokenizer.backend_tokenizer.from_str(json.dumps(content))
    else:
        tokenizer.backend_tokenizer.post_processor = existing
    loaded = _stitch(tokenizer, tmp_path, layout)
    head = [1, *IDS] if layout == "bos-prompt-text" else IDS
    for text in ("Hello world", " two  spaces", "é\n", ""):
        bare = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert loaded(text)["input_ids"] == head + bare + tail
        assert loaded(text, add_special_tokens=False)["input_ids"] == bare
        assert loaded.decode(loaded(text)["input_ids"], skip_special_tokens=True) == text
    pair = loaded("Hello", "world")["input_ids"]
    assert pair[: len(head)] == head
    assert [pair.count(i) for i in IDS] == [1, 1, 1]


def test_offsets_still_point_into_the_text(tmp_path):
    tokenizer = tiny_tokenizer(bos=True)
    loaded = _stitch(tokenizer, tmp_path)
    text = "Hello world"
    before = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    after = loaded(text, return_offsets_mapping=True)["offset_mapping"]
    assert after == [(0, 0)] * 3 + before[1:]


def test_padding_and_truncation_of_the_moment_are_not_saved(tmp_path):
    tokenizer = tiny_tokenizer(bos=False)
    tokenizer(["a", "b c d e f"], padding=True, truncation=True, max_length=4)
    _stitch(tokenizer, tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    assert content["padding"] is None
    assert content["truncation"] is None


TEMPLATES = {
    "variable": CHAT_TEMPLATE,
    "none": CHAT_TEMPLATE.removeprefix("{{ bos_token }}"),
    "literal": CHAT_TEMPLATE.replace("{{ bos_token }}", "<s>"),
    "every turn": "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[I]' + m['content'] }}"
    "{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}\n",
    "blocks": "{%- if messages %}\n{{- bos_token }}\n{%- endif %}\n"
    "{% for m in messages %}{% generation %}{{ m['content'] }}{% endgeneration %}{% endfor %}",
    "newline first": "\n{% for m in messages %}{{ m['content'] }}{% endfor %}",
    # as in ChatML models whose BOS begins every turn: that is format, not a BOS
    "ChatML": "{% for m in messages %}<s>{{ m['role'] + '\n' + m['content'] }}</s>\n{% endfor %}",
}
NO_BOS = {"none", "newline first", "ChatML"}


@pytest.mark.parametrize("layout", ["prompt-text", "bos-prompt-text"])
@pytest.mark.parametrize("kind", TEMPLATES)
def test_chats_begin_with_the_prompt_and_go_on_as_before(kind, layout, tmp_path):
    tokenizer = tiny_tokenizer(bos=True)
    tokenizer.chat_template = TEMPLATES[kind]
    before = tokenizer.apply_chat_template(CHAT, tokenize=False)
    loaded = _stitch(tokenizer, tmp_path, layout)
    body = before if kind in NO_BOS else before.removeprefix("<s>")
    head = "<s>" + TOKENS if layout == "bos-prompt-text" else TOKENS
    assert loaded.apply_chat_template(CHAT, tokenize=False) == head + body
    ids = loaded.apply_chat_template(CHAT, return_dict=False)
    assert ids == loaded(head + body, add_special_tokens=False)["input_ids"]
    assert [ids.count(i) for i in IDS] == [1, 1, 1]


def test_named_chat_templates_all_carry_the_prompt(tmp_path):
    tokenizer = tiny_tokenizer(bos=False)
    tokenizer.chat_template = {"default": CHAT_TEMPLATE, "tool_use": "{{ bos_token }}tools"}
    loaded = _stitch(tokenizer, tmp_path)
    for name in ("default", "tool_use"):
        text = loaded.apply_chat_template(CHAT, tokenize=False, chat_template=name)
        assert text.startswith(TOKENS)
        assert "<s>" not in text


def test_assistant_masks_still_work(tmp_path):
    tokenizer = tiny_tokenizer(bos=False)
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}"
        "{% generation %}{{ m['content'] }}{% endgeneration %}"
        "{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
    )
    settings = {"return_dict": True, "return_assistant_tokens_mask": True}
    before = tokenizer.apply_chat_template(CHAT, **settings)["assistant_masks"]
    after = _stitch(tokenizer, tmp_path).apply_chat_template(CHAT, **settings)["assistant_masks"]
    assert after == [0, 0, 0, *before[1:]]


@pytest.mark.parametrize("family", ["gpt_neox", "qwen2", "llama", "gemma"])
def test_model_specific_classes_do_not_drop_the_prompt(family, tmp_path):
    backend = json.loads(tiny_tokenizer(bos=False).backend_tokenizer.to_str())["model"]
    tokenizer = GPTNeoXTokenizer(vocab=backend["vocab"], merges=[tuple(m) for m in backend["merges"]])
    loaded = _stitch(tokenizer, tmp_path, family=family)
    count = len(tokenizer)  # the class adds tokens of its own
    assert loaded("Hello")["input_ids"][:3] == [count, count + 1, count + 2]
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_a_tokenizer_that_loses_the_prompt_on_loading_is_found(tmp_path):
    tokenizer = tiny_tokenizer(bos=False)
    tiny_model("llama", tmp_path)
    stitched = extend_tokenizer(tokenizer, 3, layout="prompt-text")
    save_tokenizer(stitched, tmp_path, model_max_length=None)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["post_processor"] = None
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="before a text"):
        check_saved_tokenizer(stitched, tokenizer, tmp_path)


def test_a_tokenizer_without_bos_cannot_carry_a_prompt_after_bos():
    tokenizer = tiny_tokenizer(bos=False)
    tokenizer.bos_token = None
    with pytest.raises(InputError, match="BOS"):
        extend_tokenizer(tokenizer, 3, layout="bos-prompt-text")


def test_a_post_processor_of_another_kind_is_refused():
    tokenizer = tiny_tokenizer(bos=False)
    tokenizer.backend_tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 1))
    with pytest.raises(InputError, match="RobertaProcessing"):
        extend_tokenizer(tokenizer, 3, layout="prompt-text")


def test_the_given_tokenizer_is_left_as_it_was():
    tokenizer = tiny_tokenizer(bos=True)
    before = tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template
    extend_tokenizer(tokenizer, 3, layout="prompt-text")
    assert (tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template) == before
