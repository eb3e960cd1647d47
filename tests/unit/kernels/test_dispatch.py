"""Every way a product with a packed layer can take, against the oracle; and which one is taken."""

import copy
import importlib.util
import json
import os
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ctp_kernels import dispatch, reference, ways
from ctp_kernels.reference import PackedParts
from packed_layers import random_parts

TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 3e-3}
AVX2 = "avx2" in ways.cpu_features()
needs_packed = pytest.mark.skipif(not dispatch.packed.available(), reason="there is no AVX2, or no C++ compiler")
needs_avx2 = pytest.mark.skipif(not AVX2, reason="PyTorch's int4 product is taken on processors with AVX2")


def layer(layout: str = "dense", **other: Any) -> PackedParts:
    shape = {"bits": 4, "outputs": 128, "inputs": 256, "groups": 4, "symmetric": True}
    return random_parts(layout, **{**shape, **other})


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.detach().double() - wanted).norm() / wanted.norm())


def same_bits(one: PackedParts, other: PackedParts) -> bool:
    names = ("codes", "mask", "scales", "zeros", "g_idx")
    pairs = [(getattr(one, name), getattr(other, name)) for name in names]
    return all((a is None) == (b is None) and (a is None or torch.equal(a, b)) for a, b in pairs)


@pytest.mark.parametrize("way", ["packed", "no compiler"])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rows", [1, 3, 16, 17, 129])
@pytest.mark.parametrize(
    "parts",
    [
        layer(),
        layer(symmetric=False, groups=8),
        layer("2:4"),
        layer("8:16", bits=3, symmetric=False),
        layer("bitmap"),
        replace(layer(), g_idx=torch.arange(256) % 4),
    ],
)
def test_products_and_gradients_are_the_oracles(
    parts: PackedParts, rows: int, dtype: torch.dtype, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(3)
    if way == "no compiler":
        monkeypatch.setattr(dispatch.packed, "available", lambda: False)
    elif not dispatch.packed.available():
        pytest.skip("this processor has no AVX2, or there is no C++ compiler")
    x = (torch.randn(1, rows, 256, generator=generator) + 1).to(dtype).requires_grad_()
    gy = torch.randn(1, rows, 128, generator=generator).to(dtype)
    weight = dispatch.prepare(parts)
    assert (weight.explain(dtype, rows).way == "packed") == (way == "packed" and rows < 129)
    y = dispatch.matmul(x, weight)
    y.backward(gy)
    assert x.grad is not None
    assert y.dtype == x.grad.dtype == dtype
    assert distance(y, reference.matmul(x.detach().double(), parts)) < TOLERANCE[dtype]
    assert distance(x.grad, reference.input_gradient(gy.double(), parts)) < TOLERANCE[dtype]


def test_dense_codes_change_nothing_about_groups_that_a_way_refuses() -> None:
    parts = replace(layer("bitmap"), g_idx=torch.arange(256) % 3)
    told = [
        ways.explain(parts, device="cuda", dtype=torch.float16, rows=1, dense_codes=asked) for asked in (False, True)
    ]
    assert [choice.way for choice in told] == ["dense", "dense"]
    assert all("groups of as many inputs each" in choice.others["triton"] for choice in told)


@pytest.mark.parametrize("way", ["packed", "int4 or dense"])
@pytest.mark.parametrize("scattered", [False, True])
@pytest.mark.parametrize("bits", [4, 3])
@pytest.mark.parametrize(("layout", "symmetric"), [("2:4", True), ("bitmap", False), ("bitmap", True)])
def test_a_mask_can_give_way_to_dense_codes_and_comes_back(
    layout: str, symmetric: bool, bits: int, scattered: bool, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = layer(layout, symmetric=symmetric, bits=bits)
    if layout == "2:4":
        parts = replace(parts, codes=parts.codes.view(128, -1))  # as format ctp has them where all rows are as long
    if scattered:
        parts = replace(parts, g_idx=torch.arange(256) % 4)
    if way == "packed":
        if not dispatch.packed.available():
            pytest.skip("this processor has no AVX2, or there is no C++ compiler")
    else:
        monkeypatch.setattr(dispatch.packed, "available", lambda: False)
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    weight = dispatch.prepare(parts, dense_codes=True)
    told = ways.explain(parts, device="cpu", dtype=torch.bfloat16, rows=3, dense_codes=True)
    assert weight.explain(torch.bfloat16, 3) == told
    y = dispatch.matmul(x, weight)
    y.backward(torch.ones_like(y))
    assert x.grad is not None
    # PyTorch's int4 product rounds scales and shifts, so that its weights of 0 are not quite
    assert distance(y, reference.matmul(x.detach().double(), parts)) < (5e-3 if told.way == "int4" else 3e-3)
    assert distance(x.grad, reference.input_gradient(torch.ones(3, 128).double(), parts)) < 3e-3
    many = torch.randn(140, 256, generator=torch.Generator().manual_seed(1))
    assert distance(dispatch.matmul(many, weight), reference.matmul(many.double(), parts)) < 1e-6
    if told.way != "dense":
        held = weight.tensors()
        assert "own_mask" not in held and "mask" not in held and "codes" not in held
        assert weight.form is not None
    assert same_bits(weight.stored(), parts)
    assert same_bits(weight.restore(), parts) and weight.form is None


@pytest.mark.skipif(not dispatch.packed.available(), reason="there is no AVX2, or no C++ compiler")
def test_a_layer_may_change_to_dense_codes_after_products_as_stored() -> None:
    parts = layer("bitmap", symmetric=False)
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(0))
    weight, told = dispatch.prepare(parts), dispatch.prepare(parts, dense_codes=True)
    dispatch.matmul(x, weight)
    assert "mask" in weight.tensors()
    for _ in range(2):
        weight.use_dense_codes()
        assert torch.equal(dispatch.matmul(x, weight), dispatch.matmul(x, told))
        assert weight.tensors().keys() == told.tensors().keys() and "mask" not in weight.tensors()
    assert same_bits(weight.stored(), parts) and weight.dense_codes_pay() == 0


@pytest.mark.skipif(not dispatch.packed.available(), reason="there is no AVX2, or no C++ compiler")
def test_zero_points_that_no_code_reaches_are_left_to_dense_weights() -> None:
    parts = layer("bitmap", symmetric=False)
    parts = replace(parts, zeros=torch.full_like(parts.scales, 200, dtype=torch.uint8))
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(0))
    weight = dispatch.prepare(parts, dense_codes=True)
    assert distance(dispatch.matmul(x, weight), reference.matmul(x.double(), parts)) < 1e-6
    assert "zero points of up to 200" in weight.explain(torch.float32, 3).others["packed"]


