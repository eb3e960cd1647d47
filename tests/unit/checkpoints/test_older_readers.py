"""What a configuration says to transformers 4, which silently takes its defaults for names that it does not know."""

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_models import tiny_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from ctp_cli.checkpoints.older_readers import rotary_keys
from ctp_cli.checkpoints.writer import write_configuration

LINEAR = {"rope_type": "linear", "factor": 4.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
SLIDING = {"rope_type": "default", "rope_theta": 2e4}

# family, settings, the keys by which releases 4.46 (gemma3: 4.50) of transformers build their rotary embedding
CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, {"rope_theta": 5e5}),
    ("llama", {"rope_parameters": {**LLAMA3, "rope_theta": 5e5}}, {"rope_theta": 5e5, "rope_scaling": LLAMA3}),
    ("phi", {"partial_rotary_factor": 0.25}, {"rope_theta": 1e4, "partial_rotary_factor": 0.25}),
    (
        "phi",
        {"rope_parameters": {**LINEAR, "rope_theta": 5e5, "partial_rotary_factor": 0.25}},
        {"rope_theta": 5e5, "partial_rotary_factor": 0.25, "rope_scaling": LINEAR},
    ),
    (
        "gpt_neox",
        {"rope_parameters": {**LINEAR, "rope_theta": 5e5, "partial_rotary_factor": 0.5}},
        {"rotary_emb_base": 5e5, "rotary_pct": 0.5, "rope_scaling": LINEAR},
    ),
    (
        "gemma3",
        {"rope_parameters": {"sliding_attention": SLIDING, "full_attention": {**LINEAR, "rope_theta": 5e5}}},
        {"rope_local_base_freq": 2e4, "rope_theta": 5e5, "rope_scaling": LINEAR},
    ),
    ("opt", {}, {}),
]
FORMER = {
    "rope_theta",
    "rope_scaling",
    "partial_rotary_factor",
    "rotary_emb_base",
    "rotary_pct",
    "rope_local_base_freq",
}


@pytest.mark.parametrize(("family", "settings", "expected"), CASES)
def test_rotary_settings_stand_under_their_former_names_too(
    family: str, settings: dict[str, Any], expected: dict[str, Any], tmp_path: Path
) -> None:
    original = tiny_model(family, tmp_path / "original", **settings)
    written = rewritten(original, tmp_path / "written")
    config = json.loads((written / "config.json").read_text())
    assert {key: config[key] for key in FORMER & config.keys()} == expected
    before, after = AutoConfig.from_pretrained(original), AutoConfig.from_pretrained(written)
    assert getattr(after, "rope_parameters", None) == getattr(before, "rope_parameters", None)


def test_a_former_name_that_misleads_transformers_5_is_left_out() -> None:
    rope = {**LINEAR, "rope_theta": 5e5, "high": [1, 2]}
    config = AutoConfig.for_model("llama", rope_parameters=rope)

    class Forgetful(type(config)):  # type: ignore[misc]
        def convert_rope_params_to_dict(self, **kwargs: Any) -> Any:
            if kwargs.get("rope_scaling"):
                kwargs["rope_scaling"].pop("high")
            return super().convert_rope_params_to_dict(**kwargs)

    assert rotary_keys(config) == {"rope_theta": 5e5, "rope_scaling": {**LINEAR, "high": [1, 2]}}
    assert rotary_keys(Forgetful(rope_parameters=rope)) == {"rope_theta": 5e5}


def test_the_tokenizer_names_a_class_and_tokens_that_transformers_4_knows(tmp_path: Path) -> None:
    original = tiny_model("llama", tmp_path / "original")
    tokenizer = AutoTokenizer.from_pretrained(original)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|tool|>"]})
    tokenizer.save_pretrained(original)
    written = rewritten(original, tmp_path / "written")
    config = json.loads((written / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["additional_special_tokens"] == ["<|tool|>"]
    assert "extra_special_tokens" not in config
    again = AutoTokenizer.from_pretrained(written)
    assert again.extra_special_tokens == ["<|tool|>"]
    assert again("a<|tool|>b")["input_ids"] == tokenizer("a<|tool|>b")["input_ids"]


def rewritten(original: Path, folder: Path) -> Path:
    folder.mkdir()
    model = AutoModelForCausalLM.from_pretrained(original)
    tokenizer = AutoTokenizer.from_pretrained(original)
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    write_configuration(folder, model, tokenizer, settings=None)
    return folder
