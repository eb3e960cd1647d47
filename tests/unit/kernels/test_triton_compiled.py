"""The kernels compiled for GPUs that are not there: nothing spilled, tensor cores used, loads asynchronous."""

import importlib.util
import os
from pathlib import Path

import pytest
import torch
from ctp_kernels.triton import aot
from ctp_kernels.triton.config import Config, default, shared_bytes

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="triton is not installed: there is none for this platform"
    ),
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET", "0") == "1", reason="TRITON_INTERPRET=1: kernels are not compiled here"
    ),
]
LAYOUTS = ("dense", "8:16", "bitmap")
TENSOR_CORES = {"sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "v_mfma"}
"""Instructions where they are not HMMA."""
QUICK = {*(("dense", target) for target in aot.TARGETS)} | {
    (layout, target) for layout in LAYOUTS for target in ("sm_80", "gfx942")
}
SHARED_BYTES = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}
"""By NVIDIA's and AMD's documentation, for one block of threads; 101376 elsewhere."""


def everywhere(*, quick: set[tuple[str, str]]) -> list[object]:
    return [
        pytest.param(layout, target, marks=() if (layout, target) in quick else pytest.mark.slow)
        for layout in LAYOUTS
        for target in aot.TARGETS
    ]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def check(compiled: aot.Compiled) -> None:
    target = compiled.target
    assert compiled.spilled == 0, compiled
    assert compiled.shared_bytes <= SHARED_BYTES.get(target, 101376), compiled
    assert set(compiled.tensor) == {TENSOR_CORES.get(target, "HMMA")}, compiled
    # Triton has no asynchronous copies for gfx942
    assert (compiled.asynchronous_copies > 0) == (target != "gfx942"), compiled


@pytest.mark.parametrize(("layout", "target"), everywhere(quick=QUICK))
def test_decoding(layout: str, target: str) -> None:
    weight = aot.sample(layout, 4)
    compiled = aot.compile_forward(weight, target, batch=1)
    check(compiled)
    device = aot.TARGETS[target]
    assert compiled.shared_bytes <= shared_bytes(default(1, weight, device), weight, device)


@pytest.mark.parametrize(("layout", "target"), everywhere(quick={("dense", "sm_90")}))
def test_larger_batches(layout: str, target: str) -> None:
    weight = aot.sample(layout, 4)
    device = aot.TARGETS[target]
    for batch in (64, 512):
        compiled = aot.compile_forward(weight, target, batch=batch)
        check(compiled)
        assert compiled.shared_bytes <= shared_bytes(default(batch, weight, device), weight, device)


@pytest.mark.parametrize(("layout", "target"), everywhere(quick={("dense", "sm_90"), ("8:16", "sm_80")}))
def test_bfloat16(layout: str, target: str) -> None:
    check(aot.compile_forward(aot.sample(layout, 4), target, dtype=torch.bfloat16, batch=16))


@pytest.mark.parametrize(
    "without", [(), ("group_of",), ("group_of", "keep"), ("keep",), ("scales", "zeros", "group_of", "codes")]
)
@pytest.mark.parametrize(
    "target", [pytest.param(name, marks=() if name in ("sm_80", "sm_90") else pytest.mark.slow) for name in aot.TARGETS]
)
def test_the_solvers_loops(target: str, without: tuple[str, ...]) -> None:
    for compiled in aot.compile_columns(target, without=without).values():
        # ptxas puts two numbers on the stack in one case (sm_90, one grid)
        assert compiled.spilled <= 8 and compiled.shared_bytes < 1024 and compiled.registers < 168, compiled


@pytest.mark.parametrize(("layout", "target"), everywhere(quick={("dense", "sm_80"), ("bitmap", "sm_90")}))
def test_weights_made_dense(layout: str, target: str) -> None:
    """No product is left in there, and nothing is spilled."""
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        compiled = aot.compile_dequantize(aot.sample(layout, 4), target, dtype=dtype)
        assert compiled.spilled == 0, compiled
        assert compiled.shared_bytes <= SHARED_BYTES.get(target, 101376), compiled
        assert not compiled.tensor


@pytest.mark.slow
@pytest.mark.parametrize("target", aot.TARGETS)
@pytest.mark.parametrize(("bits", "dtype"), [(2, torch.float16), (3, torch.bfloat16), (8, torch.float16)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_other_widths(layout: str, bits: int, dtype: torch.dtype, target: str) -> None:
    check(aot.compile_forward(aot.sample(layout, bits), target, dtype=dtype, batch=16))


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_86", "sm_90", "gfx942"])
@pytest.mark.parametrize(("group_size", "symmetric"), [(128, False), (64, True), (32, False)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_other_grids(layout: str, group_size: int, symmetric: bool, target: str) -> None:
    weight = aot.sample(layout, 4, group_size=group_size, symmetric=symmetric)
    device = aot.TARGETS[target]
    compiled = aot.compile_forward(weight, target, batch=16)
    check(compiled)
    assert compiled.shared_bytes <= shared_bytes(default(16, weight, device), weight, device)


def test_the_checks_above_can_fail() -> None:
    """A tile that is far too large is seen to spill, and one without stages to copy synchronously."""
    weight = aot.sample("dense", 4)
    spilled = aot.compile_forward(weight, "sm_80", config=Config(128, 128, 1, warps=4, stages=3))
    with pytest.raises(AssertionError):
        check(spilled)
    synchronous = aot.compile_forward(weight, "sm_80", config=Config(16, 64, 1, warps=4, stages=1))
    with pytest.raises(AssertionError):
        check(synchronous)
