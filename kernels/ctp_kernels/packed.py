"""Products of a few rows of x with packed layers on the CPU: codes are decoded in registers and multiplied at once.

    layer = PackedLayer.of(parts)
    y = product(x, layer)
    y = product_int16(x, layer)    # x rounded to 16 bits per 128 inputs, sums of integers: twice as fast
    y = product_int8(x, layer)     # to 8 bits

Weights are exact in all of them. Needs AVX2 and a C++ compiler (`available`). Layers are multiplied as they are stored,
with two exceptions. Where inputs belong to scattered groups (`g_idx`), they are sorted by group. And with AVX-512 the
4-bit codes of a layer with a mask are laid out in pairs of outputs: as they are stored a block's begin anywhere in a
byte, and cutting them out took longer than reading them.

M=rows (batch x tokens) N=outputs K=inputs G=groups
"""

import ctypes
import functools
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ctp_kernels.cpu.build import AVX2_F16C, AVX512_VNNI, load
from ctp_kernels.ragged import bits_set, pack_bits, pack_kept, row_starts, unpack_bits, unpack_kept
from ctp_kernels.reference import PackedParts

BITS = (2, 3, 4, 8)
_SEGMENT, _SHORT, _LONGEST = 128, 48, 2048
"""Inputs of a segment, a run with scales of its own. Groups are cut into the longest equal ones between the first two,
or are one segment, of no more inputs than 32-bit sums hold. Each is padded to a multiple of 64."""
_DENSE, _HALF, _BITMAP, _PAIRED, _PAIRED_FEW = range(5)
_OFTEN = 0.04
"""Blocks of 64 inputs that may have more than 32 codes where fewer are expected: a processor jumps wrongly at each."""
_LONGER = 1.25
"""A pair takes what the longer of its outputs' codes need. More than that of what is stored is not spent on it."""
_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_NEEDS = "products with packed layers need a processor with AVX2 and a C++ compiler"


