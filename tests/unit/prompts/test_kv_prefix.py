"""Keys and values as a prompt: what they mean, their gradient, their file, and what others make of them."""

import json
from pathlib import Path

import pytest
import torch
from ctp_kernels.prefix import cache_keyword, cache_of, cache_with, fresh_copy, key_values_of, prefix_cache
from peft import PeftModel
from prompt_cases import Case, load_case
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM

from ctp_cli.errors import InputError
from ctp_cli.models.sharding import Frozen
from ctp_cli.prompts.file import KvPrefix, load_prompt, save_prompt
from ctp_cli.prompts.losses import KvPrefixLoss
from ctp_cli.prompts.prefix import prefix_of
from ctp_cli.recipe import StitchSection
from ctp_cli.stages.stitch import stitch

FAMILIES = ["llama_tied_gqa", "opt350", "gemma", "gpt2", "bloom", "gpt_neox", "qwen2", "mistral", "phi"]


def _case(family: str, folder: Path) -> Case:
    case = load_case(tiny_model(family, folder / "base"), folder / "out")
    save_prompt(folder / "prompt.safetensors", case.prompt)
    return case


def _stitched(folder: Path, format: str, prompt: str = "prompt.safetensors", output: str = "out") -> Path:
    section = StitchSection(format=format)
    return stitch(section, prompt_path=folder / prompt, model_path=folder / "base", output=folder / output).path


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_as_keys_and_values_scores_and_generates_as_the_prompt(family: str, tmp_path: Path) -> None:
    case = _case(family, tmp_path)
    prefix = load_prompt(_stitched(tmp_path, "kv"))
    assert isinstance(prefix, KvPrefix) and prefix.num_virtual_tokens == case.prompt.num_virtual_tokens
    cache = prefix_of(prefix, case.model, name="base", bos_id=None)
    ids, keyword = case.bare_ids(), cache_keyword(case.model)
    with torch.no_grad():
        logits = case.model(ids, **{keyword: fresh_copy(cache, batch_size=1)}).logits
    expected = case.expected_logits()
    assert (logits - expected[:, -logits.shape[1] :]).abs().max() < 1e-5
    # generate() takes the tokens of a filled cache for read: it wants some in their place, and a mask that counts them
    room = torch.zeros(1, prefix.num_virtual_tokens, dtype=torch.long)
    settings = {"max_new_tokens": 12, "do_sample": False}
    whole = torch.cat([room, ids], 1)
    filled = {keyword: fresh_copy(cache, 1), "attention_mask": torch.ones_like(whole)}
    made = case.model.generate(whole, **filled, **settings)
    plain = case.model.generate(inputs_embeds=case.prompted_embeddings(), **settings)
    assert torch.equal(made[:, room.shape[1] + ids.shape[1] :], plain)


@pytest.mark.parametrize("family", ["llama_tied_gqa", "gemma", "gpt2", "opt350"])
def test_peft_reads_it_as_prefix_tuning(family: str, tmp_path: Path) -> None:
    case = _case(family, tmp_path)
    _stitched(tmp_path, "kv", output="kv")
    adapter = _stitched(tmp_path, "peft", prompt="kv")
    expected = case.expected_logits()
    adapted = PeftModel.from_pretrained(case.model, adapter)
    with torch.no_grad():
        logits = adapted(input_ids=case.bare_ids()).logits
    assert (logits - expected[:, -logits.shape[1] :]).abs().max() < 1e-5
    assert json.loads((adapter / "adapter_config.json").read_text())["peft_type"] == "PREFIX_TUNING"


