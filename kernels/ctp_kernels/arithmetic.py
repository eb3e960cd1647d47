"""What PyTorch does badly on a processor, done otherwise: 16-bit products in float32, attention by kernels of our own.

    with fast_arithmetic(model.device):
        model(ids)

PyTorch's products of bfloat16 matrices are fast where the processor has instructions for them (AVX-512 at least).
Elsewhere they take six to eight times as long as in float32, with gradients fifteen and more
(`benchmarks/sixteen_bit.py`). Tensors stay 16-bit outside of the operation, so that memory, and what is rounded, stay
as they were.

M=rows of a product I=in_features O=out_features
"""

import functools
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from ctp_kernels import one_row
from ctp_kernels.attention import CausalMasks, attention_without_mask, causal_attention, prefix_attention
from ctp_kernels.cpu.build import cpu_features

_FEW_ROWS = 8
"""Below, a product is as long as reading its matrix takes, and 16 bits are fewer."""


_UNREPEATED = "TRANSFORMERS_SDPA_FORCE_GQA"
"""Where it is 1, transformers hands over keys and values that heads share once, under a mask too."""


def fast_arithmetic(device: torch.device, *, behind_prefix: bool = False) -> AbstractContextManager[Any]:
    """A context in which a model on that device takes the fastest ways there are; differentiable.

    On the CPU these are ways for 16-bit products and attention. On other devices PyTorch's own are fast, but for the
    attention of text behind a prefix; asking about every operation would cost as long as launching it.
    """
    if device.type == "cpu":
        return _OnCpu()
    return prefix_attention() if behind_prefix else nullcontext()