@needs_avx2
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("capability", ["as it is", "default"])
def test_the_int4_form_is_the_only_one_held_and_gives_back_what_was_stored(symmetric: bool, capability: str) -> None:
    # how PyTorch orders codes depends on the processor, of which it can be told to see less only at the start
    code = (
        f"from test_dispatch import *\nparts, rows = layer(symmetric={symmetric}), torch.ones(2, 256).bfloat16()\n"
        "dispatch.packed.available = lambda: False\n"
        "weight = dispatch.prepare(parts)\nassert weight.form is None\ndispatch.matmul(rows, weight)\n"
        "assert weight.form is not None and 'codes' not in weight.tensors()\n"
        "held = sum(x.nbytes for x in weight.tensors().values())\n"
        "assert held <= 128 * 256 // 2 + 3 * parts.scales.nbytes + 128 * 4\n"
        "assert same_bits(weight.stored(), parts) and weight.form is not None\n"
        "many = torch.ones(40, 256).bfloat16()\n"
        "assert distance(dispatch.matmul(many, weight), reference.matmul(many.double(), parts)) < 3e-3\n"
        "assert same_bits(weight.restore(), parts) and weight.form is None and 'codes' in weight.tensors()\n"
    )
    told = {} if capability == "as it is" else {"ATEN_CPU_CAPABILITY": capability}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False,
        cwd=Path(__file__).parent, env={**os.environ, **told},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@needs_avx2
def test_an_unknown_order_of_codes_is_refused_and_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = layer()
    monkeypatch.setattr(dispatch.packed, "available", lambda: False)
    monkeypatch.setattr(dispatch.Int4Layer, "codes", lambda form: form.packed)
    weight = dispatch.prepare(parts)
    x = torch.randn(2, 256).bfloat16()
    assert distance(dispatch.matmul(x, weight), reference.matmul(x.double(), parts)) < 3e-3
    assert weight.form is None
    choice = weight.explain(torch.bfloat16, 2)
    assert choice.way == "dense"
    assert "order" in choice.others["int4"]


