"""Reusing a prompt's keys and values gives what plain transformers gives with the prompt before the text."""

from contextlib import nullcontext

import pytest
import torch
import transformers
from ctp_kernels.attention import prefix_attention
from ctp_kernels.prefix import (
    cache_bytes,
    cache_keyword,
    cache_with,
    fresh_copy,
    key_values_of,
    prefix_cache,
)
from torch.overrides import TorchFunctionMode

WIDTH, PROMPT, TEXT = 32, 5, 7
_COMMON = {"vocab_size": 64, "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4}
_GEMMA = _COMMON | {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8}
CONFIGS = {
    "llama": transformers.LlamaConfig(**_COMMON, intermediate_size=48, num_key_value_heads=2),
    "opt": transformers.OPTConfig(**_COMMON, ffn_dim=48, word_embed_proj_dim=WIDTH, max_position_embeddings=64),
    "opt-projected": transformers.OPTConfig(
        **_COMMON, ffn_dim=48, word_embed_proj_dim=16, max_position_embeddings=64, do_layer_norm_before=False
    ),
    "gpt2": transformers.GPT2Config(vocab_size=64, n_embd=WIDTH, n_layer=2, n_head=4, n_positions=64),
    "bloom": transformers.BloomConfig(vocab_size=64, hidden_size=WIDTH, n_layer=2, n_head=4),
    "gpt_neox": transformers.GPTNeoXConfig(**_COMMON, intermediate_size=48),
    "gemma": transformers.GemmaConfig(**_GEMMA),
    # a window shorter than the prompt: the cache has dropped the prompt's first rows by the time it is copied
    "gemma2-sliding": transformers.Gemma2Config(**_GEMMA, sliding_window=4),
    "mistral-sliding": transformers.MistralConfig(
        **_COMMON, intermediate_size=48, num_key_value_heads=2, sliding_window=9
    ),
}


@pytest.fixture(params=CONFIGS, name="model")
def _model(request):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(CONFIGS[request.param]).float().eval()
        for parameter in model.parameters():  # the usual initialization is so small that any mask gives the same
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def _inputs(model, batch_size=1):
    generator = torch.Generator().manual_seed(1)
    prompt_PD = torch.randn(PROMPT, model.get_input_embeddings().weight.shape[1], generator=generator)
    return prompt_PD, torch.randint(64, (batch_size, TEXT), generator=generator)


@torch.no_grad()
def _oracle(model, prompt_PD, text_BT):
    """Logits at the text's positions, all stated: whole input, whole mask, a forward without a cache."""
    text_BTD = model.get_input_embeddings()(text_BT)
    inputs = torch.cat([prompt_PD.expand(len(text_BT), -1, -1), text_BTD], dim=1)
    return model(inputs_embeds=inputs, attention_mask=torch.ones(inputs.shape[:2]), use_cache=False).logits[:, PROMPT:]


@torch.no_grad()
def test_text_after_a_reused_prefix_scores_as_with_the_prompt_in_front(model):
    prompt_PD, text_BT = _inputs(model, batch_size=3)
    prefix = prefix_cache(model, prompt_PD)
    logits = model(text_BT, **{cache_keyword(model): fresh_copy(prefix, batch_size=3)}).logits
    torch.testing.assert_close(logits, _oracle(model, prompt_PD, text_BT), atol=1e-5, rtol=1e-4)
    with prefix_attention():
        logits = model(text_BT, **{cache_keyword(model): fresh_copy(prefix, batch_size=3)}).logits
    torch.testing.assert_close(logits, _oracle(model, prompt_PD, text_BT), atol=1e-5, rtol=1e-4)


class _Masks(TorchFunctionMode):
    """Counts attention with a mask and without, as they reach PyTorch."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.nn.functional.scaled_dot_product_attention:
            self.seen.append((kwargs["attn_mask"] is not None, kwargs["is_causal"], *args[0].shape[-2:]))
        return func(*args, **kwargs or {})


@torch.no_grad()
def test_attention_behind_a_prefix_is_causal_and_square_where_it_can_be():
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS["llama"]).eval()
    prompt_PD, text_BT = _inputs(model, batch_size=2)
    prefix = prefix_cache(model, prompt_PD)
    padded_BS = torch.ones(2, PROMPT + TEXT, dtype=torch.long)
    padded_BS[1, -2:] = 0

    def seen(text_BT, **inputs):
        with _Masks() as masks, prefix_attention():
            model(text_BT, **{cache_keyword(model): fresh_copy(prefix, batch_size=2)}, **inputs)
        return masks.seen

    assert seen(text_BT) == [(False, True, PROMPT + TEXT, 8)] * 2
    assert seen(text_BT, attention_mask=padded_BS) == [(True, False, TEXT, 8)] * 2  # padding needs its mask
    assert seen(text_BT[:, :4]) == [(True, False, 4, 8)] * 2  # more empty queries than it saves
    assert [masked for masked, *_ in seen(text_BT[:, :1])] == [False] * 2


def test_gradients_go_through_attention_behind_a_prefix():
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS["llama"]).eval()
    prompt_PD, text_BT = _inputs(model)
    grads = []
    for context in (nullcontext(), prefix_attention()):
        prefix = prefix_cache(model, prompt_PD)
        key_values = key_values_of(prefix).requires_grad_()
        with context:
            logits = model(text_BT, **{cache_keyword(model): cache_with(prefix, key_values, 1)}).logits
        grads.append(torch.autograd.grad(logits.logsumexp(-1).sum(), key_values)[0])
    torch.testing.assert_close(*grads)


@torch.no_grad()
def test_a_full_attention_mask_changes_nothing(model):
    prompt_PD, text_BT = _inputs(model, batch_size=2)
    prefix = prefix_cache(model, prompt_PD)
    mask = torch.ones(2, PROMPT + TEXT, dtype=torch.long)
    logits = model(text_BT, **{cache_keyword(model): fresh_copy(prefix, batch_size=2)}, attention_mask=mask).logits
    torch.testing.assert_close(logits, _oracle(model, prompt_PD, text_BT), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_decoding_token_by_token_goes_on_from_the_prefix(model):
    prompt_PD, text_1T = _inputs(model)
    cache = fresh_copy(prefix_cache(model, prompt_PD), batch_size=1)
    steps = [model(text_1T[:, i : i + 1], **{cache_keyword(model): cache}).logits for i in range(TEXT)]
    torch.testing.assert_close(torch.cat(steps, 1), _oracle(model, prompt_PD, text_1T), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_the_prefix_is_the_same_after_it_was_used(model):
    prompt_PD, text_BT = _inputs(model, batch_size=2)
    prefix = prefix_cache(model, prompt_PD)
    before = [(layer.keys.clone(), layer.values.clone()) for layer in prefix.layers]
    first = model(text_BT, **{cache_keyword(model): fresh_copy(prefix, batch_size=2)}).logits
    again = model(text_BT, **{cache_keyword(model): fresh_copy(prefix, batch_size=2)}).logits
    assert torch.equal(first, again)
    assert prefix.get_seq_length() == PROMPT
    for layer, (keys, values) in zip(prefix.layers, before, strict=True):
        assert torch.equal(layer.keys, keys) and torch.equal(layer.values, values)


def test_the_prompt_is_moved_to_the_models_dtype_and_no_gradient_is_kept():
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS["llama"]).bfloat16().eval()
    prefix = prefix_cache(model, torch.randn(PROMPT, WIDTH, requires_grad=True))
    assert prefix.layers[0].keys.dtype == torch.bfloat16 and not prefix.layers[0].keys.requires_grad
    # 2 layers, keys and values, 2 heads of width 8, 2 bytes each
    assert cache_bytes(prefix) == 2 * 2 * 2 * PROMPT * 8 * 2


def test_a_prompt_that_does_not_fit_is_refused():
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS["llama"]).eval()
    with pytest.raises(ValueError, match=r"expected shape \(prompt tokens, 32\).*got \(5, 31\)"):
        prefix_cache(model, torch.zeros(PROMPT, 31))
    with pytest.raises(ValueError, match="at least one"):
        prefix_cache(model, torch.zeros(0, WIDTH))
    with pytest.raises(ValueError, match="batch size 2"):
        fresh_copy(fresh_copy(prefix_cache(model, torch.zeros(PROMPT, WIDTH)), batch_size=2), batch_size=1)


def test_profiling_does_not_need_the_command_line_package():
    import subprocess
    import sys

    light = "import sys, ctp_kernels; assert 'torch' not in sys.modules"
    code = f"{light}; import ctp_kernels.profiling; print('ctp_cli' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
