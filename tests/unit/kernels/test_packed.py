"""Products that decode in registers, against float64 and against what rounding x may change."""

import copy
import pickle
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from ctp_kernels import packed, reference
from ctp_kernels.cpu import build
from ctp_kernels.cpu.build import AVX2, AVX2_F16C, AVX512, AVX512_BF16, AVX512_VNNI, Level, cpu_features
from ctp_kernels.packed import PackedLayer, dense_codes, product, product_int8, product_int16
from ctp_kernels.ragged import pack_bits, pack_kept, unpack_bits, unpack_kept
from ctp_kernels.reference import PackedParts
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_layers import random_parts

pytestmark = pytest.mark.skipif(not packed.available(), reason="there is no AVX2, or no C++ compiler")

INTEGERS = {product_int16: 32639, product_int8: 127}
SHAPES = [(256, 4), (256, 1), (256, 8), (240, 5), (240, 1), (320, 1), (344, 1), (256, 32)]
"""Inputs and groups: whole blocks of 64, half ones, tails of 48, 48, 32, 24 and 8."""


def close(found: torch.Tensor, wanted: torch.Tensor, sizes: torch.Tensor, tolerance: float) -> None:
    """sizes: of the sum's terms, added up; where they cancel out, rounding remains."""
    assert found.dtype == torch.float32 and found.isfinite().all()
    assert ((found.double() - wanted).abs() <= tolerance * sizes).all()


