"""What kernels read holds every code and mask bit for bit, and says how large it is."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from ctp_kernels import reference
from ctp_kernels.triton.layouts import block_of, from_parts, pack, unpack
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_layers import random_mask, random_parts
from torch import Tensor


@settings(max_examples=60, deadline=None)
@given(
    layout=st.sampled_from(["dense", "8:16", "bitmap"]),
    mask=st.sampled_from(["2:4", "8:16"]),
    bits=st.sampled_from([2, 3, 4, 8]),
    outputs=st.integers(1, 70),
    sixteens=st.integers(1, 40),
    symmetric=st.booleans(),
    one_group=st.booleans(),
    density=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 2**31),
)
def test_packing_loses_nothing(
    layout: str,
    mask: str,
    bits: int,
    outputs: int,
    sixteens: int,
    symmetric: bool,
    one_group: bool,
    density: float,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    inputs, groups = 16 * sixteens, 1 if one_group else sixteens
    codes = torch.randint(0, 2**bits, (outputs, inputs), generator=generator).to(torch.uint8)
    zeros = torch.randint(0, 2**bits, (outputs, groups), generator=generator).to(torch.uint8)
    keep = torch.rand(outputs, inputs, generator=generator) < density
    if layout == "8:16":
        made = random_mask(mask, outputs, inputs, generator)
        assert made is not None
        keep = made
    elif layout == "dense":
        keep = torch.ones_like(keep)
    weight = pack(
        codes,
        torch.rand(outputs, groups, generator=generator),
        bits=bits,
        keep_NK=None if layout == "dense" else keep,
        zeros_NG=None if symmetric else zeros,
        layout=layout,
    )
    zero_codes = torch.full_like(codes, 2 ** (bits - 1)) if symmetric else zeros.repeat_interleave(inputs // groups, 1)
    found_codes, found_keep = unpack(weight)
    assert torch.equal(found_keep, keep)
    assert torch.equal(found_codes, torch.where(keep, codes, zero_codes))
    assert all(x.is_contiguous() for x in weight.tensors().values())


@pytest.mark.parametrize(("mask", "layout"), [("dense",) * 2, ("2:4", "8:16"), ("8:16",) * 2, ("bitmap",) * 2])
def test_stored_layers_take_the_tightest_layout(mask: str, layout: str) -> None:
    parts = random_parts(mask, bits=4, outputs=20, inputs=320, groups=5, symmetric=False)
    weight = from_parts(parts)
    codes, keep = unpack(weight)
    assert weight.layout == layout
    assert torch.equal(codes.long(), reference.codes(parts))
    assert torch.equal(keep, reference.kept(parts))


@pytest.mark.parametrize(
    ("layout", "bits", "wanted"),
    [
        ("dense", 4, 4), ("dense", 3, 3), ("dense", 2, 2), ("dense", 8, 8),
        ("8:16", 4, 3), ("8:16", 3, 2.5), ("8:16", 2, 2), ("8:16", 8, 5),
        ("bitmap", 4, 4 * 0.25 + 1.125), ("bitmap", 3, 3 * 0.25 + 1.125),
    ],
)  # fmt: skip
def test_bits_per_weight(layout: str, bits: int, wanted: float) -> None:
    outputs, inputs = 128, 1024
    keep: Tensor | None = random_mask(layout, outputs, inputs, torch.Generator().manual_seed(0))
    if layout == "bitmap":
        keep = torch.arange(inputs).repeat(outputs, 1) % 4 == 0
    codes = torch.zeros(outputs, inputs, dtype=torch.uint8)
    weight = pack(codes, torch.ones(outputs, 8), bits=bits, keep_NK=keep, layout=layout)
    scales = 16 / 128
    # bitmaps: where each output begins, and the words that are read past the last
    extra = 0.04 if layout == "bitmap" else 0
    assert wanted <= weight.weight_bytes * 8 / (outputs * inputs) - scales <= wanted + extra


def test_what_does_not_fit_is_refused() -> None:
    codes, scales = torch.zeros(8, 64, dtype=torch.uint8), torch.ones(8, 2)
    half = torch.arange(64).repeat(8, 1) % 2 == 0
    with pytest.raises(ValueError, match="bits: the kernels know"):
        pack(codes, scales, bits=5)
    with pytest.raises(ValueError, match="multiple of 16"):
        pack(codes, torch.ones(8, 8), bits=4)
    with pytest.raises(ValueError, match="does not fit 4 bits"):
        pack(codes + 16, scales, bits=4)
    with pytest.raises(ValueError, match="exactly 8 of every 16"):
        pack(codes, scales, bits=4, keep_NK=half.roll(1, 1) & half, layout="8:16")
    with pytest.raises(ValueError, match="exactly 8 of every 16"):
        pack(codes, scales, bits=4, layout="8:16")
    with pytest.raises(ValueError, match="layout 'sparse'"):
        pack(codes, scales, bits=4, layout="sparse")
    with pytest.raises(ValueError, match="zeros"):
        pack(codes, scales, bits=4, zeros_NG=torch.zeros(8, 1))
    long = torch.zeros(1, 66048, dtype=torch.uint8)
    with pytest.raises(ValueError, match="up to 65535"):
        pack(long, torch.ones(1, 1), bits=4, keep_NK=long == 1)


@pytest.mark.parametrize("layout", ["dense", "bitmap"])
def test_scattered_groups_are_sorted(layout: str) -> None:
    parts = random_parts(layout, bits=4, outputs=20, inputs=320, groups=5, symmetric=False)
    scattered = replace(parts, g_idx=(torch.arange(320) * 7 + 3) % 5)
    weight = from_parts(scattered)
    codes, keep = unpack(weight)
    assert weight.layout == layout
    assert torch.equal(codes.long(), reference.codes(scattered))
    assert torch.equal(keep, reference.kept(scattered))
    runs = from_parts(replace(parts, g_idx=torch.arange(320) // 64))
    assert runs.order is None
    with pytest.raises(ValueError, match="as many inputs each"):
        from_parts(replace(parts, g_idx=(torch.arange(320) % 5).clamp(max=3)))


def test_blocks_are_whole_tiles() -> None:
    """A tile of bytes needs 32 of them along inputs, or compiled kernels carry weights through shared memory."""
    for layout, bits, bytes_each in (
        ("dense", 3, 1),
        ("dense", 2, 2),
        ("8:16", 4, 2),
        ("8:16", 3, 2),
        ("bitmap", 4, 2),
    ):
        per_place = {"dense": 8, "8:16": 16, "bitmap": 16}[layout]
        assert block_of(layout, bits) // per_place * bytes_each == 32


def test_neither_triton_nor_a_gpu_is_needed_to_import() -> None:
    code = """
import sys
sys.modules["triton"] = None
import torch
from ctp_kernels.triton import matmul, pack
weight = pack(torch.zeros(8, 32, dtype=torch.uint8), torch.ones(8, 1), bits=4)
try:
    matmul(torch.ones(1, 32), weight)
except ValueError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "need triton" in done.stdout, done.stderr
