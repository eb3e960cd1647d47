"""Products with packed layers, each by the best way there is for it: y = x W^T, differentiable with respect to x.

    weight = prepare(parts)                # tensors of format ctp, on the CPU or a GPU
    y = matmul(x, weight)

`ctp_kernels.ways` says what ways there are, chooses, and explains.

A layer is held once: as it is stored, or, from its first product on, in the form that its way wants. `Weight.stored`
gives back the stored form to the last bit, so the two never take memory at the same time. Threads may multiply while
another one saves.

M=rows (batch x tokens) N=outputs K=inputs G=groups
"""

import threading
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ctp_kernels import densified, packed
from ctp_kernels.arithmetic import wide
from ctp_kernels.int4_product import Int4Layer
from ctp_kernels.packed import PackedLayer
from ctp_kernels.ragged import pack_bits, pack_kept, row_starts
from ctp_kernels.reference import PackedParts
from ctp_kernels.triton import layouts, ops
from ctp_kernels.unpack import dense_rows
from ctp_kernels.ways import (
    DENSE,
    FEW_ROWS,
    INT4,
    PACKED,
    PACKED_INT8,
    SOME_ROWS,
    TRITON,
    TRITON_DENSE,
    Choice,
    choose,
    dense_codes_pay,
    most_rows,
    unequal_groups,
)

changing = threading.RLock()
"""Held while any layer goes from one form to another, and by whoever needs one to stay in its form."""


def prepare(parts: PackedParts, *, int8_activations: bool = False, dense_codes: bool = False) -> "Weight":
    """A layer ready for `matmul`. Its tensors are taken over, not copied; nothing is converted before it is needed.

    Shapes, dtypes: as `reference.PackedParts` has them, all tensors on one device.
    int8_activations: x may be rounded to 8 bits, which is faster and costs 6e-3 of y and more (`packed.product_int8`).
        It is where there is a kernel for it; larger batches, gradients' own products and GPUs compute as without.
    dense_codes: multiply with a code for every weight, also for those that a mask leaves out. The same products, faster
        where decoding and not memory is what takes the time (docs/kernels.md), for 1 / density times the codes; the
        mask stays in main memory, for `Weight.stored`.
    Raises: ValueError if the parts do not go together.
    """
    return Weight(parts, int8_activations=int8_activations, dense_codes=dense_codes)


def matmul(x: Tensor, weight: "Weight") -> Tensor:
    """y = x W^T, differentiable with respect to x.

    Shapes: x (..., K), any float dtype, on the weight's device; returns (..., N) in x's dtype.
    Errors against float64, relative: 1e-6 for float32, 1e-3 for float16, 3e-3 for bfloat16, 1e-2 where x is 8-bit, and
    more where it has outliers (docs/kernels.md).
    Raises: ValueError for another width or device, or integers.
    """
    if x.shape[-1] != weight.inputs or not x.is_floating_point():
        raise ValueError(f"{tuple(x.shape)} {x.dtype}: no floating-point rows of the layer's {weight.inputs} inputs")
    if x.device != weight.device:
        raise ValueError(f"activations on {x.device}, weights on {weight.device}")
    if not (torch.is_grad_enabled() and x.requires_grad):
        return _multiplied(x, weight)  # without autograd's bookkeeping, which small layers notice
    y: Tensor = _Product.apply(x, weight)
    return y