@dataclass(frozen=True)
class PackedLayer:
    """A layer that is known to be whole. Make it with `of`.

    parts: groups are runs of inputs there; its codes are those of pairs where there are such.
    starts_N (N + 1,) int64: the byte at which each output's codes begin, by themselves.
    order (K,) int64, where inputs were sorted by group: which input is at each place; None for their own order.
    pairs_P (N / 2, rounded up, + 1) int64: the byte at which the codes of outputs 2 p and 2 p + 1 begin, where those
    are the low and the high half of bytes.
    """

    parts: PackedParts
    starts_N: Tensor
    order: Tensor | None
    _kind: int
    pairs_P: Tensor | None = None

    @classmethod
    def of(cls, parts: PackedParts) -> "PackedLayer":
        """Tensors are shared with `parts` but for codes and mask of layers with scattered groups, and codes of pairs.

        Raises: ValueError for what `refusal` says, and for parts that do not go together.
        """
        if why := refusal(parts):
            raise ValueError(why)
        tensors = (parts.codes, parts.mask, parts.scales, parts.zeros, parts.g_idx)
        if away := [str(x.device) for x in tensors if x is not None and x.device.type != "cpu"]:
            raise ValueError(f"takes tensors on the CPU, not on {away[0]}")
        order = None
        if parts.g_idx is not None:
            groups = parts.scales.shape[1]
            members_G = parts.g_idx.long().bincount(minlength=groups)
            if not bool((members_G * groups == parts.inputs).all()):
                raise ValueError("needs groups of as many inputs each")
            order = parts.g_idx.long().argsort(stable=True)
            parts = replace(_ordered(parts, order), g_idx=None)
        mask_NB, zeros_NG = (None if x is None else x.contiguous() for x in (parts.mask, parts.zeros))
        parts = replace(
            parts, codes=parts.codes.contiguous(), mask=mask_NB, scales=parts.scales.contiguous(), zeros=zeros_NG
        )
        kind = _DENSE
        if mask_NB is None:
            starts_N = torch.arange(parts.outputs + 1) * (parts.inputs * parts.bits // 8)
        else:
            starts_N, kept_NB = row_starts(mask_NB, parts.bits), bits_set(mask_NB)
            halves = parts.bits != 8 and _segment(parts) % 16 == 0
            halves = halves and bool((kept_NB[:, ::2] + kept_NB[:, 1::2] == 8).all())
            kind = _HALF if halves else _BITMAP
        if int(starts_N[-1]) != parts.codes.numel():
            raise ValueError(f"{parts.codes.numel()} bytes of codes where there should be {int(starts_N[-1])}")
        if zeros_NG is not None and int(zeros_NG.max()) >= 2**parts.bits:
            raise ValueError(f"zero points of up to {int(zeros_NG.max())} with codes of {parts.bits} bits")
        return cls(parts, starts_N, order, kind)._paired()

    @functools.cached_property
    def _sizes(self) -> "ctypes.Array[ctypes.c_int64]":
        """As `packed_product` takes them."""
        parts = self.parts
        sizes = (parts.codes.numel(), parts.outputs, parts.inputs, parts.scales.shape[1])
        return (ctypes.c_int64 * 7)(*sizes, _segment(parts), parts.bits, self._kind)

    @property
    def _starts(self) -> Tensor:
        return self.starts_N if self.pairs_P is None else self.pairs_P

    def __getstate__(self) -> dict[str, Any]:  # ctypes cannot be pickled, and pairs are not everywhere
        kind = _BITMAP if self.pairs_P is not None else self._kind
        return {"parts": self.unpaired, "starts_N": self.starts_N, "order": self.order, "_kind": kind, "pairs_P": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.__dict__.update(self._paired().__dict__)

    @property
    def own(self) -> bool:
        """Whether codes are others than those of the parts this was made of."""
        return self.order is not None or self.pairs_P is not None

    @property
    def unpaired(self) -> PackedParts:
        """`parts`, with each output's codes by themselves."""
        if self.pairs_P is None:
            return self.parts
        codes = torch.empty(int(self.starts_N[-1]), dtype=torch.uint8)
        self._rearrange("packed_unpair", self.parts.codes, self.pairs_P, codes)
        return replace(self.parts, codes=codes)

    def stored(self, g_idx: Tensor | None) -> PackedParts:
        """The parts this was made of, whose `g_idx` is given. What pads an output's codes may come back as zeros."""
        if self.order is None:
            return self.unpaired
        return replace(_ordered(self.unpaired, self.order.argsort()), g_idx=g_idx)

    def _paired(self) -> "PackedLayer":
        """Itself, or in pairs where those are multiplied with."""
        parts = self.parts
        if parts.mask is None or not takes_pairs(parts):
            return self
        kept_NB = bits_set(parts.mask)
        kept_P = nn.functional.pad(kept_NB.sum(1), (0, len(kept_NB) % 2)).view(-1, 2).amax(1)
        pairs_P = nn.functional.pad(kept_P.cumsum(0), (1, 0))
        blocks = kept_NB.flatten()[: kept_NB.numel() // 8 * 8].view(-1, 8).sum(1, dtype=torch.uint8)
        few = not len(blocks) or int((blocks > 32).sum()) <= _OFTEN * len(blocks)
        if int(pairs_P[-1]) > _LONGER * parts.codes.numel():
            return self
        codes = torch.empty(int(pairs_P[-1]), dtype=torch.uint8)
        self._rearrange("packed_pair", parts.codes, pairs_P, codes)
        return replace(self, parts=replace(parts, codes=codes), _kind=_PAIRED_FEW if few else _PAIRED, pairs_P=pairs_P)

    def _rearrange(self, function: str, codes: Tensor, pairs_P: Tensor, out: Tensor) -> None:
        library = _library()
        if library is None:
            raise RuntimeError(_NEEDS)
        addresses = [x.data_ptr() for x in (codes, self.starts_N, pairs_P, out)]
        getattr(library, function)(*addresses[:2], self.parts.outputs, *addresses[2:], torch.get_num_threads())


def available() -> bool:
    """Whether this processor and its compiler can run these products."""
    return _library() is not None


def takes_pairs(parts: PackedParts) -> bool:
    """Whether codes of such a layer, which may be on the meta device, are multiplied as those of pairs of outputs."""
    library = _library()
    return parts.mask is not None and parts.bits == 4 and library is not None and bool(library.packed_takes_pairs())


def refusal(parts: PackedParts) -> str:
    """Why these products do not take such a layer, by shapes and types alone; empty if they do."""
    if parts.bits not in BITS:
        return f"takes codes of 2, 3, 4 or 8 bits, not {parts.bits}"
    if parts.scales.dim() != 2 or parts.scales.dtype != torch.float16:
        return "takes scales of float16 (N, G)"
    outputs, groups = parts.scales.shape
    if not parts.scales.numel() or parts.inputs == 0 or parts.inputs % (8 * groups):
        return f"takes groups of a multiple of 8 inputs, not {groups} groups of {parts.inputs}"
    if _segment(parts) > _LONGEST:
        return f"takes groups of up to {_LONGEST} inputs, or such that runs of {_SHORT} to {_SEGMENT} divide"
    if parts.zeros is not None and (parts.zeros.shape, parts.zeros.dtype) != (parts.scales.shape, torch.uint8):
        return "takes zero points of uint8, one for each scale"
    if parts.codes.dtype != torch.uint8 or (parts.mask is not None and parts.mask.dtype != torch.uint8):
        return "takes codes and masks of uint8"
    if parts.mask is not None and (parts.mask.dim() != 2 or len(parts.mask) != outputs):
        return f"takes a mask of {outputs} rows"
    if parts.g_idx is not None and parts.g_idx.shape != (parts.inputs,):
        return f"takes a group for each of the {parts.inputs} inputs"
    return ""


def product(x: Tensor, layer: PackedLayer) -> Tensor:
    """y = x W^T: weights exact, sums in float32, rounded once to x's dtype.

    Shapes: x (..., K), float32, float16 or bfloat16, on the CPU; returns (..., N).
    Raises: ValueError for another shape, dtype or device; RuntimeError where `available` is false; MemoryError.
    """
    return _product(x, layer, 32)


def product_int16(x: Tensor, layer: PackedLayer) -> Tensor:
    """As `product`, with x rounded to a step of 1 / 32639 of the largest in each run of at most 128 inputs.

    That is at most 1e-4 of such a run's norm, and 3e-5 for values of a normal distribution; bfloat16 itself rounds to
    2e-3, float16 to 2e-4. A run of values below 1e-30 is taken as zeros. Products of integers are summed without
    rounding within a run.
    """
    return _product(x, layer, 16)


def product_int8(x: Tensor, layer: PackedLayer) -> Tensor:
    """As `product_int16`, with steps of 1 / 127: about 6e-3 of y. Where x has outliers, more in their runs."""
    return _product(x, layer, 8)


def dense_codes(layer: PackedLayer) -> Tensor:
    """(N * K * bits / 8,) uint8: the codes of a layer with a mask as one without has them, in the same order of inputs.

    What the mask leaves out gets its zero point.
    Raises: RuntimeError where `available` is false; MemoryError.
    """
    parts, library = layer.parts, _library()
    if library is None:
        raise RuntimeError(_NEEDS)
    out = torch.empty(parts.outputs * parts.inputs * parts.bits // 8, dtype=torch.uint8)
    tensors = (parts.codes, parts.mask, layer._starts, parts.scales, parts.zeros)
    failed = library.packed_dense_codes(
        *(None if x is None else x.data_ptr() for x in tensors),
        *(layer._sizes, out.data_ptr(), torch.get_num_threads()),
    )
    if failed:
        raise MemoryError(f"no memory for codes of {parts.inputs} inputs")
    return out


def _product(x: Tensor, layer: PackedLayer, width: int) -> Tensor:
    parts, library, type_of_x = layer.parts, _library(), _TYPES.get(x.dtype)
    _, outputs, inputs, *_ = layer._sizes
    if type_of_x is None or not x.dim() or x.shape[-1] != inputs or x.device.type != "cpu":
        raise ValueError(f"{tuple(x.shape)} {x.dtype} on {x.device}: no rows of {inputs} inputs on the CPU")
    if library is None:
        raise RuntimeError(_NEEDS)
    x = (x if layer.order is None else x[..., layer.order]).contiguous()
    y = torch.empty((*x.shape[:-1], outputs), dtype=x.dtype)
    tensors = (parts.codes, parts.mask, layer._starts, parts.scales, parts.zeros)
    rows = x.numel() // inputs
    failed = library.packed_product(
        *(None if tensor is None else tensor.data_ptr() for tensor in tensors),
        *(layer._sizes, x.data_ptr(), type_of_x, rows, width, y.data_ptr(), torch.get_num_threads()),
    )
    if failed:
        raise MemoryError(f"no memory for a product of {rows} rows of {inputs} inputs")
    return y


def _segment(parts: PackedParts) -> int:
    group = parts.inputs // parts.scales.shape[1]
    if group <= _SEGMENT:
        return group
    return next((size for size in range(_SEGMENT, _SHORT - 1, -8) if group % size == 0), group)


def _ordered(parts: PackedParts, order: Tensor) -> PackedParts:
    """The same weights with their inputs in this order."""
    keep_NK = (
        torch.ones(parts.outputs, parts.inputs, dtype=torch.bool) if parts.mask is None else unpack_bits(parts.mask)
    )
    codes_NK, kept_NK = unpack_kept(parts.codes.flatten(), keep_NK, parts.bits)[:, order], keep_NK[:, order]
    return replace(
        parts,
        codes=pack_kept(codes_NK, kept_NK, parts.bits).view(parts.codes.shape),
        mask=None if parts.mask is None else pack_bits(kept_NK),
    )


def _library() -> ctypes.CDLL | None:
    library = load("packed", AVX512_VNNI, AVX2_F16C)
    if library is None:
        return None
    if library.packed_product.argtypes is None:
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        layer = [*[pointer] * 5, ctypes.POINTER(number)]
        library.packed_dense_codes.argtypes = [*layer, pointer, number]
        library.packed_dense_codes.restype = ctypes.c_int
        if library.packed_takes_pairs():
            for rearrange in (library.packed_pair, library.packed_unpair):
                rearrange.argtypes = [pointer, pointer, number, pointer, pointer, number]
        library.packed_product.restype = ctypes.c_int
        # the last one: another thread takes it for the sign that all are told
        library.packed_product.argtypes = [*layer, pointer, number, number, number, pointer, number]
    return library
