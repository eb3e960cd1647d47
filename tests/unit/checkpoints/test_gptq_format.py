"""One packed layer: written and read as GPTQ v1 and v2, and refused where its parts do not go together."""

from pathlib import Path

import numpy as np
import pytest
import torch

from ctp_cli.checkpoints.formats import format_of
from ctp_cli.checkpoints.gptq import GPTQSettings
from ctp_cli.compression.solver import Codes
from ctp_cli.errors import InputError


def random_codes(bits: int, *, symmetric: bool, outputs: int = 32, inputs: int = 64, group: int = 32) -> Codes:
    generator = torch.Generator().manual_seed(0)
    top, groups = 2**bits, inputs // group
    zeros = torch.randint(1, top, (outputs, groups), generator=generator)
    return Codes(
        codes_OI=torch.randint(0, top, (outputs, inputs), generator=generator).to(torch.uint8),
        scales_OG=(torch.rand(outputs, groups, generator=generator) + 0.5).half().float(),
        zeros_OG=(torch.full_like(zeros, top // 2) if symmetric else zeros).to(torch.uint8),
        g_idx_I=torch.arange(inputs, dtype=torch.int32) // group,
    )


def settings_for(bits: int, **other: int) -> GPTQSettings:
    return GPTQSettings(bits=bits, group_size=32, symmetric=False, desc_act=False, **other)


def parts_of(codes: Codes, bits: int, *, zero_offset: int = 1) -> dict[str, torch.Tensor]:
    packed = settings_for(bits, zero_offset=zero_offset).pack("layer", codes)
    return {name.removeprefix("layer."): tensor for name, tensor in packed.items()}


def formula(parts: dict[str, torch.Tensor], bits: int, *, zero_offset: int) -> np.ndarray:
    """W[k, n] = scales[g_idx[k], n] * (code - zero), from the bits of the stored words."""

    def stream(words: np.ndarray) -> np.ndarray:  # (W, M) words -> (W * 32 / bits, M) codes
        ones = np.unpackbits(np.ascontiguousarray(words.T).view(np.uint8), axis=1, bitorder="little")
        return (ones.reshape(words.shape[1], -1, bits) << np.arange(bits, dtype=np.uint16)).sum(-1).T

    codes = stream(parts["qweight"].numpy()).astype(np.int64)
    zeros = stream(np.ascontiguousarray(parts["qzeros"].numpy().T)).T.astype(np.int64) + zero_offset
    g_idx = parts["g_idx"].numpy()
    return parts["scales"].numpy().astype(np.float64)[g_idx] * (codes - zeros[g_idx])


@pytest.mark.parametrize("zero_offset", [1, 0], ids=["v1", "v2"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_stored_bits_mean_the_weight_by_the_published_formula(bits: int, symmetric: bool, zero_offset: int) -> None:
    codes = random_codes(bits, symmetric=symmetric)
    parts = parts_of(codes, bits, zero_offset=zero_offset)
    weight_IO = formula(parts, bits, zero_offset=zero_offset)
    # one float32 product against a float64 one
    np.testing.assert_allclose(codes.values().numpy().T, weight_IO, rtol=1e-6)
    back = settings_for(bits, zero_offset=zero_offset).unpack("layer", parts)
    for name in ("codes_OI", "scales_OG", "zeros_OG", "g_idx_I"):
        assert torch.equal(getattr(back, name), getattr(codes, name)), name


def test_symmetric_four_bit_zero_points_are_sevens() -> None:
    parts = parts_of(random_codes(4, symmetric=True), 4)
    assert parts["qzeros"].flatten().tolist() == [0x77777777] * parts["qzeros"].numel()
    assert parts["scales"].dtype == torch.float16


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_v2_stores_the_zero_point_itself(bits: int) -> None:
    codes = random_codes(bits, symmetric=False)
    parts = parts_of(codes, bits)
    read = settings_for(bits, zero_offset=0).unpack("layer", parts)
    assert torch.equal(read.zeros_OG, codes.zeros_OG - 1)
    np.testing.assert_allclose(read.values().numpy().T, formula(parts, bits, zero_offset=0), rtol=1e-6)


def test_g_idx_may_be_missing_or_scattered() -> None:
    codes = random_codes(4, symmetric=True)
    parts = parts_of(codes, 4)
    del parts["g_idx"]
    assert torch.equal(settings_for(4).unpack("layer", parts).values(), codes.values())
    scattered = Codes(codes.codes_OI, codes.scales_OG, codes.zeros_OG, codes.g_idx_I.flip(0))
    back = settings_for(4).unpack("layer", parts_of(scattered, 4)).values()
    assert torch.equal(back, scattered.values())
    assert not torch.equal(back, codes.values())


@pytest.mark.parametrize(
    "lie",
    [
        {"qweight": torch.zeros(7, 32, dtype=torch.int32)},
        {"qweight": torch.zeros(8, 31, dtype=torch.int32)},
        {"qzeros": torch.zeros(2, 3, dtype=torch.int32)},
        {"qzeros": torch.zeros(1, 4, dtype=torch.int32)},
        {"scales": torch.zeros(3, 32, dtype=torch.float16)},
        {"scales": torch.zeros(2, 16, dtype=torch.float16)},
        {"g_idx": torch.zeros(63, dtype=torch.int32)},
        {"g_idx": torch.full((64,), 2, dtype=torch.int32)},
        {"g_idx": torch.full((64,), -1, dtype=torch.int32)},
        {"qweight": torch.zeros(8, dtype=torch.int32)},
        {"scales": torch.zeros(64, dtype=torch.float16)},
        {"qzeros": torch.zeros(8, dtype=torch.int32)},
        {"g_idx": torch.zeros(0, dtype=torch.int32)},
        {"qweight": torch.zeros(0, 32, dtype=torch.int32), "g_idx": torch.zeros(0, dtype=torch.int32)},
    ],
    ids=lambda lie: "-".join(f"{name}{list(tensor.shape)}" for name, tensor in lie.items()),
)
def test_parts_of_lying_shapes_are_refused_by_name(lie: dict[str, torch.Tensor]) -> None:
    parts = {**parts_of(random_codes(4, symmetric=True), 4), **lie}
    with pytest.raises(InputError, match=r"^model\.layers\.0\.fc1: .*shapes"):
        settings_for(4).unpack("model.layers.0.fc1", parts)


def test_other_bits_than_the_settings_say_are_refused() -> None:
    with pytest.raises(InputError, match="do not go together"):
        settings_for(4).unpack("layer", parts_of(random_codes(8, symmetric=True), 8))
    three = parts_of(random_codes(4, symmetric=True), 4)  # 8 words are no whole runs of three
    del three["g_idx"]
    with pytest.raises(InputError):
        settings_for(3).unpack("layer", three)


@pytest.mark.parametrize("part", ["qweight", "qzeros", "scales"])
def test_a_missing_part_is_named(part: str) -> None:
    parts = parts_of(random_codes(4, symmetric=True), 4)
    del parts[part]
    with pytest.raises(InputError, match=rf"layer: {part} missing"):
        settings_for(4).unpack("layer", parts)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quant_method": "awq"}, "quantized by 'awq'"),
        ({"bits": 5}, "bits=5"),
        ({"bits": None}, "bits=None"),
        ({"bits": 4.0}, r"bits=4\.0"),
        ({"group_size": 10**30}, "group_size=1000"),
        ({"group_size": "128"}, "group_size='128'"),
        ({"checkpoint_format": "marlin"}, "checkpoint_format='marlin'"),
        ({"lm_head": True}, "lm_head is quantized"),
    ],
)
def test_settings_that_are_not_known_are_refused(changes: dict[str, object], message: str) -> None:
    config = settings_for(4).to_config()
    assert GPTQSettings.from_config(config, Path("model")) == GPTQSettings(4, 32, False, False)
    with pytest.raises(InputError, match=message):
        format_of({**config, **changes}, Path("model"))


def test_the_format_version_decides_what_a_stored_zero_point_means() -> None:
    config = settings_for(4).to_config()
    for form, offset in (("gptq", 1), ("gptq_v2", 0)):
        assert GPTQSettings.from_config({**config, "checkpoint_format": form}, Path("model")).zero_offset == offset


@pytest.mark.parametrize(("outputs", "inputs", "word"), [(48, 64, "48 outputs"), (64, 40, "40 inputs")])
def test_layers_that_do_not_fill_words_are_refused(outputs: int, inputs: int, word: str) -> None:
    settings_for(3).check_layer("layer", out_features=64, in_features=96)
    with pytest.raises(InputError, match=rf"layer: {word}") as caught:
        settings_for(4).check_layer("layer", out_features=outputs, in_features=inputs)
    assert "dense" in caught.value.hint
