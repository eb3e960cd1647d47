"""Compressing a tiny model of every family, and reading the result back with transformers alone."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from compressed import block_linears, calibration_text, run, stored_tensors
from tiny_models import FAMILIES, VOCAB_SIZE, tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer, OpenAIGPTConfig, PreTrainedModel

from ctp_cli.models.loading import load_model

PACKED = ("qweight", "qzeros", "scales", "g_idx")


@dataclass(frozen=True)
class Compressed:
    family: str
    original: Path
    dense: Path
    gptq: Path
    names: set[str]
    zeros: float
    weights: int


@pytest.fixture(scope="module", params=list(FAMILIES))
def compressed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Compressed:
    folder = tmp_path_factory.mktemp(request.param)
    original = tiny_model(request.param, folder / "original")
    text = calibration_text(folder)
    run(original, folder / "dense", text, format="dense")
    report = run(original, folder / "gptq", text, format="gptq")
    model = AutoModelForCausalLM.from_pretrained(original)
    names = block_linears(model)
    weights = sum(model.get_submodule(name).weight.numel() for name in names)
    return Compressed(
        request.param, original, folder / "dense", folder / "gptq", names, report.linear_sparsity, weights
    )


def plain(path: Path) -> PreTrainedModel:
    """By transformers, which knows nothing of ctp."""
    return AutoModelForCausalLM.from_pretrained(path).eval()


def logits(model: PreTrainedModel) -> torch.Tensor:
    ids = torch.randint(3, VOCAB_SIZE, (2, 20), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        return model(ids).logits


def test_gptq_loaded_by_us_computes_what_the_dense_form_computes(compressed: Compressed) -> None:
    dense = logits(plain(compressed.dense))
    # Scales are exact in float16 and codes are small integers, so both forms hold the same float32 weights
    torch.testing.assert_close(logits(load_model(compressed.gptq)), dense, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits(plain(compressed.original)), dense, rtol=1e-2, atol=1e-2)


def test_half_of_the_stored_weights_are_zero_in_both_forms(compressed: Compressed) -> None:
    dense, packed = stored_tensors(compressed.dense), stored_tensors(compressed.gptq)
    zeros = weights = 0
    for name in compressed.names:
        weight = dense[f"{name}.weight"]
        zeros += int((weight == 0).sum())
        weights += weight.numel()
        # symmetric 4-bit: code 8 is zero, four bits at a time
        words = packed[f"{name}.qweight"].numpy().view(np.uint32)
        codes = np.stack([(words >> np.uint32(4 * k)) & np.uint32(15) for k in range(8)])
        assert int((codes == 8).sum()) == int((weight == 0).sum())
    assert weights == compressed.weights
    assert zeros / weights >= 0.5
    assert zeros / weights == pytest.approx(compressed.zeros, abs=1e-9)


def test_packed_layers_follow_gptq_v1(compressed: Compressed) -> None:
    packed = stored_tensors(compressed.gptq)
    original = plain(compressed.original)
    for name in compressed.names:
        module = original.get_submodule(name)
        inputs, outputs = module.weight.shape
        if type(module).__name__ != "Conv1D":
            inputs, outputs = outputs, inputs
        assert f"{name}.weight" not in packed
        shapes = {part: (packed[f"{name}.{part}"].dtype, tuple(packed[f"{name}.{part}"].shape)) for part in PACKED}
        assert shapes == {
            "qweight": (torch.int32, (inputs * 4 // 32, outputs)),
            "qzeros": (torch.int32, (inputs // 32, outputs * 4 // 32)),
            "scales": (torch.float16, (inputs // 32, outputs)),
            "g_idx": (torch.int32, (inputs,)),
        }
        assert (packed[f"{name}.qzeros"] == 0x77777777).all()  # zero point 8, stored as 7
        assert packed[f"{name}.g_idx"].tolist() == [i // 32 for i in range(inputs)]
        if module.bias is not None:
            assert torch.equal(packed[f"{name}.bias"], module.bias.detach())


def test_all_else_is_unchanged_bit_for_bit(compressed: Compressed) -> None:
    before = stored_tensors(compressed.original)
    matrices = {f"{name}.weight" for name in compressed.names}
    assert matrices <= before.keys()
    for folder in (compressed.dense, compressed.gptq):
        after = stored_tensors(folder)
        others = before.keys() - matrices
        assert others <= after.keys()
        for name in others:
            assert after[name].dtype == before[name].dtype
            assert torch.equal(after[name], before[name]), name
    packed = {f"{name}.{part}" for name in compressed.names for part in PACKED}
    assert stored_tensors(compressed.dense).keys() == before.keys()
    assert stored_tensors(compressed.gptq).keys() == (before.keys() - matrices) | packed


def test_embeddings_and_head_have_a_shard_of_their_own(compressed: Compressed) -> None:
    for folder in (compressed.dense, compressed.gptq):
        index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
        files = sorted(set(index.values()))
        assert files == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
        for name, file in index.items():
            number = next((int(part) for part in name.split(".") if part.isdigit()), None)
            assert file == files[0 if number is None else number + 1], name
        assert index.keys() == stored_tensors(folder).keys()


def test_tied_embeddings_stay_tied(compressed: Compressed) -> None:
    original = plain(compressed.original)
    tied = original.get_input_embeddings().weight is original.get_output_embeddings().weight
    assert tied == (compressed.family not in {"llama", "mistral", "phi", "gpt_neox"})
    for model in (plain(compressed.dense), load_model(compressed.gptq)):
        assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied
        assert torch.equal(model.get_output_embeddings().weight, original.get_output_embeddings().weight)


def test_settings_stand_where_readers_look_for_them(compressed: Compressed) -> None:
    config = json.loads((compressed.gptq / "config.json").read_text())
    settings = json.loads((compressed.gptq / "quantize_config.json").read_text())
    assert config["quantization_config"] == settings
    assert settings == {
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "bits": 4,
        "group_size": 32,
        "desc_act": False,
        "sym": True,
        "damp_percent": 0.01,
        "static_groups": False,
        "true_sequential": True,
        "lm_head": False,
    }
    dense = json.loads((compressed.dense / "config.json").read_text())
    assert "quantization_config" not in dense
    assert not (compressed.dense / "quantize_config.json").exists()
    original = json.loads((compressed.original / "config.json").read_text())
    kept = original.keys() - {"transformers_version"}
    assert {key: dense[key] for key in kept} == {key: original[key] for key in kept}
    assert dense["torch_dtype"] == "float32"  # transformers 4 does not know `dtype`


def test_the_tokenizer_goes_along(compressed: Compressed) -> None:
    text = "The assert statement, and 42 more."
    expected = AutoTokenizer.from_pretrained(compressed.original)(text)["input_ids"]
    for folder in (compressed.dense, compressed.gptq):
        assert AutoTokenizer.from_pretrained(folder)(text)["input_ids"] == expected


def test_blocks_that_return_a_list(tmp_path: Path) -> None:
    folder = tiny_model("gpt2", tmp_path / "model")  # for its tokenizer
    config = OpenAIGPTConfig(vocab_size=VOCAB_SIZE, n_embd=64, n_layer=2, n_head=4, n_positions=64)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    assert run(folder, tmp_path / "it", calibration_text(tmp_path)).linear_sparsity >= 0.5
