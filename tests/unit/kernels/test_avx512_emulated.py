"""The kernels' AVX-512 branches on a processor that has none: their tests again, over intrinsics in plain C++.

A kernel is compiled for AVX2 with the macros of AVX-512 set, and `tests/emulation/immintrin.h` stands before the
compiler's header. That shows what a branch computes, not how fast it is nor what the compiler makes of it.
"""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from ctp_kernels import attention, gram, unpack
from ctp_kernels.cpu import build
from ctp_kernels.cpu.build import AVX2, AVX2_F16C, AVX512, AVX512_BF16, AVX512_VNNI, Level
from ctp_kernels.descent import Fit, Quadratic
from ctp_kernels.ragged import pack_bits, pack_kept, row_starts
from ctp_kernels.unpack import dense_rows
from test_attention import *  # noqa: F403
from test_descent import *  # noqa: F403
from test_descent import problem
from test_gram import *  # noqa: F403
from test_packed import *  # noqa: F403
from test_unpack import *  # noqa: F403

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not build.cpu_features().issuperset(AVX2.needs) or not any(map(shutil.which, build._COMPILERS)),
        reason="AVX-512 is emulated on a processor with AVX2, by a C++ compiler",
    ),
]
EMULATION = Path(__file__).resolve().parents[2] / "emulation"
LEVELS = {
    "attention_bf16": [AVX512_BF16],
    "attention_f32": [AVX512, AVX2],
    "descent": [AVX512_BF16, AVX512, AVX2],
    "gram_bf16": [AVX512_BF16],
    "packed": [AVX512_VNNI, AVX2_F16C],
    "unpack": [AVX512_BF16, AVX2],
}


@pytest.fixture(scope="module")
def emulation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Kernels are built with the emulated instructions; one that cannot be is an error here, not a test skipped."""
    build_natively = build._built

    def built(name: str, flags: tuple[str, ...]) -> Path:
        features = [flag.removeprefix("-m").upper() for flag in flags if flag.startswith("-mavx512")]
        if features:
            flags = (f"-I{EMULATION}", *AVX2.flags, *(f"-D__{feature}__" for feature in features))
        return build_natively(name, flags)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CTP_CACHE", str(tmp_path_factory.mktemp("emulated")))  # its key knows nothing of the header
        patch.setattr(build, "_built", built)
        patch.setattr(build, "_SECONDS", 900)
        for name, levels in LEVELS.items():
            for level in levels:
                try:
                    built(name, level.flags)
                except subprocess.CalledProcessError as error:
                    pytest.fail(f"{name}.cpp does not compile: {error.stderr.decode()}", pytrace=False)
        yield


@pytest.fixture(autouse=True)
def on_avx512_bf16(emulation: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    take(Level((*AVX512_BF16.needs, *AVX512_VNNI.needs), ()), monkeypatch)
    yield
    forget()


def forget() -> None:
    """Which kernel was taken for the processor there was."""
    build.load.cache_clear()
    attention._kernel.cache_clear()


def take(level: Level, monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on the processor has this level and AVX2."""
    for module in (build, gram):
        monkeypatch.setattr(module, "cpu_features", lambda: frozenset(AVX2.needs + level.needs))
    forget()


@pytest.mark.parametrize("inputs", range(1, 34))
@pytest.mark.parametrize(("level", "tolerance"), [(AVX512, 1e-5), (AVX512_BF16, 0.02)], ids=["avx512", "avx512_bf16"])
def test_both_branches_of_descent_come_to_the_same(
    inputs: int, level: Level, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    W, keep, H = problem(5, inputs)
    start, fits = W * keep, []
    for taken in (AVX2, level):
        take(taken, monkeypatch)
        quadratic = Quadratic(H)
        assert quadratic._narrow == (taken is AVX512_BF16)
        fits.append(Fit(start.clone(), (W - start) @ H))
        quadratic.descend(fits[-1], keep, steps=2)
    for part in ("values_OI", "residual_OI"):
        plain, wide = (getattr(fit, part) for fit in fits)
        # float32 sums in two orders; with BF16 the directions are rounded to eight bits
        assert (plain - wide).abs().max() <= tolerance * plain.abs().max()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_both_branches_of_unpacking_give_the_same_bits(
    bits: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(bits)
    for inputs in range(8, 137, 8):
        codes = torch.randint(0, 2**bits, (33, inputs), generator=generator).to(torch.uint8)
        keep = torch.rand(33, inputs, generator=generator) < torch.linspace(0, 1, 33)[:, None]  # none to all
        packed = pack_kept(codes, keep, bits), pack_bits(keep), row_starts(pack_bits(keep), bits)
        scales, zeros = torch.randn(33, 1, generator=generator), torch.rand(33, 1, generator=generator) * 2**bits
        results = []
        for taken in (AVX2, AVX512_BF16):
            take(taken, monkeypatch)
            assert unpack._library() is not None
            results.append(dense_rows(*packed, scales, zeros, bits=bits, dtype=dtype))
        bits_of = torch.int16 if dtype == torch.bfloat16 else torch.int32
        assert torch.equal(*(result.view(bits_of) for result in results))