@pytest.mark.parametrize("family", ["llama_tied_gqa", "gpt2", "bloom"])
def test_the_gradient_of_keys_and_values_leads_on_to_that_of_their_prompt(family: str, tmp_path: Path) -> None:
    """Chain rule: gradient at keys and values, through the prompt's own forward pass, against one plain backward."""
    case = load_case(tiny_model(family, tmp_path / "base"), tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(case.base).double().eval().requires_grad_(False)
    ids = torch.randint(5, 300, (3, 40), generator=torch.Generator().manual_seed(0))
    rows = case.prompt.embeddings.double().requires_grad_()
    key_values = key_values_of(cache_of(model(inputs_embeds=rows[None], use_cache=True)))
    module = KvPrefixLoss([Frozen(model)], key_values.detach().float())
    loss = module(ids, 0, None)
    loss.backward()
    gradient = module.prompt.grad / module.unit_L2111
    (led_on,) = torch.autograd.grad(key_values, rows, gradient.double())
    plain = case.prompt.embeddings.double().requires_grad_()
    embedded = torch.cat([plain.expand(3, -1, -1), model.get_input_embeddings()(ids)], 1)
    logits = model(inputs_embeds=embedded, use_cache=False).logits[:, len(plain) : -1]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    expected.backward()
    # the parameter is float32, and losses are summed in it
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(led_on, plain.grad, rtol=1e-3, atol=1e-6)


def test_layers_that_keep_no_keys_and_values_of_every_token_are_refused(tmp_path: Path) -> None:
    import transformers

    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.MistralConfig(**sizes, intermediate_size=48, num_key_value_heads=2, sliding_window=4)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    cache = prefix_cache(model, torch.randn(9, 32))
    with pytest.raises(ValueError, match="sliding window has cut"):
        key_values_of(cache)
    with pytest.raises(ValueError, match=r"expected shape \(2, 2, 2, 9, 8\), got \(2, 2, 2, 8, 8\)"):
        whole = prefix_cache(_without_window(config), torch.randn(9, 32))
        cache_with(whole, torch.zeros(2, 2, 2, 8, 8), 1)


def _without_window(config):
    import transformers

    config.sliding_window = None
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def test_a_prefix_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    _case("llama_tied_gqa", tmp_path)
    _stitched(tmp_path, "kv", output="kv")
    with pytest.raises(InputError, match="no token can stand for it") as caught:
        _stitched(tmp_path, "vocab", prompt="kv")
    assert "--format kv" in str(caught.value.hint)
    other = load_case(tiny_model("gpt2", tmp_path / "other"), tmp_path / "out")
    with pytest.raises(InputError, match=r"the prefix is 2x2x2x9x16 .* that of other would be 2x2x4x9x16"):
        prefix_of(load_prompt(tmp_path / "kv"), other.model, name="other", bos_id=None)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"prompt_embeddings": torch.zeros(3, 8)}, "holds no tensor key_values"),
        ({"key_values": torch.zeros(3, 8)}, "key_values is 3x8, expected layers x 2 x heads"),
        ({"key_values": torch.zeros(2, 3, 2, 4, 8)}, "key_values is 2x3x2x4x8, expected layers x 2 x heads"),
        ({"key_values": torch.zeros(2, 2, 2, 4, 8, dtype=torch.int32)}, "is I32, expected F32"),
        ({"key_values": torch.full((2, 2, 2, 4, 8), torch.nan)}, "NaN"),
    ],
)
def test_a_file_that_says_kv_prefix_must_hold_one(tensors: dict, message: str, tmp_path: Path) -> None:
    save_file(tensors, tmp_path / "prompt.safetensors", {"kind": "kv-prefix"})
    with pytest.raises(InputError, match=message):
        load_prompt(tmp_path)


def test_the_file_comes_back_bit_for_bit(tmp_path: Path) -> None:
    key_values = torch.randn(2, 2, 3, 4, 8)
    save_prompt(tmp_path / "prompt.safetensors", KvPrefix(key_values))
    assert torch.equal(load_file(tmp_path / "prompt.safetensors")["key_values"], key_values)
    loaded = load_prompt(tmp_path)
    assert isinstance(loaded, KvPrefix) and torch.equal(loaded.key_values, key_values)
    assert loaded.metadata.kind == "kv-prefix"