class _OnCpu(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self._ways = dict.fromkeys(_PRODUCTS, _product) | {functional.linear: _linear}
        self._ways[functional.scaled_dot_product_attention] = self._attention
        self._is_causal = CausalMasks()
        self._before: list[str | None] = []

    def __enter__(self) -> Self:
        self._before.append(os.environ.get(_UNREPEATED))
        os.environ[_UNREPEATED] = "1"
        super().__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        before = self._before.pop()
        if before is None:
            del os.environ[_UNREPEATED]
        else:
            os.environ[_UNREPEATED] = before

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        way = self._ways.get(func)
        return func(*args, **(kwargs or {})) if way is None else way(func, *args, **(kwargs or {}))

    def _attention(
        self, plain: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor, **options: Any
    ) -> Tensor:
        """By our own kernel where it fits, of slow types in float32; results have their own dtype."""
        dtype = query.dtype
        if query.device.type != "cpu" or dtype not in _KNOWN:
            return plain(query, key, value, **options)
        ours = fast_attention(query, key, value, options, self._is_causal)
        if ours is not None:
            return ours
        if is_slow(query):
            mask = options.get("attn_mask")
            if mask is not None and mask.is_floating_point():
                options["attn_mask"] = mask.float()
            query, key, value = query.float(), key.float(), value.float()
        made = attention_without_mask(_repeated(plain), query, key, value, options, self._is_causal)
        return made.to(dtype)


def _repeated(plain: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Attention by `plain` with a mask or heads that share keys, not both: PyTorch has a fast way with one of them."""

    def attention(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        if options.get("attn_mask") is not None and options.pop("enable_gqa", False):
            key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
        return plain(query, key, value, **options)

    return attention


_KNOWN = (torch.float32, torch.bfloat16, torch.float16)


def fast_attention(
    query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any], is_causal: CausalMasks
) -> Tensor | None:
    """Attention on a CPU by our own kernel, None where PyTorch's is as fast or is the only one.

    Shapes and options as `torch.nn.functional.scaled_dot_product_attention` has them; heads may share keys. Returns
    (B, H, T, D) laid out as (B, T, H, D), in the query's dtype.
    PyTorch's float32 attention computes what a causal mask hides, and forward and backward take about twice as long as
    ours. With AVX-512 BF16, for heads of 64 or a multiple, our bfloat16 kernel takes a third of PyTorch's time, with
    gradients less than half, for one query a sixth. Without AVX-512, 16-bit attention takes about 1.5 times as long as
    float32.
    """
    if query.device.type != "cpu" or query.dtype not in _KNOWN or options.get("dropout_p"):
        return None
    slow = is_slow(query)
    # of one query keys and values are read where they lie, once
    tried = query.dtype == torch.float32 or slow or query.shape[-2] == 1 or "amx_bf16" not in cpu_features()
    if not tried or not is_causal(query, key, options):
        return None
    scale = options.get("scale")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    ours = causal_attention(query, key, value, scale)
    if ours is None and slow:
        ours = causal_attention(query.float(), key.float(), value.float(), scale)
    return None if ours is None else ours.to(query.dtype)


def wide(x: Tensor) -> Tensor:
    """x in float32 where its own type is slow to multiply on its device, else x."""
    return x.float() if is_slow(x) else x


def is_slow(x: Tensor) -> bool:
    """Whether PyTorch has no fast products for this tensor's type on this processor."""
    return x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16) and not _has_products(x.dtype)


def where_slow(x: Tensor) -> AbstractContextManager[Any]:
    """`fast_arithmetic` where tensors like x are slow to multiply, else nothing: models run as PyTorch runs them."""
    return _OnCpu() if is_slow(x) else nullcontext()


@functools.cache
def _has_products(dtype: torch.dtype) -> bool:
    known = torch.ops.mkldnn
    return bool(known._is_mkldnn_bf16_supported() if dtype == torch.bfloat16 else known._is_mkldnn_fp16_supported())


_PRODUCTS: tuple[Any, ...] = (
    *(torch.addmm, torch.matmul, torch.mm, torch.bmm, torch.baddbmm),
    *(torch.Tensor.addmm, torch.Tensor.matmul, torch.Tensor.mm, torch.Tensor.bmm, torch.Tensor.baddbmm),
)


def _product(plain: Callable[..., Tensor], *operands: Any, **options: Any) -> Tensor:
    tensors = [x for x in (*operands, *options.values()) if isinstance(x, Tensor)]
    if not all(is_slow(x) for x in tensors) or tensors[-2].shape[:-1].numel() < _FEW_ROWS or "out" in options:
        return plain(*operands, **options)
    widened = {name: x.float() if isinstance(x, Tensor) else x for name, x in options.items()}
    return plain(*(x.float() if isinstance(x, Tensor) else x for x in operands), **widened).to(tensors[0].dtype)


def _linear(plain: Callable[..., Tensor], input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    of_one_row = one_row.linear(input, weight, bias)
    if of_one_row is not None:
        return of_one_row
    if not is_slow(input) or input.shape[:-1].numel() < _FEW_ROWS:
        return plain(input, weight, bias)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (input, weight, bias)):
        made: Tensor = _Linear.apply(input, weight, bias)
        return made
    return functional.linear(input.float(), weight.float(), None if bias is None else bias.float()).to(input.dtype)


class _Linear(torch.autograd.Function):
    """Keeps for the backward pass what it needs of the operands, as they came and not in float32."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        ctx.save_for_backward(input if ctx.needs_input_grad[1] else None, weight_OI)
        bias_O = None if bias_O is None else bias_O.float()
        return functional.linear(input.float(), weight_OI.float(), bias_O).to(input.dtype)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        input, weight_OI = ctx.saved_tensors
        shape = (*outer[0].shape[:-1], weight_OI.shape[1])
        outer_MO = outer[0].float().flatten(0, -2)
        of_input = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            of_input = (outer_MO @ weight_OI.float()).to(outer[0].dtype).view(shape)
        if ctx.needs_input_grad[1]:
            of_weight = (outer_MO.T @ input.float().flatten(0, -2)).to(weight_OI.dtype)
        if ctx.needs_input_grad[2]:
            of_bias = outer_MO.sum(0).to(outer[0].dtype)
        return of_input, of_weight, of_bias
