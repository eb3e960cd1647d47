"""Activations made again in the backward pass: the same gradients from fewer tensors."""

import gc
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from ctp_cli.models.remade import _Remade, remade_activations


class Kept:
    """Every tensor that is kept for a backward pass, as it is packed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tensors: list[Tensor] = []
        self.remade: list[_Remade] = []
        pack = remade_activations._packed

        def watched(context: remade_activations, tensor: Tensor) -> object:
            packed = pack(context, tensor)
            self.remade.append(packed) if isinstance(packed, _Remade) else self.tensors.append(packed)
            return packed

        monkeypatch.setattr(remade_activations, "_packed", watched)


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> Kept:
    return Kept(monkeypatch)


class Gated(nn.Module):
    def __init__(self, activation: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
        super().__init__()
        self.gate, self.up, self.down = (
            nn.Linear(*shape, bias=False, dtype=dtype) for shape in ((8, 24), (8, 24), (24, 8))
        )
        self.activation = activation
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.float32)
        normed = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True))).to(x.dtype)
        out: Tensor = self.down(self.activation(self.gate(normed)) * self.up(normed))
        return out


ACTIVATIONS = [
    pytest.param(functional.silu, id="silu"),
    pytest.param(nn.SiLU(), id="SiLU"),
    pytest.param(lambda x: functional.gelu(x, approximate="tanh"), id="gelu"),
]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_the_same_bits_and_outputs_of_activations_are_not_kept(
    activation: Callable[[Tensor], Tensor], dtype: torch.dtype, kept: Kept
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Gated(activation, dtype), Gated(activation, dtype))
    x = torch.randn(5, 8).to(dtype).requires_grad_()
    gradients = []
    for context in (torch.enable_grad(), remade_activations()):
        with context:
            out = model(x)
        out.float().square().sum().backward()
        gradients.append(x.grad)
        x.grad = None
    assert torch.equal(*gradients) and gradients[0].abs().min() > 0
    assert sum(tensor.shape == (5, 24) for tensor in kept.tensors) == 4, "gate and up of two layers"
    widened = [tensor for tensor in kept.tensors if tensor.shape == (5, 8) and tensor.dtype == torch.float32]
    assert bool(widened) == (dtype == torch.float32)
    assert len(kept.remade) == 2 + (4 if dtype == torch.bfloat16 else 0)


def test_what_lies_where_an_activation_was_is_kept_as_it_is(kept: Kept) -> None:
    x = torch.randn(64, 64, requires_grad=True)
    with remade_activations() as context:
        for _ in range(20):  # the allocator hands out the same place again and again
            gone = functional.silu(x * 1.0)
            place = gone.data_ptr()
            del gone
            gc.collect()
            assert not context._made
            other = x.detach() + 1.0
            (x * other).sum().backward()
            if other.data_ptr() == place:
                break
        else:
            pytest.skip("the allocator gave other places")
    assert not kept.remade


def test_a_part_of_an_activation_is_not_taken_for_all_of_it() -> None:
    x = torch.randn(6, 4, requires_grad=True)
    gradients = []
    for context in (torch.enable_grad(), remade_activations()):
        with context:
            made = functional.silu(x * 1.0)
            loss = (made[:3] * made[3:] * made[:3].T[:3, :3].sum()).sum()
        gradients.extend(torch.autograd.grad(loss, x))
    assert torch.equal(*gradients)


def test_an_activation_in_place_is_left_alone(kept: Kept) -> None:
    x = torch.randn(6, 4, requires_grad=True)
    y = x * 1.0
    with remade_activations():
        loss = (functional.silu(y, inplace=True) * x).sum()
    loss.backward()
    wanted = torch.autograd.grad((functional.silu(x) * x).sum(), x)[0]
    assert not kept.remade
    torch.testing.assert_close(x.grad, wanted)
