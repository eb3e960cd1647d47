"""Causal attention by kernels of our own, differentiable: float32 with AVX2, bfloat16 with AVX-512 BF16.

B=batch H=heads K=key-value heads T=queries S=keys D=width of a head
"""

import ctypes
import functools
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from ctp_kernels.cpu.build import AVX2, AVX512, AVX512_BF16, Level, load


def causal_attention(q_BHTD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, scale: float) -> Tensor | None:
    """softmax(scale q k^T) v over the keys up to each query, or None where no kernel of ours fits.

    Shapes: q (B, H, T, D), k and v (B, K, S, D) with K a divisor of H; float32 or bfloat16 on the CPU, contiguous in D,
    which is a multiple of 64 (of 16 in float32 without AVX-512). Where there are more keys than queries the first
    S - T, a prefix, are seen by every query. Returns (B, H, T, D) of the same dtype, laid out as (B, T, H, D).
    Raises: MemoryError.
    Sums and softmax are float32; of bfloat16 the weights, and the gradients of scores, are rounded to bfloat16. Nothing
    of the size of the scores is kept for the backward pass, and no key or value more than once.
    """
    tensors = (q_BHTD, k_BKSD, v_BKSD)
    dtype = q_BHTD.dtype
    if any(x.dtype != dtype or x.device.type != "cpu" or x.dim() != 4 or x.stride(3) != 1 for x in tensors):
        return None
    batch, heads, queries, width = q_BHTD.shape
    key_heads, keys = k_BKSD.shape[1:3]
    wanted = (batch, key_heads, keys, width)
    if k_BKSD.shape != wanted or v_BKSD.shape != wanted or heads % key_heads or not 0 < queries <= keys:
        return None
    kernel = _kernel(dtype)
    if kernel is None or width % kernel.tile:
        return None
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        out_BHTD: Tensor = _Attention.apply(*tensors, scale)
        return out_BHTD
    return _forward(*tensors, scale, None)


class CausalMasks:
    """Whether every query sees all keys up to its own, the last query's being the last: also where a mask says so.

    Layers share their mask, so that the last one's answer is remembered, as long as nobody writes into the mask.
    """

    def __init__(self) -> None:
        self._last: tuple[weakref.ref[Tensor], int, bool] | None = None

    def __call__(self, query: Tensor, key: Tensor, options: dict[str, Any]) -> bool:
        """With the options that torch's scaled_dot_product_attention is given beside these two."""
        queries, keys = query.shape[-2], key.shape[-2]
        mask: Tensor | None = options.get("attn_mask")
        if mask is None:  # without either, every query sees all keys
            return queries == (keys if options.get("is_causal") else 1)
        if mask.shape[-2:] != (queries, keys) or keys < queries:
            return False
        if mask.is_inference():  # nothing tells whether it was written into
            return _says_causal(mask)
        last, version = self._last, mask._version
        if last is None or last[0]() is not mask or last[1] != version:
            last = self._last = weakref.ref(mask), version, _says_causal(mask)
        return last[2]


def _says_causal(mask: Tensor) -> bool:
    queries, keys = mask.shape[-2:]
    wanted = torch.ones(queries, keys, dtype=torch.bool, device=mask.device).tril(keys - queries)
    if mask.dtype == torch.bool:
        return torch.equal(mask, wanted.expand_as(mask))
    seen, unseen = mask == 0, mask <= torch.finfo(mask.dtype).min
    return bool((seen == wanted).all() and (seen | unseen).all())


class prefix_attention(TorchFunctionMode):
    """A context in which attention of a text behind a prefix skips what a token does not see; differentiable.

    With more keys than queries transformers describes causality by a mask. Under a mask PyTorch computes every score,
    those of later tokens too, so that attention takes twice as long as without a prefix, whatever the prefix's length.
    Attention of other kinds goes its own way, and so does that behind a prefix that is longer than the text.
    """

    def __init__(self) -> None:
        super().__init__()
        self._is_causal = CausalMasks()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not functional.scaled_dot_product_attention or len(args) != 3:
            return func(*args, **kwargs)
        query, key, value = args
        return attention_without_mask(func, query, key, value, kwargs, self._is_causal)


