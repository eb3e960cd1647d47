"""Tiny random models of every family the tests compress, prompt and stitch: saved like any checkpoint, made
in moments.

All sizes are multiples of 32, so that quantization groups fit; weights are float32 and wide enough that two
models or two inputs never give the same logits by chance. Nothing is learned: use the trained fixture where
quality counts.
"""

import functools
import pydoc_data.topics
from pathlib import Path
from typing import Any

import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCAB_SIZE = 320
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "[{{ message['role'] }}]{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)

_LLAMA = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
    "tie_word_embeddings": False,
}
_OPT = {
    "hidden_size": 64,
    "word_embed_proj_dim": 64,
    "ffn_dim": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "init_std": 0.1,
    "dropout": 0.0,
}
_GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512, "initializer_range": 0.1}
_NEOX = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}

# family -> (model_type, settings, whether its tokenizer puts a BOS before the text)
FAMILIES: dict[str, tuple[str, dict[str, Any], bool]] = {
    "llama": ("llama", _LLAMA, True),
    "llama_tied_gqa": ("llama", {**_LLAMA, "num_key_value_heads": 2, "tie_word_embeddings": True}, False),
    "mistral": ("mistral", {**_LLAMA, "num_key_value_heads": 2, "sliding_window": None}, True),
    "qwen3": (
        "qwen3",
        {**_LLAMA, "num_key_value_heads": 2, "head_dim": 32, "tie_word_embeddings": True},
        False,
    ),
    "qwen2": ("qwen2", {**_LLAMA, "num_key_value_heads": 2, "tie_word_embeddings": True}, False),
    "gemma": (
        "gemma",
        {**_LLAMA, "num_key_value_heads": 1, "head_dim": 32, "tie_word_embeddings": True},
        True,
    ),
    "gemma3": (
        "gemma3_text",
        {
            **_LLAMA,
            "num_key_value_heads": 1,
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            "tie_word_embeddings": True,
        },
        True,
    ),
    "opt": ("opt", _OPT, True),
    "opt350": ("opt", {**_OPT, "word_embed_proj_dim": 32, "do_layer_norm_before": False}, True),
    "gpt2": ("gpt2", _GPT2, False),
    "phi": ("phi", {**_LLAMA, "partial_rotary_factor": 0.5}, False),
    "gpt_neox": ("gpt_neox", {**_NEOX, "max_position_embeddings": 512, "initializer_range": 0.1}, False),
    "bloom": ("bloom", {"hidden_size": 64, "n_layer": 2, "n_head": 4, "initializer_range": 0.1}, False),
}


def tiny_model(
    family: str,
    folder: Path,
    *,
    vocab_size: int = VOCAB_SIZE,
    bos: bool | None = None,
    chat: bool = True,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    **settings: Any,
) -> Path:
    """Save a random model of the family and its tokenizer into `folder`, and return it.

    `vocab_size` is the number of embedding rows; the tokenizer always has VOCAB_SIZE tokens. `settings` go
    to the model's config. The global random state is left as it was.
    """
    model_type, base_settings, family_bos = FAMILIES[family]
    config: PretrainedConfig = CONFIG_MAPPING[model_type](
        **{
            **base_settings,
            "vocab_size": vocab_size,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
            **settings,
        }
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        # the rows of real tables share a direction, and so do the final hidden states of real models
        table = model.get_input_embeddings().weight
        table.data += 0.25 * torch.randn(table.shape[1])
        # biases and norms start at 0 and 1, where a mistake would not show
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.data += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    tiny_tokenizer(bos=family_bos if bos is None else bos, chat=chat).save_pretrained(folder)
    return folder


def tiny_tokenizer(*, bos: bool, chat: bool = True) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of VOCAB_SIZE tokens; <pad>, <s>, </s> are 0, 1, 2."""
    backend = tokenizers.Tokenizer.from_str(_trained_tokenizer())
    if bos:
        template = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)])
        backend.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=512
    )
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@functools.cache
def _trained_tokenizer() -> str:
    """Trained on a part of the topics every Python ships; the merges differ a little per Python release."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [text for _, text in sorted(pydoc_data.topics.topics.items())][:20]
    backend.train_from_iterator(texts, trainer)
    return backend.to_str()
