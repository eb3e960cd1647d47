"""A stitched checkpoint is ordinary: plain transformers gives the logits of the prompt as inputs_embeds."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from prompt_cases import TEXT, load_case, stitched_case
from safetensors import safe_open
from tiny_models import FAMILIES, VOCAB_SIZE, tiny_model
from transformers import AutoConfig, BartConfig

from ctp_cli.errors import InputError, UnsupportedModelError
from ctp_cli.prompts import rejection
from ctp_cli.prompts.stitching import _check_only_tables_grow, embedding_scale, table_names

# Same weights, same order of sums; only the head is wider. Float32 leaves no room for more.
TOLERANCE = 1e-5


@pytest.mark.parametrize("layout", ["prompt-text", "bos-prompt-text"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_those_of_inputs_embeds(family, layout, tmp_path):
    case = stitched_case(tiny_model(family, tmp_path / "base"), tmp_path / "stitched", layout=layout)
    model, tokenizer = case.stitched()
    with torch.no_grad():
        logits = model(**tokenizer(TEXT, return_tensors="pt")).logits
        without = case.model(case.bare_ids()).logits
    expected = case.expected_logits()
    assert (logits[..., :VOCAB_SIZE] - expected).abs().max() < TOLERANCE
    assert (without - expected[:, -without.shape[1] :]).abs().max() > 0.1  # the prompt does matter
    mass = logits.double().softmax(-1)[..., VOCAB_SIZE:].sum(-1)
    assert mass.max() < 1e-6


@pytest.mark.parametrize("family", ["llama_tied_gqa", "gemma", "opt350"])
def test_bfloat16_models_agree_within_one_rounding_of_the_prompt(family, tmp_path):
    case = stitched_case(tiny_model(family, tmp_path / "base", dtype=torch.bfloat16), tmp_path / "stitched")
    model, tokenizer = case.stitched()
    assert model.dtype == torch.bfloat16
    with torch.no_grad():
        logits = model(**tokenizer(TEXT, return_tensors="pt")).logits
    # bfloat16 keeps 8 bits; only Gemma's division by sqrt(width) rounds a second time
    tolerance = 0.05 if family == "gemma" else 1e-6
    assert (logits[..., :VOCAB_SIZE] - case.expected_logits()).float().abs().max() <= tolerance


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_text_equals_that_of_inputs_embeds(family, tmp_path):
    case = stitched_case(tiny_model(family, tmp_path / "base"), tmp_path / "stitched")
    model, tokenizer = case.stitched()
    expected = case.model.generate(
        inputs_embeds=case.prompted_embeddings(),
        attention_mask=torch.ones(case.prompted_embeddings().shape[:2]),
        do_sample=False,
        max_new_tokens=20,
    )
    inputs = tokenizer(TEXT, return_tensors="pt")
    found = model.generate(**inputs, do_sample=False, max_new_tokens=20)
    assert found[0, inputs["input_ids"].shape[1] :].tolist() == expected[0].tolist()
    assert set(model.generation_config.suppress_tokens) == set(range(VOCAB_SIZE, 384))  # padding, too


def test_a_process_without_ctp_serves_it(tmp_path):
    case = stitched_case(tiny_model("llama_tied_gqa", tmp_path / "base"), tmp_path / "stitched")
    script = (
        "import sys, json, torch\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(case.folder)!r})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({str(case.folder)!r})\n"
        f"logits = model(**tokenizer({TEXT!r}, return_tensors='pt')).logits\n"
        f"chat = tokenizer.apply_chat_template([dict(role='user', content='hi')], tokenize=False)\n"
        "assert not [name for name in sys.modules if name.startswith('ctp')]\n"
        "print(json.dumps([logits[0, -1].tolist(), chat]))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, check=True)
    last, chat = json.loads(done.stdout.splitlines()[-1])
    assert torch.allclose(torch.tensor(last)[:VOCAB_SIZE], case.expected_logits()[0, -1], atol=TOLERANCE)
    assert chat.count("<|ctp_") == 9


def test_a_padded_table_keeps_token_ids_and_rows_together(tmp_path):
    base = tiny_model("llama_tied_gqa", tmp_path / "base", vocab_size=VOCAB_SIZE + 5)
    case = stitched_case(base, tmp_path / "stitched", tokens=9)
    model, tokenizer = case.stitched()
    ids = tokenizer.convert_tokens_to_ids([f"<|ctp_{index}|>" for index in range(9)])
    assert ids == list(range(VOCAB_SIZE, VOCAB_SIZE + 9))  # five rows of padding, then four new ones
    assert torch.equal(model.get_input_embeddings().weight[ids], case.prompt.embeddings)
    with torch.no_grad():
        logits = model(**tokenizer(TEXT, return_tensors="pt")).logits
    assert logits.shape[-1] == VOCAB_SIZE + 9
    assert (logits[..., :VOCAB_SIZE] - case.expected_logits()[..., :VOCAB_SIZE]).abs().max() < TOLERANCE
    assert logits.softmax(-1)[..., VOCAB_SIZE:].sum(-1).max() < 1e-6


def test_a_table_shorter_than_the_tokenizer_gets_rows_for_every_id(tmp_path):
    base = tiny_model("llama", tmp_path / "base", vocab_size=VOCAB_SIZE - 3)
    case = stitched_case(base, tmp_path / "stitched")
    model, _ = case.stitched()
    assert torch.equal(model.get_input_embeddings().weight[VOCAB_SIZE : VOCAB_SIZE + 9], case.prompt.embeddings)


def test_the_config_changes_in_size_and_tie_only(tmp_path):
    case = stitched_case(tiny_model("gemma3", tmp_path / "base"), tmp_path / "stitched")
    before = json.loads((case.base / "config.json").read_text())
    after = json.loads((case.folder / "config.json").read_text())
    changed = {key for key in before | after if before.get(key) != after.get(key)}
    assert changed <= {"vocab_size", "tie_word_embeddings"}
    assert after["tie_word_embeddings"] is False
    assert after["vocab_size"] == 384  # 329 tokens; the base's 320 rows were a multiple of 64


def test_a_prompt_leaves_that_many_fewer_positions(tmp_path):
    case = stitched_case(tiny_model("gpt2", tmp_path / "base"), tmp_path / "stitched", layout="bos-prompt-text")
    assert case.made.text_positions == 512 - 9 - 1
    model, tokenizer = case.stitched()
    assert tokenizer.model_max_length == 512  # counts the prompt: the tokenizer puts it there
    ids = tokenizer("word " * 600, truncation=True, return_tensors="pt")["input_ids"]
    assert ids.shape[1] == 512
    assert ids[0, 1:10].tolist() == list(case.made.token_ids)
    with torch.no_grad():
        model(ids)


def test_generation_settings_of_the_base_stay(tmp_path):
    base = tiny_model("llama", tmp_path / "base")
    settings = {"temperature": 0.6, "do_sample": True, "eos_token_id": [2, 5], "suppress_tokens": [7]}
    (base / "generation_config.json").write_text(json.dumps(settings))
    case = stitched_case(base, tmp_path / "stitched")
    after = json.loads((case.folder / "generation_config.json").read_text())
    assert {**after, "suppress_tokens": [7]} == settings
    assert after["suppress_tokens"][:10] == [7, *case.made.token_ids]


def test_a_base_without_generation_settings_keeps_its_end_of_text(tmp_path):
    base = tiny_model("llama", tmp_path / "base")
    (base / "generation_config.json").unlink()
    case = stitched_case(base, tmp_path / "stitched")
    assert case.stitched()[0].generation_config.eos_token_id == case.model.generation_config.eos_token_id == 2


def test_a_head_with_a_bias_uses_the_bias(tmp_path):
    case = stitched_case(tiny_model("phi", tmp_path / "base"), tmp_path / "stitched")
    with safe_open(case.folder / "model-vocabulary.safetensors", "pt") as file:
        assert file.get_tensor("lm_head.bias")[VOCAB_SIZE:].max() == -1e4
    assert case.made.mass_max == 0


def test_too_much_probability_on_the_prompt_is_an_error_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(rejection, "_ATTEMPTS", ((None, 30.0),))  # towards the hidden states instead of away
    with pytest.raises(InputError, match="of the probability"):
        stitched_case(tiny_model("llama", tmp_path / "base"), tmp_path / "stitched")
    assert not any((tmp_path / "stitched").iterdir())


def test_a_second_prompt_is_refused(tmp_path):
    case = stitched_case(tiny_model("llama", tmp_path / "base"), tmp_path / "stitched")
    with pytest.raises(InputError, match="already carries a prompt"):
        stitched_case(case.folder, tmp_path / "again")


def test_a_prompt_that_fills_every_position_is_refused(tmp_path):
    base = tiny_model("gpt2", tmp_path / "base", n_positions=16)
    with pytest.raises(InputError, match="no room is left"):
        stitched_case(base, tmp_path / "stitched", tokens=16)


def test_an_encoder_decoder_is_refused():
    with pytest.raises(UnsupportedModelError, match="encoder-decoder"):
        table_names(BartConfig(vocab_size=100, d_model=32))


def test_tables_that_also_grow_with_the_vocabulary_are_refused(tmp_path):
    config = AutoConfig.from_pretrained(tiny_model("llama", tmp_path))
    names, _ = table_names(config)
    _check_only_tables_grow(config, 384, names)
    with pytest.raises(UnsupportedModelError, match=r"model\.embed_tokens\.weight also depend"):
        _check_only_tables_grow(config, 384, replace(names, embedding="another.weight"))


def test_embedding_scale_is_asked_of_the_module(tmp_path):
    scales = {}
    for family in ("llama", "gemma", "gemma3"):
        model = load_case(tiny_model(family, tmp_path / family), tmp_path / "none").model
        scales[family] = embedding_scale(model.get_input_embeddings())
    assert scales == {"llama": 1.0, "gemma": 8.0, "gemma3": 8.0}  # sqrt(64)

    class Shifted(torch.nn.Embedding):
        def forward(self, ids):
            return super().forward(ids) + 1

    with pytest.raises(UnsupportedModelError, match="more than scale"):
        embedding_scale(Shifted(10, 8))
