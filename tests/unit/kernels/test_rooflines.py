"""What is timed, in bytes and in turns; clocks are replaced, since no test depends on time."""

import pytest
import torch
from ctp_kernels import dispatch, onnx_product, reference, rooflines
from ctp_kernels.rooflines import KINDS, LayerShape

SMALL = LayerShape(64, 128)
OURS = [f"ours, {kind}{rounded}" for kind in KINDS for rounded in ("", ", x in 8 bits")]


@pytest.fixture
def small_caches(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(rooflines, "cache_bytes", lambda device: 40_000)
    monkeypatch.setattr(rooflines, "_COPIED_BYTES", 1 << 16)
    monkeypatch.setattr(rooflines, "_SAMPLE_S", 0.0)
    monkeypatch.setattr(onnx_product, "available", lambda: False)
    return 40_000


class Clock:
    """Every product takes a second; copying takes half a second."""

    def __init__(self) -> None:
        self.turns: list[str] = []

    def sample_s(self, product: rooflines._Product, x: torch.Tensor, repeats: int) -> float:
        self.turns.append(product.name)
        if product.name != "copy":
            assert product.run(x, product.copies[0]).shape[-1] in (64, 96)
        return 0.5 if product.name == "copy" else 1.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(rooflines._Product, "sample_s", lambda *given: clock.sample_s(*given))
    return clock


def test_bytes_and_bandwidths_by_hand(small_caches: int, clock: Clock) -> None:
    heard: list[str] = []
    report = rooflines.measure(
        [SMALL], device="cpu", generator=torch.Generator(), batches=(1, 4), rounds=2, on_run=heard.append
    )
    assert len(heard) == 2 * (2 + 1)
    rows = {(row.product, row.rows): row for row in report.rows}
    products = ["bf16 F.linear", "bf16 torch.mv", "fp32 F.linear", "bf16 torch int4", *OURS]
    assert list(rows) == [(name, m) for m in (1, 4) for name in products if m == 1 or name != "bf16 torch.mv"]
    assert rows["fp32 F.linear", 4].moved_bytes == 4 * 64 * 128 + 4 * 4 * (64 + 128)
    assert rows["bf16 torch.mv", 1].moved_bytes == 2 * 64 * 128 + 2 * (64 + 128)
    scales = 2 * 64
    assert rows["ours, dense", 1].moved_bytes == 64 * 128 // 2 + scales + 2 * (64 + 128)
    for kind in ("2:4", "8:16"):  # half a code and a bit for every weight
        assert rows[f"ours, {kind}", 1].moved_bytes == 64 * 128 // 4 + 64 * 128 // 8 + scales + 2 * (64 + 128)
    ways = ("packed", "packed int8") if dispatch.packed.available() else ("dense", "dense")
    assert (rows["ours, bitmap", 1].way, rows["ours, bitmap, x in 8 bits", 4].way) == ways
    assert rows["ours, bitmap, x in 8 bits", 4].moved_bytes == rows["ours, bitmap", 4].moved_bytes
    for row in report.rows:
        assert row.time_us.low == row.time_us.median == row.time_us.high == 1e6
        assert row.gb_per_s == pytest.approx(row.moved_bytes / 1e9)
        # copying moves its bytes twice in half a second
        assert row.share_of_copy == pytest.approx(row.moved_bytes / (4 * (1 << 16)))
    assert report.copy_gb_per_s.median == pytest.approx(4 * (1 << 16) / 1e9)


def test_products_take_turns(small_caches: int, clock: Clock) -> None:
    rooflines.measure([SMALL], device="cpu", generator=torch.Generator(), batches=(4,), rounds=3)
    names = ["bf16 F.linear", "fp32 F.linear", "bf16 torch int4", *OURS]
    assert clock.turns[-3 * (len(names) + 1) :] == ["copy", *names] * 3


def test_weights_in_rotation_do_not_fit_into_the_caches(small_caches: int) -> None:
    products = rooflines._products(SMALL, torch.device("cpu"), small_caches, torch.Generator())
    for product in products:
        assert len(product.copies) * product.weight_bytes >= 2 * small_caches
        used: list[int] = []
        run = product.run
        product.run = lambda x, weight, used=used, run=run: (used.append(id(weight)), run(x, weight))[1]  # type: ignore[misc]
        product.sample_s(torch.ones(1, 128, dtype=product.dtype), len(product.copies))
        assert sorted(used) == sorted(map(id, product.copies))
    held = [weight.tensors() for weight in products[-1].copies]
    tensors = [(of_one["codes"] if "codes" in of_one else of_one["own_codes"]).data_ptr() for of_one in held]
    assert len(set(tensors)) == len(tensors), "copies that share memory are no copies"


def test_weights_that_do_fit_are_named(small_caches: int, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rooflines, "_MOST_COPIES", 3)
    report = rooflines.measure([SMALL], device="cpu", generator=torch.Generator(), batches=(1,), rounds=1)
    note, left_out = report.notes
    assert "ONNX Runtime was left out" in left_out
    assert note.startswith("64 x 128: 3 copies")
    assert "ours, dense" in note
    assert "fp32" not in note


@pytest.mark.parametrize("kind", KINDS)
def test_random_layers_are_what_they_are_called(kind: str) -> None:
    shape = LayerShape(64, 192)
    assert shape.group_size == 64
    parts = rooflines.random_layer(shape, kind, torch.Generator().manual_seed(1))
    assert reference.decode(parts).shape == (64, 192)
    kept = float(reference.kept(parts).float().mean())
    keeps = {"dense": 1, "bitmap, 62.5% pruned": 0.375, "bitmap, 75% pruned": 0.25}.get(kind, 0.5)
    assert kept == pytest.approx(keeps, abs=0 if kind in ("dense", "2:4", "8:16") else 0.02)
    assert reference.keeps_exactly(parts, 2, 4) == (kind == "2:4")
    assert reference.keeps_exactly(parts, 8, 16) == (kind in ("2:4", "8:16"))
    about = rooflines.described(shape, kind)
    assert rooflines.stored_bytes(about) == pytest.approx(rooflines.stored_bytes(parts), rel=0.03)
    assert (about.outputs, about.inputs) == (64, 192)
    with pytest.raises(ValueError, match="multiple of 16"):
        rooflines.random_layer(LayerShape(64, 40), kind, torch.Generator())


def test_every_product_is_the_oracles(small_caches: int) -> None:
    """Of ours; the form is the one of the batch size at hand, whatever was timed before."""
    products = {
        product.name: product
        for product in rooflines._products(SMALL, torch.device("cpu"), small_caches, torch.Generator())
    }
    for kind in KINDS:
        product = products[f"ours, {kind}"]
        weight: dispatch.Weight = product.copies[0]
        x = torch.randn(3, 128).bfloat16()
        wanted = reference.matmul(x.double(), weight.stored())
        assert (product.run(x, weight).double() - wanted).norm() < 3e-3 * wanted.norm()
        rounded = products[f"ours, {kind}, x in 8 bits"]
        assert (rounded.run(x, rounded.copies[0]).double() - wanted).norm() < 1e-2 * wanted.norm()


@pytest.mark.skipif(not onnx_product.available(), reason="onnxruntime and onnx are not both installed")
def test_onnx_runtimes_product_is_the_oracles_but_for_its_rounding_of_x() -> None:
    parts = rooflines.random_layer(SMALL, "dense", torch.Generator().manual_seed(1))
    run = onnx_product.int4_product(parts.codes.view(64, -1), parts.scales)
    x = torch.randn(5, 128)
    wanted = reference.matmul(x.double(), parts)
    assert (run(x).double() - wanted).norm() < 1e-2 * wanted.norm()


@pytest.mark.skipif(not onnx_product.available(), reason="onnxruntime and onnx are not both installed")
def test_onnx_runtimes_threads_are_said_not_to_be_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    onnx_product._shared_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 97)
    parts = rooflines.random_layer(SMALL, "dense", torch.Generator().manual_seed(1))
    with pytest.raises(RuntimeError, match="not torch's 97"):
        onnx_product.int4_product(parts.codes.view(64, -1), parts.scales)


def test_predictions_are_bytes_by_bandwidth() -> None:
    rows = {row.product: row for row in rooflines.predictions([LayerShape(4096, 4096)])}
    # 3 bits per weight and a float16 scale for 128 of them, x and y; H100: 3.35 TB/s
    moved = 4096 * 4096 * (3 + 16 / 128) / 8 + 2 * 2 * 4096
    assert rows["ours, 2:4"].moved_bytes == rows["ours, bitmap"].moved_bytes == moved
    assert rows["ours, 2:4"].time_us["H100"] == pytest.approx(moved / 3.35e12 * 1e6)
    assert rows["fp16 F.linear"].time_us["A100"] == pytest.approx((2 * 4096 * 4096 + 2 * 2 * 4096) / 2.0e12 * 1e6)
    # the published ceilings of 2:4 and dense 4 bits against float16, at 0.1%
    sizes = [rows[name].moved_bytes - 16384 for name in ("fp16 F.linear", "ours, dense", "ours, 2:4")]
    assert sizes[0] / sizes[1] == pytest.approx(3.88, rel=1e-3)
    assert sizes[1] / sizes[2] == pytest.approx(1.32, rel=1e-3)
