"""RMS norms and the product of a gated MLP, whose backward pass needs their inputs alone.

    y = rms_norm(x, weight, epsilon)
    h = gated_silu(gate, up)
    h = made_again(lambda gate, up: gelu(gate) * up, gate, up)

Written out in PyTorch both keep float32 copies, or the activation, between forward and backward pass: a third of what a
block of Llama's keeps. On a CPU with AVX2 and a C++ compiler each is one compiled pass over memory.

N=rows D=width
"""

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from ctp_kernels.cpu.build import AVX2, AVX512, load

_SUFFIXES = {torch.float32: "f32", torch.bfloat16: "bf16"}


def rms_norm(x: Tensor, weight_D: Tensor, epsilon: float) -> Tensor:
    """weight x / sqrt(mean(x^2) + epsilon), as Llama's norm rounds it: what is normalized, before it is weighted.

    Shapes: x (..., D), any float dtype, float32 inside; weight (D,), without a gradient. Differentiable once, in x.
    """
    if torch.is_grad_enabled() and x.requires_grad:
        y: Tensor = _RmsNorm.apply(x, weight_D, epsilon)
        return y
    return _normed(x, weight_D, epsilon)


def gated_silu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) up, rounded after the activation, too.

    Shapes: equal, any float dtype, float32 inside. Differentiable once.
    """
    if torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad):
        y: Tensor = _GatedSilu.apply(gate, up)
        return y
    return _gated(gate, up)


def made_again(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """function(*inputs), made a second time on the way back; differentiable once, in the inputs alone."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        y: Tensor = _MadeAgain.apply(function, *inputs)
        return y
    return function(*inputs)


class _MadeAgain(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*inputs)
        ctx.function = function
        return function(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[1:]
        inputs = [x.detach().requires_grad_(asked) for x, asked in zip(ctx.saved_tensors, wanted, strict=True)]
        with torch.enable_grad():
            made = ctx.function(*inputs)
        gradients = iter(torch.autograd.grad(made, [x for x in inputs if x.requires_grad], outer[0]))
        return None, *(next(gradients) if asked else None for asked in wanted)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, epsilon: float) -> Tensor:
        ctx.save_for_backward(x, weight_D)
        ctx.epsilon = epsilon
        return _normed(x, weight_D, epsilon)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None, None]:
        x, weight_D = ctx.saved_tensors
        outside = outer[0].contiguous()
        library = _library(x, weight_D)
        if library is not None:
            gradient = torch.empty_like(x)
            pointers = (tensor.data_ptr() for tensor in (outside, x, weight_D, gradient))
            getattr(library, f"rms_norm_backward_{_SUFFIXES[x.dtype]}")(*pointers, *_sizes(x, ctx.epsilon))
            return gradient, None, None
        wide_x = x.float()
        inverse = torch.rsqrt(wide_x.square().mean(-1, keepdim=True) + ctx.epsilon)
        of_normed = (outside * weight_D).float()
        along = (of_normed * wide_x).mean(-1, keepdim=True).mul_(inverse.square())
        return (of_normed - along * wide_x).mul_(inverse).to(x.dtype), None, None


class _GatedSilu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return _gated(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        outside = outer[0].contiguous()
        library = _library(gate, up)
        if library is not None:
            of_gate, of_up = torch.empty_like(gate), torch.empty_like(up)
            pointers = (tensor.data_ptr() for tensor in (outside, gate, up, of_gate, of_up))
            getattr(library, f"gated_silu_backward_{_SUFFIXES[gate.dtype]}")(
                *pointers, gate.numel(), torch.get_num_threads()
            )
            return of_gate, of_up
        of_gate = torch.ops.aten.silu_backward(outside * up, gate)
        return of_gate, outside * functional.silu(gate)


def _normed(x: Tensor, weight_D: Tensor, epsilon: float) -> Tensor:
    library = _library(x, weight_D)
    if library is not None:
        y = _empty_like(x)
        pointers = (tensor.data_ptr() for tensor in (x, weight_D, y))
        getattr(library, f"rms_norm_{_SUFFIXES[x.dtype]}")(*pointers, *_sizes(x, epsilon))
        return y
    wide_x = x.float()
    return weight_D * (wide_x * torch.rsqrt(wide_x.square().mean(-1, keepdim=True) + epsilon)).to(x.dtype)


def _gated(gate: Tensor, up: Tensor) -> Tensor:
    library = _library(gate, up)
    if library is not None:
        y = _empty_like(gate)
        pointers = (tensor.data_ptr() for tensor in (gate, up, y))
        getattr(library, f"gated_silu_{_SUFFIXES[gate.dtype]}")(*pointers, gate.numel(), torch.get_num_threads())
        return y
    return functional.silu(gate).mul_(up)


def _empty_like(x: Tensor) -> Tensor:
    """With a few bytes more behind it, where what is kept as large as x may lie when this is gone.

    PyTorch asks for addresses that are multiples of 64; glibc (2.36) then searches for so much more than the size that
    what was freed is never found again by what is as large. Learning took 0.12 GB more of a model of 135M weights.
    """
    size = x.numel()
    return torch.empty(size + 128, dtype=x.dtype)[:size].view(x.shape)


def _sizes(x: Tensor, epsilon: float) -> tuple[Any, ...]:
    return x.shape[:-1].numel(), x.shape[-1], epsilon, torch.get_num_threads()


def _library(*tensors: Tensor) -> ctypes.CDLL | None:
    """None where these tensors, or this processor, need PyTorch's operations."""
    dtype = tensors[0].dtype
    if dtype not in _SUFFIXES or any(
        x.device.type != "cpu" or x.dtype != dtype or not x.is_contiguous() for x in tensors
    ):
        return None
    return _built()


@functools.cache
def _built() -> ctypes.CDLL | None:
    library = load("elementwise", AVX512, AVX2)
    if library is None:
        return None
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    for suffix in _SUFFIXES.values():
        for name, pointers in (("rms_norm", 3), ("rms_norm_backward", 4)):
            function = getattr(library, f"{name}_{suffix}")
            function.argtypes = [*[pointer] * pointers, number, number, ctypes.c_float, number]
            function.restype = None
        for name, pointers in (("gated_silu", 3), ("gated_silu_backward", 5)):
            function = getattr(library, f"{name}_{suffix}")
            function.argtypes, function.restype = [*[pointer] * pointers, number, number], None
    return library
