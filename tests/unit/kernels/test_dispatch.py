"""Every way a product with a packed layer can take, against the oracle; and which one is taken."""

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ctp_kernels import dispatch, reference
from ctp_kernels.reference import PackedParts
from packed_layers import random_parts

TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 3e-3}
AVX2 = "avx2" in dispatch.cpu_features()
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


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rows", [1, 3, 16, 17])
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
def test_products_and_gradients_are_the_oracles(parts: PackedParts, rows: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    x = (torch.randn(1, rows, 256, generator=generator) + 1).to(dtype).requires_grad_()
    gy = torch.randn(1, rows, 128, generator=generator).to(dtype)
    weight = dispatch.prepare(parts)
    y = dispatch.matmul(x, weight)
    y.backward(gy)
    assert x.grad is not None
    assert y.dtype == x.grad.dtype == dtype
    assert distance(y, reference.matmul(x.detach().double(), parts)) < TOLERANCE[dtype]
    assert distance(x.grad, reference.input_gradient(gy.double(), parts)) < TOLERANCE[dtype]


@needs_avx2
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("capability", ["as it is", "default"])
def test_the_int4_form_is_the_only_one_held_and_gives_back_what_was_stored(symmetric: bool, capability: str) -> None:
    # how PyTorch orders codes depends on the processor, of which it can be told to see less only at the start
    code = (
        f"from test_dispatch import *\nparts, rows = layer(symmetric={symmetric}), torch.ones(2, 256).bfloat16()\n"
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
    monkeypatch.setattr(dispatch._Int4, "codes", lambda form: form.packed)
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
        (layer(), "cpu", torch.float32, 1, "dense", ("int4", "slower with torch.float32")),
        (layer(), "cpu", torch.bfloat16, 17, "dense", ("int4", "up to 16 rows, not with 17")),
        (layer("2:4"), "cpu", torch.bfloat16, 1, "dense", ("int4", "not 4 bits with a mask")),
        (layer(bits=8), "cpu", torch.bfloat16, 1, "dense", ("int4", "not 8 bits")),
        (layer(groups=16), "cpu", torch.bfloat16, 1, "dense", ("int4", "runs of 32, 64, 128 or 256")),
        (layer(outputs=72), "cpu", torch.bfloat16, 1, "dense", ("int4", "blocks of 64, not 72")),
        (layer(), "cpu", torch.float32, 1, "dense", ("triton", "needs a GPU, and this is cpu")),
        (layer("bitmap"), "cuda", torch.float16, 1, "triton", ("int4", "for the CPU")),
        (layer("bitmap"), "cuda", torch.float16, 1, "triton", ("dense", "triton comes first")),
        (layer("2:4"), "cuda", torch.bfloat16, 4000, "triton dense", ("triton", "more than 2048 rows")),
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
    monkeypatch.setattr(dispatch.ops, "available", lambda: True)
    choice = dispatch.explain(parts, device=device, dtype=dtype, rows=rows)
    assert choice.way == way
    assert why_not[1] in choice.others[why_not[0]]
    lines = str(choice).splitlines()
    assert len(lines) == len(dispatch.WAYS)
    assert lines[0].startswith(f"{way}: ")
    assert any(line.startswith(f"not {why_not[0]}: ") and why_not[1] in line for line in lines)


def test_choices_that_depend_on_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    def choice(device: str) -> dispatch.Choice:
        return dispatch.explain(layer(), device=device, dtype=torch.bfloat16, rows=1)

    monkeypatch.setattr(dispatch, "cpu_features", lambda: frozenset({"avx2"}))
    assert choice("cpu").way == "int4"
    monkeypatch.setattr(dispatch, "cpu_features", frozenset)
    assert choice("cpu").way == "dense"
    monkeypatch.setattr(dispatch.ops, "available", lambda: False)
    assert "pip install" in choice("cuda").others["triton"]


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
        assert found["bfloat16"] == "dense", "which the interpreter gets wrong"