class Weight:
    """A packed layer, held as it is stored or as the way of its last product wants it. Made by `prepare`."""

    def __init__(self, parts: PackedParts, *, int8_activations: bool = False, dense_codes: bool = False) -> None:
        self.int8_activations = int8_activations
        self._mask: Tensor | None = None  # of a layer whose ways are given dense codes
        self._shape = parts.codes.shape
        self._parts: PackedParts | None = parts
        self._own: _Own | None = None
        self._layer: PackedLayer | None = None  # of the tensors in `_parts`, or `_own` itself
        self._g_idx = parts.g_idx
        self._ways: dict[tuple[torch.dtype, int], str] = {}  # by the number of bounds below the rows of x
        self._refused: dict[str, str] = {}
        self._starts_N = _checked_starts(parts)
        self._about = _moved(parts, torch.device("meta"))
        self._bounds = sorted((0, FEW_ROWS, SOME_ROWS, most_rows(self._about)))
        self.outputs, self.inputs, self.device = parts.outputs, self._about.inputs, parts.codes.device
        if dense_codes:
            self.use_dense_codes()
        if parts.g_idx is not None and (refusal := unequal_groups(parts)):
            self._refused = {TRITON: refusal, TRITON_DENSE: refusal}

    def explain(self, dtype: torch.dtype, rows: int) -> Choice:
        """As the function of that name in `ways`, for this layer where it is."""
        choice = choose(self._about, self.device, dtype, rows, self._refused, self.int8_activations)
        return replace(choice, dense_codes=self._mask is not None)

    def use_dense_codes(self) -> None:
        """From here on as if `prepare` had been told so."""
        with changing:
            mask = self.restore().mask
            if mask is not None:
                self._mask, self._about = mask.cpu(), densified.described(self._about)
                self._bounds = sorted((0, FEW_ROWS, SOME_ROWS, most_rows(self._about)))
                self._ways.clear()

    def dense_codes_pay(self) -> int:
        """As the function of that name in `ways`, for this layer where it is."""
        return dense_codes_pay(self._about, device=self.device)

    @property
    def form(self) -> object | None:
        """The form of its own in which a way holds the layer, None while it is as stored."""
        return self._own

    def stored(self) -> PackedParts:
        """The parts that `prepare` was given, rebuilt if a way holds them in a form of its own."""
        with changing:
            parts, own, mask = self._parts, self._own, self._mask
        if parts is not None:
            return parts
        assert own is not None
        if isinstance(own, layouts.PackedWeight):
            found = _stored(own, self._about, self._g_idx)
        elif isinstance(own, Int4Layer):
            found = own.stored()
        else:
            found = own.stored(self._g_idx)
        if mask is not None:
            return densified.with_mask(found, mask.to(self.device), self._shape)
        return replace(found, codes=found.codes.view(self._shape))

    def __getstate__(self) -> dict[str, Any]:
        """As it is stored: a copy may go where other ways are taken, and shares nothing with the form it would have."""
        with changing:
            self.restore()
            return self.__dict__ | {"_ways": {}}

    def restore(self) -> PackedParts:
        """`stored`, and hold the layer that way again until its next product."""
        with changing:
            self._parts, self._own, self._layer = parts, *_ = self.stored(), None, None
        return parts

    def tensors(self) -> dict[str, Tensor]:
        """What the layer takes in memory, but for row starts and a mask that dense codes have put aside.

        "own_NAME" for what only a way's own form has.
        """
        if self._parts is not None:
            return _tensors(self._parts)
        assert self._own is not None
        if isinstance(self._own, PackedLayer):
            layer, parts = self._own, self._own.parts
            sorted_mask = None if layer.order is None else parts.mask
            held = {"order": layer.order, "codes": parts.codes, "mask": sorted_mask}
            own = {f"own_{name}": tensor for name, tensor in held.items() if tensor is not None}
            rest = {"scales": parts.scales, "zeros": parts.zeros, "g_idx": self._g_idx}
            rest |= {"mask": parts.mask} if layer.order is None else {}
            return own | {name: tensor for name, tensor in rest.items() if tensor is not None}
        own = {f"own_{name}": tensor for name, tensor in self._own.tensors().items()}
        if isinstance(self._own, Int4Layer):
            return own | {name: x for name, x in _tensors(self._own.rest).items() if name != "codes"}
        return own if self._g_idx is None else own | {"g_idx": self._g_idx}

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weights (N, K) in `dtype`, rounded once from float32 products."""
        with changing:
            parts, own = self._parts, self._own
        if parts is not None:
            return _dense(parts, self._starts_N, dtype)
        if isinstance(own, layouts.PackedWeight) and dtype in ops.DTYPES:
            return ops.dequantize(own, dtype=dtype)
        if isinstance(own, PackedLayer):
            dense_NK = _dense(own.unpaired, own.starts_N, dtype)
            return dense_NK if own.order is None else dense_NK[:, own.order.argsort()]
        if isinstance(own, Int4Layer):
            parts = own.stored()
            return _dense(parts, _checked_starts(parts), dtype)
        return _dense(self.stored(), self._starts_N, dtype)

    def form_for(self, dtype: torch.dtype, rows: int) -> "_Own | None":
        """The form that the chosen way wants, made if need be; None for dense weights."""
        kind = (dtype, bisect_left(self._bounds, rows))
        way = self._ways.get(kind)
        if way is None:
            with changing:
                way = self._ways[kind] = self.explain(dtype, rows).way
        if way == DENSE:
            return None
        wanted = _FORMS[way]
        made = self._made(way)
        if isinstance(made, wanted):
            return made
        with changing:
            made = self._made(way)
            return made if isinstance(made, wanted) else self._make(wanted, dtype, rows)

    def _made(self, way: str) -> "_Own | None":
        return self._layer if way in (PACKED, PACKED_INT8) else self._own

    def _make(self, wanted: Any, dtype: torch.dtype, rows: int) -> "_Own | None":
        parts = self.restore()
        try:
            if self._mask is not None:
                parts = densified.without_mask(parts)
            made: _Own = wanted.of(parts) if wanted is not layouts.PackedWeight else layouts.from_parts(parts)
        except ValueError as refusal:  # what shapes alone do not show
            refused = {other: str(refusal) for other, form in _FORMS.items() if form is wanted}
            self._refused = self._refused | refused
            self._ways.clear()
            return self.form_for(dtype, rows)
        if isinstance(made, PackedLayer):
            self._layer = made
        if not isinstance(made, PackedLayer) or made.own or self._mask is not None:
            self._own, self._parts = made, None
        return made


def _multiplied(x: Tensor, weight: Weight) -> Tensor:
    rows = x.numel() // weight.inputs
    form = weight.form_for(x.dtype, rows)
    if isinstance(form, PackedLayer):
        return _packed_product(x.dtype, weight.int8_activations)(x, form)
    x_MK = x.reshape(-1, weight.inputs)
    if isinstance(form, layouts.PackedWeight) and rows <= most_rows(weight._about):
        y_MN = ops.matmul(x_MK, form)
    elif isinstance(form, Int4Layer):
        y_MN = form.matmul(x_MK)
    else:
        y_MN = functional.linear(wide(x_MK), weight.dense(wide(x_MK).dtype)).to(x.dtype)
    return y_MN.view(*x.shape[:-1], weight.outputs)


class _Product(torch.autograd.Function):
    """Keeps no dense weights for the backward pass, which takes its own way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Weight) -> Tensor:
        ctx.weight = weight
        return _multiplied(x, weight)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None]:
        weight: Weight = ctx.weight
        gy_MN = outer[0].reshape(-1, weight.outputs)
        by_kernels = weight.device.type != "cpu" or ops.interpreted()
        form = weight.form_for(gy_MN.dtype, len(gy_MN)) if by_kernels else None
        if isinstance(form, layouts.PackedWeight):
            gx_MK = ops.input_gradient(gy_MN, form)
        else:
            gx_MK = (wide(gy_MN) @ weight.dense(wide(gy_MN).dtype)).to(gy_MN.dtype)
        return gx_MK.view(*outer[0].shape[:-1], weight.inputs), None