def attention_without_mask(
    plain: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    options: dict[str, Any],
    is_causal: CausalMasks,
) -> Tensor:
    """`plain`, with empty queries for a prefix before those of the text: that is square and needs no mask.

    Where nothing is gained by it, or where it would be something else, `plain` as it is.
    """
    queries, prefix = query.shape[-2], key.shape[-2] - query.shape[-2]
    masked = options.get("attn_mask") is not None and not options.get("dropout_p")
    if not masked or not 0 < prefix < queries or not is_causal(query, key, options):
        return plain(query, key, value, **options)
    square = functional.pad(query, (0, 0, prefix, 0))
    return plain(square, key, value, **options | {"attn_mask": None, "is_causal": True})[..., prefix:, :]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_BHTD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, scale: float) -> Tensor:
        logs_BHT = torch.empty(q_BHTD.shape[:3])
        out_BHTD = _forward(q_BHTD, k_BKSD, v_BKSD, scale, logs_BHT)
        ctx.save_for_backward(q_BHTD, k_BKSD, v_BKSD, logs_BHT)
        ctx.scale = scale
        return out_BHTD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q_BHTD, k_BKSD, v_BKSD, logs_BHT = ctx.saved_tensors
        outer_BTHD = outer[0].to(q_BHTD.dtype).transpose(1, 2).contiguous()
        made = [torch.empty(x.transpose(1, 2).shape, dtype=x.dtype) for x in (q_BHTD, k_BKSD, v_BKSD)]
        pointers = (x.data_ptr() for x in (q_BHTD, k_BKSD, v_BKSD, outer_BTHD, logs_BHT, *made))
        if _known(q_BHTD.dtype).backward(*pointers, *_description(q_BHTD, k_BKSD, v_BKSD, ctx.scale)):
            raise MemoryError(f"no memory for the gradient of attention over {k_BKSD.shape[2]} tokens")
        of_q, of_k, of_v = (x.transpose(1, 2) for x in made)
        return of_q, of_k, of_v, None


def _forward(q_BHTD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, scale: float, logs_BHT: Tensor | None) -> Tensor:
    batch, heads, queries, width = q_BHTD.shape
    out_BTHD = torch.empty(batch, queries, heads, width, dtype=q_BHTD.dtype)
    pointers = (x.data_ptr() for x in (q_BHTD, k_BKSD, v_BKSD, out_BTHD))
    logs = None if logs_BHT is None else logs_BHT.data_ptr()
    if _known(q_BHTD.dtype).forward(*pointers, logs, *_description(q_BHTD, k_BKSD, v_BKSD, scale)):
        raise MemoryError(f"no memory for attention over {k_BKSD.shape[2]} tokens")
    return out_BTHD.transpose(1, 2)


def _description(q_BHTD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, scale: float) -> tuple[Any, ...]:
    sizes = (ctypes.c_int64 * 6)(*q_BHTD.shape[:2], k_BKSD.shape[1], q_BHTD.shape[2], *k_BKSD.shape[2:])
    strides = (ctypes.c_int64 * 9)(*(stride for x in (q_BHTD, k_BKSD, v_BKSD) for stride in x.stride()[:3]))
    return sizes, strides, scale, torch.get_num_threads()


@dataclass(frozen=True)
class _Kernel:
    forward: Any
    backward: Any
    tile: int
    """What the width of a head has to be a multiple of."""


@functools.cache
def _kernel(dtype: torch.dtype) -> _Kernel | None:
    """This processor's, None where it has none."""
    name, levels = _LIBRARIES.get(dtype, ("", ()))
    library = load(name, *levels) if name else None
    if library is None:
        return None
    pointer = ctypes.c_void_p
    made = _Kernel(getattr(library, name), getattr(library, f"{name}_backward"), getattr(library, f"{name}_tile")())
    made.forward.argtypes = [*[pointer] * 7, ctypes.c_float, ctypes.c_int64]
    made.backward.argtypes = [*[pointer] * 10, ctypes.c_float, ctypes.c_int64]
    return made


def _known(dtype: torch.dtype) -> _Kernel:
    kernel = _kernel(dtype)
    assert kernel is not None
    return kernel


_LIBRARIES: dict[torch.dtype, tuple[str, tuple[Level, ...]]] = {
    torch.bfloat16: ("attention_bf16", (AVX512_BF16,)),
    torch.float32: ("attention_f32", (AVX512, AVX2)),
}
