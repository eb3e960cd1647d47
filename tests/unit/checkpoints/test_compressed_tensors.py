"""One packed layer by the published layout, what lies is refused, and scales are what a reader makes of them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from compressed import calibration_text, run, stored_tensors
from tiny_models import tiny_model

from ctp_cli.checkpoints.compressed_tensors import CompressedTensorsSettings
from ctp_cli.compression.solver import Codes
from ctp_cli.errors import InputError


def random_codes(bits: int, *, symmetric: bool, scattered: bool = False) -> Codes:
    """(32, 64) codes in groups of 32."""
    generator = torch.Generator().manual_seed(bits)
    zeros = torch.randint(0, 2**bits, (32, 2), generator=generator)
    order = torch.randperm(64, generator=generator) if scattered else torch.arange(64)
    return Codes(
        codes_OI=torch.randint(0, 2**bits, (32, 64), generator=generator).to(torch.uint8),
        scales_OG=(torch.rand(32, 2, generator=generator) + 0.5).half().float(),
        zeros_OG=(torch.full_like(zeros, 2 ** (bits - 1)) if symmetric else zeros).to(torch.uint8),
        g_idx_I=(order // 32).int(),
    )


def parts_of(form: CompressedTensorsSettings, codes: Codes) -> dict[str, torch.Tensor]:
    return {name.removeprefix("layer."): tensor for name, tensor in form.pack("layer", codes).items()}


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_stored_bits_mean_the_weight(bits: int, symmetric: bool) -> None:
    codes = random_codes(bits, symmetric=symmetric)
    form = CompressedTensorsSettings(bits, 32, symmetric)
    parts = parts_of(form, codes)

    def stream(words: torch.Tensor) -> np.ndarray:  # rows of int32 words -> rows of codes
        ones = np.unpackbits(np.ascontiguousarray(words.numpy()).view(np.uint8), axis=1, bitorder="little")
        return (ones.reshape(len(words), -1, bits) << np.arange(bits, dtype=np.uint16)).sum(-1).astype(np.int64)

    zeros = np.full((32, 2), 2 ** (bits - 1)) if symmetric else stream(parts["weight_zero_point"].T).T
    index = np.arange(64) // 32
    scales = parts["weight_scale"].numpy().astype(np.float64)
    weight = (stream(parts["weight_packed"]) - zeros[:, index]) * scales[:, index]
    np.testing.assert_allclose(codes.values().numpy(), weight, rtol=1e-6)
    assert parts["weight_shape"].tolist() == [32, 64]
    back = form.unpack("layer", parts)
    for name in ("codes_OI", "scales_OG", "zeros_OG", "g_idx_I"):
        assert torch.equal(getattr(back, name), getattr(codes, name)), name
    # as earlier versions stored groups in activation order
    scattered = random_codes(bits, symmetric=symmetric, scattered=True)
    with pytest.raises(InputError, match="no runs of inputs"):
        form.pack("layer", scattered)
    assert torch.equal(form.unpack("layer", {**parts, "weight_g_idx": scattered.g_idx_I}).g_idx_I, scattered.g_idx_I)


def test_parts_that_do_not_go_together_are_refused() -> None:
    form = CompressedTensorsSettings(4, 32, False)
    good = parts_of(form, random_codes(4, symmetric=False))
    for change in (
        {"weight_packed": good["weight_packed"][:-1]},
        {"weight_packed": good["weight_packed"].float()},
        {"weight_packed": good["weight_packed"][0]},
        {"weight_scale": good["weight_scale"][:, :1]},
        {"weight_scale": good["weight_scale"][0]},
        {"weight_shape": torch.tensor([32, 63])},
        {"weight_zero_point": good["weight_zero_point"][:-1]},
        {"weight_zero_point": good["weight_zero_point"].float()},
        {"weight_g_idx": torch.full((64,), 2)},
        {"weight_g_idx": torch.zeros(63, dtype=torch.int32)},
    ):
        with pytest.raises(InputError, match=r"layer: the .* parts of this layer do not go together"):
            form.unpack("layer", {**good, **change})
    with pytest.raises(InputError, match="weight_scale missing"):
        form.unpack("layer", {"weight_packed": good["weight_packed"]})
    with pytest.raises(InputError, match="said to be symmetric"):
        CompressedTensorsSettings(4, 32, True).pack("layer", random_codes(4, symmetric=False))
    with pytest.raises(InputError, match="33 outputs are no multiple of 32"):
        form.check_layer("layer", out_features=33, in_features=64)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "int-quantized"}, "format 'int-quantized'"),
        ({"config_groups": {}}, "config_groups"),
        ({"config_groups": {"a": {"weights": {"num_bits": 4}}, "b": {"weights": {"num_bits": 8}}}}, "not the same"),
        ({"num_bits": 5}, "num_bits=5"),
        ({"type": "float"}, "num_bits=4"),
        ({"strategy": "tensor"}, "strategy='tensor'"),
        ({"group_size": "32"}, "group_size='32'"),
    ],
)
def test_settings_that_are_not_known_are_refused(changes: dict[str, object], message: str, tmp_path: Path) -> None:
    for settings in (CompressedTensorsSettings(4, 32, True), CompressedTensorsSettings(4, -1, False)):
        assert CompressedTensorsSettings.from_config(settings.to_config(), tmp_path) == settings
    config = CompressedTensorsSettings(4, 32, True).to_config()
    weights = config["config_groups"]["group_0"]["weights"]
    for key, value in changes.items():
        (weights if key in weights else config)[key] = value
    with pytest.raises(InputError, match=message):
        CompressedTensorsSettings.from_config(config, tmp_path)


def test_scales_of_a_bfloat16_model_are_bfloat16_before_errors_are_made_up_for(tmp_path: Path) -> None:
    model = tiny_model("llama_tied_gqa", tmp_path / "model", dtype=torch.bfloat16)
    run(model, tmp_path / "out", calibration_text(tmp_path), format="compressed-tensors")
    scales = [tensor for name, tensor in stored_tensors(tmp_path / "out").items() if name.endswith("weight_scale")]
    assert scales
    assert all(tensor.dtype == torch.bfloat16 for tensor in scales)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "compressed-tensors"
    assert not (tmp_path / "out" / "quantize_config.json").exists()