_Own = layouts.PackedWeight | PackedLayer | Int4Layer
_FORMS: dict[str, Any] = {
    TRITON: layouts.PackedWeight,
    TRITON_DENSE: layouts.PackedWeight,
    PACKED_INT8: PackedLayer,
    PACKED: PackedLayer,
    INT4: Int4Layer,
}


def _packed_product(dtype: torch.dtype, int8_activations: bool) -> Callable[[Tensor, PackedLayer], Tensor]:
    if int8_activations:
        return packed.product_int8
    # what 16-bit types round themselves is more than what these integers do
    return packed.product if dtype == torch.float32 else packed.product_int16


def _dense(parts: PackedParts, starts_N: Tensor, dtype: torch.dtype) -> Tensor:
    zeros_NG = parts.zeros
    if zeros_NG is None:
        zeros_NG = torch.full_like(parts.scales, 2 ** (parts.bits - 1))
    return dense_rows(
        parts.codes, parts.mask, starts_N, parts.scales, zeros_NG, bits=parts.bits, dtype=dtype, g_idx_I=parts.g_idx
    )


def _checked_starts(parts: PackedParts) -> Tensor:
    """(N + 1,) int64: the byte at which each output's codes begin. Raises ValueError if the parts do not fit."""
    wrong = ValueError("codes, mask, scales and zeros of this layer do not go together")
    if parts.scales.dim() != 2 or not parts.scales.numel() or parts.codes.dtype != torch.uint8:
        raise wrong
    outputs, groups = parts.scales.shape
    if parts.mask is None:
        per_row = parts.codes.numel() // outputs
        starts_N = torch.arange(outputs + 1, device=parts.codes.device) * per_row
    elif parts.mask.dim() == 2 and len(parts.mask) == outputs and parts.mask.dtype == torch.uint8:
        starts_N = row_starts(parts.mask, parts.bits)
    else:
        raise wrong
    fits = (
        int(starts_N[-1]) == parts.codes.numel()
        and parts.inputs > 0
        and (parts.inputs % groups == 0 or parts.g_idx is not None)
        and (parts.zeros is None or parts.zeros.shape == parts.scales.shape)
        and (parts.g_idx is None or _in_groups(parts.g_idx, parts.inputs, groups))
    )
    if not fits:
        raise wrong
    return starts_N


def _in_groups(g_idx_K: Tensor, inputs: int, groups: int) -> bool:
    return g_idx_K.shape == (inputs,) and 0 <= int(g_idx_K.min()) <= int(g_idx_K.max()) < groups


def _stored(own: layouts.PackedWeight, about: PackedParts, g_idx_K: Tensor | None) -> PackedParts:
    """The inverse of `layouts.from_parts`; `about` has the shapes of what is stored."""
    codes_NK, keep_NK = layouts.unpack(own)
    outputs, groups = about.scales.shape
    grid = [None if x is None else x.T[:outputs, :groups].contiguous() for x in (own.scales_GN, own.zeros_GN)]
    assert grid[0] is not None
    return PackedParts(
        codes=pack_kept(codes_NK, keep_NK, own.bits).view(about.codes.shape),
        scales=grid[0],
        bits=own.bits,
        mask=None if about.mask is None else pack_bits(keep_NK),
        zeros=grid[1],
        g_idx=g_idx_K,
    )


def _tensors(parts: PackedParts) -> dict[str, Tensor]:
    names = ("codes", "mask", "scales", "zeros", "g_idx")
    return {name: tensor for name in names if (tensor := getattr(parts, name)) is not None}


def _moved(parts: PackedParts, device: torch.device) -> PackedParts:
    moved: dict[str, Any] = {name: tensor.to(device) for name, tensor in _tensors(parts).items()}
    return replace(parts, **moved)
