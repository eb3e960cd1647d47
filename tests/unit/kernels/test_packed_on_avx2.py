"""What a processor with AVX-512 would otherwise never run here: the products' AVX2 branches."""

from collections.abc import Iterator

import pytest
from ctp_kernels.cpu import build
from ctp_kernels.cpu.build import AVX2_F16C, AVX512_VNNI
from test_packed import *  # noqa: F403

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not build.cpu_features().issuperset(AVX512_VNNI.needs), reason="test_packed.py runs AVX2's branches here"
    ),
]


@pytest.fixture(autouse=True)
def avx2_alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(build, "cpu_features", lambda: frozenset(AVX2_F16C.needs))
    build.load.cache_clear()
    yield
    build.load.cache_clear()
