"""Models the walk does not know are refused with what was looked for and found, before anything is computed."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    MambaConfig,
    MixtralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from ctp_cli.errors import UnsupportedModelError
from ctp_cli.models.blocks import find_blocks

_SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 64}
_HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2}


def skeleton(config: PretrainedConfig) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize(
    ("config", "part"),
    [
        (MixtralConfig(**_SMALL, **_HEADS, num_local_experts=2), r"MixtralForCausalLM: model\.layers\.0\.mlp\.\S+"),
        (
            Qwen3MoeConfig(**_SMALL, **_HEADS, num_experts=2, moe_intermediate_size=32),
            r"Qwen3MoeForCausalLM: model\.layers\.0\.mlp\.\S+",
        ),
        (MambaConfig(**_SMALL), r"MambaForCausalLM: backbone\.layers\.0\.mixer\.\S+"),
    ],
    ids=["mixtral", "qwen3_moe", "mamba"],
)
def test_matrices_outside_of_linear_layers_are_named(config: PretrainedConfig, part: str) -> None:
    with pytest.raises(UnsupportedModelError, match=part + r" has shape \(.*nn\.Linear or Conv1D") as caught:
        find_blocks(skeleton(config))
    assert "dense decoder-only" in caught.value.hint


def test_an_encoder_decoder_names_both_of_its_stacks() -> None:
    config = T5Config(d_model=32, d_ff=64, num_layers=2, num_heads=2, d_kv=16, vocab_size=64)
    with torch.device("meta"):
        model = T5ForConditionalGeneration(config)
    with pytest.raises(UnsupportedModelError, match=r"one ModuleList of num_hidden_layers=2") as caught:
        find_blocks(model)
    assert "encoder.block (2 x T5Block)" in caught.value.message
    assert "decoder.block (2 x T5Block)" in caught.value.message
    assert "Llama" in caught.value.hint


def test_a_model_without_blocks_says_so() -> None:
    class Flat(PreTrainedModel):
        config_class = PretrainedConfig

    with pytest.raises(UnsupportedModelError, match=r"Flat: .*found: none"):
        find_blocks(Flat(PretrainedConfig()))
