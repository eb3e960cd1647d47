"""The kernels as a GPU runs them, against the oracle: what interpreting and compiling do not show.

Compiling takes minutes: `pytest -m slow tests/unit/kernels/test_triton_on_gpu.py -n 8` where pytest-xdist is installed.
"""

from dataclasses import replace

import pytest
import torch
from ctp_kernels import reference, rooflines
from ctp_kernels.reference import PackedParts
from ctp_kernels.triton import dequantize, from_parts, matmul
from ctp_kernels.triton.config import Config
from ctp_kernels.triton.ops import available, input_gradient
from interpreted_products import CASES, parts_of

DEVICE = "cuda"
TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 4e-3, torch.float32: 1e-6}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (torch.cuda.is_available() and available()), reason="needs a GPU and triton"),
]


def moved(parts: PackedParts) -> PackedParts:
    names = ("codes", "scales", "mask", "zeros", "g_idx")
    return replace(parts, **{name: x.to(DEVICE) for name in names if (x := getattr(parts, name)) is not None})


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.detach().double().cpu() - wanted.cpu()).norm() / wanted.norm())


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", CASES)
def test_products_gradients_and_weights_are_the_oracles(name: str, dtype: torch.dtype) -> None:
    case, limit = CASES[name], TOLERANCE[dtype]
    parts = parts_of(case)
    weight = from_parts(moved(parts))
    x, gy = (torch.randn(case.batch, size).to(dtype) for size in (case.inputs, case.outputs))
    wanted = reference.matmul(x.double(), parts)
    for config in (None, Config(case.block_m, case.block_n, case.splits), Config(16, 64, 2, 8, 2)):
        if config is None or config.splits <= weight.padded_inputs // weight.block:
            assert distance(matmul(x.to(DEVICE), weight, config=config), wanted) < limit
    assert distance(input_gradient(gy.to(DEVICE), weight), reference.input_gradient(gy.double(), parts)) < limit
    assert distance(dequantize(weight, dtype=dtype), reference.decode(parts)) < limit


@pytest.mark.parametrize("kind", rooflines.LAYOUTS)
def test_split_products_are_the_same_bits_from_run_to_run_on_two_streams_and_in_graphs(kind: str) -> None:
    shape = rooflines.LayerShape(4096, 4096)
    weight = from_parts(rooflines.random_layer(shape, kind, torch.Generator().manual_seed(0), device=DEVICE))
    split = Config(16, 64, 8, 4, 2)
    x = torch.randn(3, 4096, device=DEVICE, dtype=torch.float16)
    first = matmul(x, weight, config=split)
    wanted = x.double() @ dequantize(weight, dtype=torch.float32).double().T
    assert distance(first, wanted) < TOLERANCE[torch.float16]
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    found = []
    for _ in range(100):
        for stream in streams:
            with torch.cuda.stream(stream):
                found.append(matmul(x, weight, config=split))
    graphs = []
    for _ in streams:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found.append(matmul(x, weight, config=split))
        graphs.append(graph)
    torch.cuda.synchronize()
    for _ in range(50):
        for graph, stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(y, first) for y in found)
