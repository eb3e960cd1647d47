"""Norms and gated products: values as transformers writes them, gradients those of float64, inputs alone kept."""

from collections.abc import Callable

import pytest
import torch
from ctp_kernels import elementwise
from ctp_kernels.elementwise import gated_silu, made_again, rms_norm
from torch import Tensor
from torch.nn import functional
from transformers.models.llama.modeling_llama import LlamaRMSNorm

SHAPES = [(1, 1), (3, 7), (2, 5, 64), (33, 100), (300, 576)]
NEAR = {torch.float32: 1e-6, torch.bfloat16: 3e-3, torch.float16: 5e-4}


@pytest.fixture(params=["compiled", "plain"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "plain":
        monkeypatch.setattr(elementwise, "_library", lambda *_: None)
    elif elementwise._built() is None:
        pytest.skip("this processor has no AVX2, or there is no C++ compiler")
    return str(request.param)


def distance(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def gradients(function: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in inputs]
    y = function(*leaves)
    outer = torch.randn(y.shape, generator=torch.Generator().manual_seed(9)).to(y.dtype)
    return list(torch.autograd.grad(y, leaves, outer))


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dtype", NEAR)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_norm_is_llamas(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(len(shape))
    norm = LlamaRMSNorm(shape[-1], 1e-2).to(dtype).requires_grad_(False)
    norm.weight.copy_(torch.randn(shape[-1], generator=generator))
    x = (3 * torch.randn(*shape, generator=generator)).to(dtype)
    assert distance(rms_norm(x, norm.weight, 1e-2), norm(x)) < NEAR[dtype]
    found = gradients(lambda x: rms_norm(x, norm.weight, 1e-2), x)[0]

    def exact(x: Tensor) -> Tensor:
        return norm.weight.double() * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-2)

    wanted = gradients(exact, x.double())[0]
    if shape[-1] > 1:  # of one input nearly nothing of the gradient is left
        assert distance(found, wanted) < 2 * NEAR[dtype]
    assert found.dtype == dtype


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dtype", NEAR)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_gated_product_is_the_written_one(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(len(shape))
    gate, up = (torch.randn(*shape, generator=generator).to(dtype) * scale for scale in (6, 1))
    assert distance(gated_silu(gate, up), functional.silu(gate) * up) < NEAR[dtype]
    exact = gradients(lambda gate, up: functional.silu(gate) * up, gate.double(), up.double())
    for found, wanted in zip(gradients(gated_silu, gate, up), exact, strict=True):
        assert distance(found, wanted) < 2 * NEAR[dtype] and found.dtype == dtype


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extremes(dtype: torch.dtype) -> None:
    gate = torch.tensor([-1e30, -100.0, -88.5, 0.0, 88.5, 1e30, torch.inf, torch.nan], dtype=dtype)
    found, wanted = gated_silu(gate, torch.ones_like(gate)), functional.silu(gate)
    torch.testing.assert_close(found, wanted, rtol=1e-2, atol=1e-30, equal_nan=True)
    x = torch.full((2, 64), torch.nan, dtype=dtype)
    x[1] = 0
    normed = rms_norm(x, torch.ones(64, dtype=dtype), 1e-5)
    assert normed[0].isnan().all() and (normed[1] == 0).all()


@pytest.mark.usefixtures("way")
def test_a_view_is_as_good_as_a_copy() -> None:
    x, weight = torch.randn(6, 40)[:, ::2], torch.randn(20)
    assert distance(rms_norm(x, weight, 1e-5), rms_norm(x.contiguous(), weight, 1e-5)) < 1e-6
    for found, wanted in zip(
        gradients(gated_silu, x.T, x.T + 1), gradients(gated_silu, x.T.contiguous(), x.T + 1), strict=True
    ):
        assert distance(found, wanted) < 1e-6


@pytest.mark.usefixtures("way")
def test_any_number_of_threads_gives_the_same_bits() -> None:
    x, weight, before, found = torch.randn(99, 128), torch.randn(128), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append((rms_norm(x, weight, 1e-5), *gradients(gated_silu, x, x + 1)))
    finally:
        torch.set_num_threads(before)
    for others in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))


def test_what_is_made_again_has_the_same_gradients_and_inputs_alone_are_kept() -> None:
    gate, up = torch.randn(5, 8), torch.randn(5, 8)

    def gelu_gated(gate: Tensor, up: Tensor) -> Tensor:
        return functional.gelu(gate, approximate="tanh") * up

    def again(gate: Tensor, up: Tensor) -> Tensor:
        return made_again(gelu_gated, gate, up)

    for found, wanted in zip(gradients(again, gate, up), gradients(gelu_gated, gate, up), strict=True):
        assert torch.equal(found, wanted)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        y = made_again(gelu_gated, gate.requires_grad_(), up)
    assert [x.data_ptr() for x in kept] == [gate.data_ptr(), up.data_ptr()]
    y.sum().backward()
    assert up.grad is None and gate.grad is not None