def rounded(x_MK: torch.Tensor, steps: int, segment: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x as the integers stand for it, and the step of each element."""
    x_MSK = x_MK.float().view(len(x_MK), -1, segment)
    step_MS1 = x_MSK.abs().amax(2, keepdim=True) / steps
    inverse = torch.where(step_MS1 > 0, 1 / step_MS1, torch.zeros(()))
    made = torch.round(x_MSK * inverse).double() * step_MS1.double()
    return made.view_as(x_MK), step_MS1.double().expand_as(x_MSK).reshape(x_MK.shape)


def check(parts: PackedParts, x_MK: torch.Tensor, rows: tuple[int, ...] = ()) -> None:
    """All products, with all rows of x, or with so many of them."""
    layer, W_NK = PackedLayer.of(parts), reference.decode(parts)
    group = parts.inputs // parts.scales.shape[1]
    segment = max((size for size in range(8, min(group, 128) + 1, 8) if group % size == 0), default=group)
    segment = group if segment < min(48, group) else segment
    order = torch.arange(parts.inputs) if parts.g_idx is None else parts.g_idx.long().argsort(stable=True)
    wanted_MN, sizes_MN = x_MK.double() @ W_NK.T, x_MK.double().abs() @ W_NK.abs().T
    for m in rows or (len(x_MK),):
        close(product(x_MK[:m].float(), layer), wanted_MN[:m], sizes_MN[:m], 3e-7)
    for by_integers, steps in INTEGERS.items():
        x_rounded, step_MK = rounded(x_MK[:, order], steps, segment)
        of_rounded_MN = x_rounded @ W_NK[:, order].T
        # no element may be off by more than half a step in each x
        bound_MN = step_MK @ W_NK[:, order].abs().T / 2 + 3e-7 * sizes_MN
        for m in rows or (len(x_MK),):
            y_MN = by_integers(x_MK[:m].float(), layer)
            close(y_MN, of_rounded_MN[:m], x_rounded[:m].abs() @ W_NK[:, order].abs().T, 3e-7)
            close(y_MN, wanted_MN[:m], bound_MN[:m], 1)
    for way in (product, *INTEGERS):
        assert torch.equal(way(x_MK, layer), way(x_MK.float(), layer).to(x_MK.dtype)), "rounded once, as PyTorch does"
    if layer.parts.mask is not None:
        assert torch.equal(dense_codes(layer), with_zero_points(layer.unpaired))


def with_zero_points(parts: PackedParts) -> torch.Tensor:
    keep_NK = unpack_bits(parts.mask)
    codes_NK = unpack_kept(parts.codes.flatten(), keep_NK, parts.bits)
    zeros_NG = torch.full(parts.scales.shape, 2 ** (parts.bits - 1)) if parts.zeros is None else parts.zeros
    zeros_NK = zeros_NG.to(torch.uint8).repeat_interleave(parts.inputs // zeros_NG.shape[1], 1)
    return pack_kept(torch.where(keep_NK, codes_NK, zeros_NK), torch.ones_like(keep_NK), parts.bits)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("bits", packed.BITS)
@pytest.mark.parametrize("layout", ["dense", "2:4", "8:16", "bitmap"])
@pytest.mark.parametrize(("inputs", "groups"), SHAPES)
def test_products_are_the_oracles(
    inputs: int, groups: int, layout: str, bits: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if layout == "8:16" and inputs % 16:
        layout = "bitmap"
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    generator = torch.Generator().manual_seed(inputs + bits)
    for symmetric, outputs in ((True, 40), (False, 51)):
        shape = {"bits": bits, "outputs": outputs, "inputs": inputs, "groups": groups}
        parts = random_parts(layout, symmetric=symmetric, **shape)  # type: ignore[arg-type]
        check(parts, torch.randn(17, inputs, generator=generator) + 1, rows=(1, 2, 3, 4, 5, 7, 8, 17))


@st.composite
def layers(draw: st.DrawFn) -> tuple[PackedParts, torch.Tensor]:
    bits, group = draw(st.sampled_from(packed.BITS)), 8 * draw(st.integers(1, 40))
    groups, outputs = draw(st.integers(1, 3)), draw(st.integers(1, 20))
    inputs = group * groups
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    codes = torch.randint(0, 2**bits, (outputs, inputs), generator=generator).to(torch.uint8)
    density = draw(st.sampled_from((None, 0.0, 0.02, 0.25, 0.5, 0.75, 0.97, 1.0)))
    keep = torch.ones(outputs, inputs, dtype=torch.bool)
    if density is not None:
        keep = torch.rand(outputs, inputs, generator=generator) < density
    zeros = torch.randint(0, 2**bits, (outputs, groups), generator=generator).to(torch.uint8)
    parts = PackedParts(
        codes=pack_kept(codes, keep, bits),
        scales=torch.randn(outputs, groups, generator=generator).half(),
        bits=bits,
        mask=None if density is None else pack_bits(keep),
        zeros=zeros if draw(st.booleans()) else None,
        g_idx=torch.randperm(inputs, generator=generator).int() % groups if draw(st.booleans()) else None,
    )
    dtype = draw(st.sampled_from((torch.float32, torch.float16, torch.bfloat16)))
    scale = draw(st.sampled_from((1e-3, 1.0, 100.0)))
    return parts, (torch.randn(draw(st.integers(1, 9)), inputs, generator=generator) * scale).to(dtype)


@settings(max_examples=200, deadline=None)
@given(layers())
def test_any_layer(made: tuple[PackedParts, torch.Tensor]) -> None:
    check(*made)


def test_rows_of_zeros_outliers_and_what_is_no_number() -> None:
    parts = random_parts("bitmap", bits=4, outputs=40, inputs=256, groups=2, symmetric=True)
    layer, x = PackedLayer.of(parts), torch.randn(4, 256, generator=torch.Generator().manual_seed(0))
    x[1] = 0
    x[2, 7] = 3e4
    x[3, 9] = float("nan")
    for way in (product, *INTEGERS):
        y = way(x, layer)
        assert torch.equal(y[1], torch.zeros(40))
        assert y[3, :39].isnan().all(), "a NaN in x is one in y where the weight is no zero"
        # sums of floats are split otherwise for one row than for several
        torch.testing.assert_close(way(x[:1], layer)[0], y[0], rtol=0, atol=1e-5 if way is product else 0)
    check(parts, x[:3])


def test_values_whose_step_has_no_inverse_are_zeros_to_integers() -> None:
    layer = PackedLayer.of(random_parts("dense", bits=4, outputs=40, inputs=256, groups=2, symmetric=True))
    tiny = torch.full((1, 256), 1e-37)
    assert (product(tiny, layer) != 0).any()
    for by_integers in INTEGERS:
        assert torch.equal(by_integers(tiny, layer), torch.zeros(1, 40))


def test_no_memory_for_rows_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = PackedLayer.of(random_parts("dense", bits=4, outputs=40, inputs=256, groups=2, symmetric=True))
    monkeypatch.setattr(packed, "_library", lambda: SimpleNamespace(packed_product=lambda *_: 1))
    with pytest.raises(MemoryError, match="3 rows of 256 inputs"):
        product(torch.ones(3, 256), layer)


def test_a_pruned_row_gives_zeros_whatever_its_zero_points_are() -> None:
    parts = random_parts("bitmap", bits=4, outputs=40, inputs=256, groups=2, symmetric=False)
    assert not reference.kept(parts)[-1].any()
    y = product(torch.randn(3, 256) + 100, PackedLayer.of(parts))
    assert torch.equal(y[:, -1], torch.zeros(3))


@pytest.mark.parametrize("inputs", [64, 128])
def test_a_run_or_a_block_of_stored_codes_that_begins_inside_of_a_byte(inputs: int) -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (3, inputs), generator=generator).to(torch.uint8)
    keep = torch.ones(3, inputs, dtype=torch.bool)
    keep[0, 1] = keep[1, :15] = False
    parts = PackedParts(
        codes=pack_kept(codes, keep, 4), scales=torch.ones(3, inputs // 64).half(), bits=4, mask=pack_bits(keep)
    )
    check(parts, torch.randn(6, inputs, generator=generator), rows=(1, 6))


@pytest.fixture
def pairs() -> None:
    if not packed.takes_pairs(random_parts("8:16", bits=4, outputs=40, inputs=256, groups=2, symmetric=True)):
        pytest.skip("codes are laid out in pairs with AVX-512 alone")


@pytest.mark.usefixtures("pairs")
@pytest.mark.parametrize(("density", "few"), [(0.0, True), (0.25, True), (0.375, True), (0.5, False), (1.0, False)])
@pytest.mark.parametrize("outputs", [2, 39, 40])
def test_pairs_of_outputs_come_apart_as_they_were(outputs: int, density: float, few: bool) -> None:
    generator = torch.Generator().manual_seed(outputs)
    codes = torch.randint(0, 16, (outputs, 1024), generator=generator).to(torch.uint8)
    keep = torch.rand(outputs, 1024, generator=generator) < density
    parts = PackedParts(
        codes=pack_kept(codes, keep, 4), scales=torch.ones(outputs, 8).half(), bits=4, mask=pack_bits(keep)
    )
    layer = PackedLayer.of(parts)
    assert layer.pairs_P is not None and layer.own
    # each takes a byte where either of both has a code
    kept_P = [int(keep[o : o + 2].sum(1).max()) for o in range(0, outputs, 2)]
    assert layer.pairs_P.diff().tolist() == kept_P and layer.parts.codes.numel() == sum(kept_P)
    for again in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(again.stored(None).codes, parts.codes)
        assert torch.equal(again.parts.codes, layer.parts.codes)
    if outputs > 2:
        assert (layer._kind == packed._PAIRED_FEW) == few


@pytest.mark.usefixtures("pairs")
def test_outputs_that_do_not_go_together_stay_by_themselves() -> None:
    generator = torch.Generator().manual_seed(0)
    keep = torch.rand(20, 512, generator=generator) < torch.tensor([0.9, 0.1]).repeat(10)[:, None]
    codes = torch.randint(0, 16, keep.shape, generator=generator).to(torch.uint8)
    parts = PackedParts(codes=pack_kept(codes, keep, 4), scales=torch.ones(20, 4).half(), bits=4, mask=pack_bits(keep))
    assert not PackedLayer.of(parts).own
    check(parts, torch.randn(5, 512, generator=generator), rows=(1, 2, 5))


def test_a_block_with_more_codes_than_the_others() -> None:
    generator = torch.Generator().manual_seed(0)
    keep = torch.rand(6, 2048, generator=generator) < 0.25
    keep[1, 64:128] = keep[4, 1024:1088] = True  # of 192 blocks, so seldom
    codes = torch.randint(0, 16, keep.shape, generator=generator).to(torch.uint8)
    parts = PackedParts(codes=pack_kept(codes, keep, 4), scales=torch.ones(6, 16).half(), bits=4, mask=pack_bits(keep))
    check(parts, torch.randn(4, 2048, generator=generator), rows=(1, 2, 4))


@pytest.mark.usefixtures("pairs")
def test_what_was_pickled_is_multiplied_where_there_are_no_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = random_parts("8:16", bits=4, outputs=40, inputs=256, groups=2, symmetric=False)
    layer, x = PackedLayer.of(parts), torch.randn(3, 256)
    written = pickle.dumps(layer)
    monkeypatch.setattr(build, "cpu_features", lambda: frozenset(AVX2_F16C.needs))
    build.load.cache_clear()
    try:
        elsewhere = pickle.loads(written)
        assert elsewhere.pairs_P is None and not elsewhere.own
        close(
            product(x, elsewhere),
            x.double() @ reference.decode(parts).T,
            x.double().abs() @ reference.decode(parts).abs().T,
            3e-7,
        )
    finally:
        build.load.cache_clear()


@pytest.mark.parametrize("bits", [4, 8])
def test_long_groups_without_a_fitting_divisor_are_one_segment(bits: int) -> None:
    parts = random_parts("dense", bits=bits, outputs=40, inputs=8 * 251, groups=1, symmetric=False)
    x = torch.full((3, 8 * 251), 1.5)  # of the largest integers, and of one sign: where sums of 16 bits would overflow
    x[1] *= torch.randn(8 * 251, generator=torch.Generator().manual_seed(0)).sign()
    x[2] = -x[2]
    check(parts, x)
    with pytest.raises(ValueError, match="up to 2048 inputs"):
        PackedLayer.of(random_parts("dense", bits=bits, outputs=4, inputs=8 * 257, groups=1, symmetric=True))


def test_a_mask_changed_behind_our_back_reads_nothing_that_is_not_ours() -> None:
    parts = random_parts("bitmap", bits=4, outputs=40, inputs=256, groups=2, symmetric=True)
    layer = PackedLayer.of(parts)
    assert parts.mask is not None
    parts.mask.fill_(255)  # with an address sanitizer this test shows more
    assert product(torch.ones(1, 256), layer).isfinite().all()


def test_levels_name_features_as_linux_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # those of an AMD EPYC 9005 that levels may ask for, as /proc/cpuinfo has them
    flags = "fma f16c popcnt bmi1 avx2 bmi2 avx512f avx512dq avx512cd avx512bw avx512vl avx_vnni avx512_bf16 avx512vbmi"
    flags += " avx512_vbmi2 avx512_vnni avx512_bitalg avx512_vpopcntdq"
    (tmp_path / "cpuinfo").write_text(f"processor : 0\nflags\t\t: {flags}\nbugs :\n")
    monkeypatch.setattr(build, "Path", lambda path: tmp_path / "cpuinfo" if path == "/proc/cpuinfo" else Path(path))
    features = cpu_features.__wrapped__()
    for level in (AVX2, AVX2_F16C, AVX512, AVX512_BF16, AVX512_VNNI):
        assert features.issuperset(level.needs), set(level.needs) - features


@pytest.mark.slow
@pytest.mark.parametrize("level", [AVX2_F16C, AVX512_VNNI])
def test_every_level_compiles_with_its_own_flags(level: Level) -> None:
    assert build._built("packed", level.flags).exists()


def test_what_does_not_fit_is_refused() -> None:
    whole = random_parts("bitmap", bits=4, outputs=40, inputs=256, groups=2, symmetric=False)
    assert whole.mask is not None and whole.zeros is not None
    more = whole.mask.clone()
    more[-1, 0] = 1
    for wrong, said in (
        (replace(whole, codes=whole.codes[:-1]), "bytes of codes"),
        (replace(whole, mask=more), "bytes of codes"),
        (replace(whole, mask=whole.mask[:-1]), "40 rows"),
        (replace(whole, mask=whole.mask.short()), "uint8"),
        (replace(whole, zeros=whole.zeros[:, :1]), "zero points"),
        (replace(whole, zeros=whole.zeros + 16), "zero points of up to"),
        (replace(whole, scales=whole.scales.float()), "float16"),
        (replace(whole, bits=5), "not 5"),
        (replace(whole, codes=whole.codes.to("meta")), "on the CPU, not on meta"),
        (replace(whole, g_idx=torch.zeros(256, dtype=torch.int32)), "as many inputs"),
        (replace(whole, g_idx=torch.zeros(255, dtype=torch.int32)), "256 inputs"),
    ):
        with pytest.raises(ValueError, match=said):
            PackedLayer.of(wrong)
    layer = PackedLayer.of(whole)
    wrong_rows = (
        torch.ones(2, 255),
        torch.ones(()),
        torch.ones(2, 256).int(),
        torch.ones(2, 256).double(),
        torch.ones(2, 256, device="meta"),
    )
    for x in wrong_rows:
        with pytest.raises(ValueError, match="no rows of 256 inputs"):
            product(x, layer)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_x_of_16_bits_keeps_its_shape_and_its_type(dtype: torch.dtype) -> None:
    layer = PackedLayer.of(random_parts("bitmap", bits=4, outputs=40, inputs=256, groups=2, symmetric=True))
    x = torch.randn(2, 256, 3, generator=torch.Generator().manual_seed(0)).to(dtype).transpose(1, 2)
    x[0, 1] = 6e4
    x[1, 2, 7] = float("nan")
    y = product(x, layer)
    assert y.shape == (2, 3, 40) and y.dtype == dtype
    assert y[0].isinf().any() == (dtype == torch.float16), "beyond the largest number of 16 bits"
    assert y[1, 2, :39].isnan().all()
    torch.testing.assert_close(y, product(x.float(), layer).to(dtype), rtol=0, atol=0, equal_nan=True)
    assert product(x[:0], layer).shape == (0, 3, 40)
