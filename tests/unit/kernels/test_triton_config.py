"""Which configuration a product gets: measured where someone has, else worked out."""

import logging
from pathlib import Path

import pytest
import torch
from ctp_kernels.triton import aot, pack
from ctp_kernels.triton.config import (
    Config,
    bucket,
    candidates,
    choose,
    default,
    keep,
    layer_key,
    measured,
    shared_bytes,
)
from ctp_kernels.triton.tune import fastest, tune

H100 = aot.TARGETS["sm_90"]


def test_few_rows_split_their_inputs_and_many_do_not() -> None:
    weight = aot.sample("dense", 4)
    few, many = default(1, weight, H100), default(2048, weight, H100)
    programs = 4096 // few.block_n * few.splits
    assert programs >= H100.processors
    assert many.splits == 1 and many.block_m > few.block_m


@pytest.mark.parametrize("layout", ["dense", "8:16", "bitmap"])
def test_everything_tried_fits_into_shared_memory(layout: str) -> None:
    weight = aot.sample(layout, 8)
    for device in aot.TARGETS.values():
        tried = candidates(4096, weight, device)
        assert len(tried) >= 10
        assert all(shared_bytes(one, weight, device) <= device.shared_bytes for one in tried)
        for batch in (1, 16, 64, 4096):
            assert shared_bytes(default(batch, weight, device), weight, device) <= device.shared_bytes
    small, large = aot.TARGETS["sm_86"], aot.TARGETS["sm_90"]
    assert len(candidates(4096, weight, small)) < len(candidates(4096, weight, large))


def test_float32_gets_fewer_stages_where_it_must() -> None:
    weight, device = aot.sample("dense", 8), aot.TARGETS["gfx942"]
    assert default(512, weight, device, element_bytes=4).stages < default(512, weight, device).stages


def test_measured_configurations_come_back(tmp_path: Path) -> None:
    weight = aot.sample("8:16", 4)
    one, sixteen = Config(16, 32, 4, 8, 2), Config(32, 64, 1, 4, 4)
    path = keep(H100.name, {layer_key(weight): {1: one}}, tmp_path)
    keep(H100.name, {layer_key(weight): {16: sixteen}}, tmp_path)
    assert path.name == "h100.json"
    other, a100 = aot.sample("8:16", 4, outputs=2048), aot.TARGETS["sm_80"]
    assert choose(1, weight, H100, folder=tmp_path) == one
    assert choose(15, weight, H100, folder=tmp_path) == choose(700, weight, H100, folder=tmp_path) == sixteen
    assert choose(1, other, H100, folder=tmp_path) == default(1, other, H100)
    assert choose(1, weight, a100, folder=tmp_path) == default(1, weight, a100)
    assert choose(1, weight, H100) == default(1, weight, H100)


def test_what_was_measured_is_left_where_it_does_not_fit(tmp_path: Path) -> None:
    weight, large = aot.sample("bitmap", 4), Config(64, 128, 2, 4, 3)
    keep(H100.name, {layer_key(weight): {64: large}}, tmp_path)
    assert choose(64, weight, H100, folder=tmp_path) == large
    assert choose(64, weight, H100, element_bytes=4, folder=tmp_path) == default(64, weight, H100, 4)


def test_what_is_shipped_was_a_candidate() -> None:
    found = measured("NVIDIA H200")
    assert len(found) == 9
    for layer, sizes in found.items():
        layout, bits, shape, _ = layer.split()
        outputs, inputs = map(int, shape.split("x"))
        weight = aot.sample(layout, int(bits), outputs=outputs, inputs=inputs)
        assert layer_key(weight) == layer
        for batch, config in sizes.items():
            assert config in candidates(batch, weight, H100)


def test_batch_sizes_are_rounded_up() -> None:
    assert [bucket(batch) for batch in (1, 2, 3, 15, 16, 17, 9000)] == [1, 2, 4, 16, 16, 32, 4096]


def test_a_broken_file_is_said_and_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "h100.json").write_text('{"layers": {"dense": {"1": {"tiles": 3}}}}')
    with caplog.at_level(logging.WARNING):
        assert measured("H100", tmp_path) == {}
    assert "h100.json" in caplog.text


def test_the_fastest_is_kept() -> None:
    weight = aot.sample("dense", 4)
    wanted = candidates(16, weight, H100)[7]
    near = candidates(16, weight, H100)[3]

    def milliseconds(config: Config, carefully: bool) -> float:
        return {wanted: 2.0, near: 3.0 if carefully else 1.0}.get(config, 4.0)

    assert fastest(torch.ones(16, 4096), weight, H100, milliseconds) == wanted


def test_tuning_needs_a_gpu(tmp_path: Path) -> None:
    weight = pack(torch.zeros(8, 32, dtype=torch.uint8), torch.ones(8, 1), bits=4)
    with pytest.raises(ValueError, match="measures a GPU"):
        tune([weight], folder=tmp_path)