@pytest.mark.parametrize(
    ("parts", "device", "dtype", "rows", "way", "why_not"),
    [
        (layer(), "cpu", torch.float32, 1, "packed", ("int4", "slower with torch.float32")),
        (layer(), "cpu", torch.bfloat16, 17, "packed", ("int4", "up to 16 rows, not with 17")),
        (layer("2:4"), "cpu", torch.bfloat16, 1, "packed", ("int4", "not 4 bits with a mask")),
        (layer(bits=8), "cpu", torch.bfloat16, 1, "packed", ("int4", "not 8 bits")),
        (layer(groups=16), "cpu", torch.bfloat16, 1, "packed", ("int4", "runs of 32, 64, 128 or 256")),
        (layer(outputs=72), "cpu", torch.bfloat16, 1, "packed", ("int4", "blocks of 64, not 72")),
        (layer(), "cpu", torch.float32, 1, "packed", ("triton", "needs a GPU, and this is cpu")),
        (layer(), "cpu", torch.bfloat16, 1, "packed", ("packed int8", "was not asked for")),
        (layer(), "cpu", torch.bfloat16, 1, "packed", ("dense", "packed comes first")),
        (layer("bitmap"), "cpu", torch.float16, 129, "dense", ("packed", "up to 128 rows, not with 129")),
        (layer(), "cpu", torch.float64, 1, "dense", ("packed", "does not take torch.float64")),
        (layer(groups=64), "cpu", torch.float16, 1, "dense", ("packed", "64 groups of 256")),
        (layer("bitmap"), "cuda", torch.float16, 1, "triton", ("int4", "for the CPU")),
        (layer("bitmap"), "cuda", torch.float16, 1, "triton", ("dense", "triton comes first")),
        (layer("2:4"), "cuda", torch.bfloat16, 4000, "triton dense", ("triton", "more than 16 rows")),
        (layer(), "cuda", torch.float64, 1, "dense", ("triton", "does not take torch.float64")),
        (layer(groups=32), "cuda", torch.float16, 1, "dense", ("triton", "groups of 8 inputs")),
        (
            replace(layer(), g_idx=torch.cat([torch.zeros(100), torch.arange(156) % 4]).int()),
            *("cuda", torch.float16, 1, "dense", ("triton", "groups of as many inputs each")),
        ),
    ],
)
def test_the_choice_and_its_reasons(
    parts: PackedParts,
    device: str,
    dtype: torch.dtype,
    rows: int,
    way: str,
    why_not: tuple[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ways.ops, "available", lambda: True)
    monkeypatch.setattr(dispatch.packed, "available", lambda: True)
    choice = ways.explain(parts, device=device, dtype=dtype, rows=rows)
    assert choice.way == way
    assert why_not[1] in choice.others[why_not[0]]
    lines = str(choice).splitlines()
    assert len(lines) == len(ways.WAYS)
    assert lines[0].startswith(f"{way}: ")
    assert any(line.startswith(f"not {why_not[0]}: ") and why_not[1] in line for line in lines)


def test_choices_that_depend_on_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    def choice(device: str) -> ways.Choice:
        return ways.explain(layer(), device=device, dtype=torch.bfloat16, rows=1)

    monkeypatch.setattr(dispatch.packed, "available", lambda: True)
    assert choice("cpu").way == "packed"
    monkeypatch.setattr(dispatch.packed, "available", lambda: False)
    assert "C++ compiler" in choice("cpu").others["packed"]
    monkeypatch.setattr(ways, "cpu_features", lambda: frozenset({"avx2"}))
    assert choice("cpu").way == "int4"
    monkeypatch.setattr(ways, "cpu_features", frozenset)
    assert choice("cpu").way == "dense"
    monkeypatch.setattr(ways.ops, "available", lambda: False)
    assert "pip install" in choice("cuda").others["triton"]


@needs_packed
def test_activations_are_8_bit_where_that_was_asked_for() -> None:
    parts, x = layer("bitmap"), torch.randn(3, 256, generator=torch.Generator().manual_seed(1)).bfloat16()
    weight = dispatch.prepare(parts, int8_activations=True)
    wanted = reference.matmul(x.double(), parts)
    assert 3e-3 < distance(dispatch.matmul(x, weight), wanted) < 1e-2
    many = x.repeat(43, 1)
    assert distance(dispatch.matmul(many, weight), wanted.repeat(43, 1)) < 3e-3
    assert weight.explain(torch.bfloat16, 3).way == "packed int8"
    assert weight.explain(torch.bfloat16, 129).way == "dense"
    with_it = ways.explain(parts, device="cpu", dtype=torch.float32, rows=1, int8_activations=True)
    assert (with_it.way, with_it.others["packed"]) == ("packed int8", "packed int8 comes first")


@needs_packed
@pytest.mark.parametrize("layout", ["dense", "bitmap"])
def test_sorted_groups_are_the_only_form_held_and_give_back_what_was_stored(layout: str) -> None:
    order = torch.randperm(256, generator=torch.Generator().manual_seed(2)) % 4
    parts = replace(layer(layout, symmetric=False), g_idx=order.int())
    weight, x = dispatch.prepare(parts), torch.randn(2, 256)
    for rows in (x, x.repeat(70, 1), x):  # the second is made dense
        assert distance(dispatch.matmul(rows, weight), reference.matmul(rows.double(), parts)) < 1e-6
        assert weight.form is not None
    held = weight.tensors()
    assert not held.keys() & {"codes", "mask"} and torch.equal(held["g_idx"], order.int())
    stored = sum(getattr(parts, name).nbytes for name in ("mask", "scales", "zeros", "g_idx") if name in held
                 or f"own_{name}" in held)  # fmt: skip
    codes = held.pop("own_codes").nbytes
    assert sum(tensor.nbytes for tensor in held.values()) == stored + 256 * 8
    assert parts.codes.nbytes <= codes <= parts.codes.nbytes * 1.1, (
        "of a pair of outputs both take as much as the longer"
    )
    assert same_bits(weight.stored(), parts) and weight.form is not None
    assert same_bits(weight.restore(), parts) and weight.form is None


@needs_packed
@pytest.mark.parametrize("layout", ["dense", "2:4", "bitmap"])
def test_a_layer_is_not_held_twice_nor_its_copies(layout: str) -> None:
    parts = layer(layout)
    if layout == "2:4":
        parts = replace(parts, codes=parts.codes.view(128, -1))  # as format ctp has them where all rows are as long
    weight = dispatch.prepare(parts)
    y = dispatch.matmul(torch.ones(1, 256), weight)
    for again in (copy.deepcopy(weight), pickle.loads(pickle.dumps(weight))):
        assert again.form is None and same_bits(again.stored(), parts)
        assert torch.equal(dispatch.matmul(torch.ones(1, 256), again), y)
    dispatch.matmul(torch.ones(1, 256), weight)
    if dispatch.packed.takes_pairs(parts):
        form = weight.form
        assert isinstance(form, dispatch.PackedLayer) and weight._parts is None and weight._layer is form
        held = weight.tensors()
        assert "codes" not in held and held["own_codes"] is form.parts.codes and held["mask"] is parts.mask
        return
    assert weight.form is None
    assert weight.tensors()["codes"] is parts.codes
    layer_held = weight.form_for(torch.float32, 1)
    assert isinstance(layer_held, dispatch.PackedLayer) and layer_held.parts.codes.data_ptr() == parts.codes.data_ptr()


@needs_packed
def test_what_only_values_show_is_refused_and_explained() -> None:
    zeros = torch.full((128, 4), 8, dtype=torch.uint8)
    zeros[5, 2] = 16
    parts, x = replace(layer(), zeros=zeros), torch.randn(2, 256)
    weight = dispatch.prepare(parts)
    assert distance(dispatch.matmul(x, weight), reference.matmul(x.double(), parts)) < 1e-6
    choice = weight.explain(torch.float32, 2)
    assert choice.way == "dense" and "zero points of up to 16" in choice.others["packed"]


@pytest.mark.parametrize(
    "wrong",
    [
        replace(layer(), codes=layer().codes[:-1]),
        replace(layer("bitmap"), codes=layer("bitmap").codes[:-1]),
        replace(layer(), scales=layer().scales[:, :3]),
        replace(layer(), zeros=torch.zeros(128, 3, dtype=torch.uint8)),
        replace(layer("2:4"), mask=torch.zeros(64, 32, dtype=torch.uint8)),
        replace(layer(), g_idx=torch.full((256,), 4)),
    ],
)
def test_parts_that_do_not_go_together_are_refused(wrong: PackedParts) -> None:
    with pytest.raises(ValueError, match="do not go together"):
        dispatch.prepare(wrong)


def test_activations_that_do_not_fit_are_refused() -> None:
    weight = dispatch.prepare(layer())
    with pytest.raises(ValueError, match="256 inputs"):
        dispatch.matmul(torch.ones(2, 128), weight)
    with pytest.raises(ValueError, match="int64"):
        dispatch.matmul(torch.ones(2, 256, dtype=torch.int64), weight)
    with pytest.raises(ValueError, match="activations on meta"):
        dispatch.matmul(torch.ones(2, 256, device="meta"), weight)
    assert dispatch.matmul(torch.ones(0, 256), weight).shape == (0, 128)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_the_kernels_way_in_the_interpreter() -> None:
    program = Path(__file__).with_name("interpreted_dispatch.py")
    done = subprocess.run(
        [sys.executable, str(program)],
        capture_output=True, text=True, check=False, env={**os.environ, "TRITON_INTERPRET": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for name, found in json.loads(done.stdout).items():
        assert found["ways"] == ["triton", "triton dense"], name
        assert found["same_bits"], name
        tolerance = 1e-3 if "float16" in name else 1e-6
        # a NaN compares as False, too
        assert all(error < tolerance for error in found["errors"]), (name, found)
        assert "triton" not in found["bfloat16"], "which the interpreter gets wrong"
