"""Weights as the kernels read them: repacked once, when a model is loaded, from codes and a mask.

Inputs are cut into blocks, and all outputs of a block lie together: (blocks, N, ...), so that a tile of outputs x block
is one run of memory. Every stored field is `code ^ zero`, 0 for a pruned weight (see `values`). Inputs are padded to
whole blocks, and outputs to a multiple of 64, with pruned weights of scale 0.

- dense: the 16 / b planes of a block are consecutive runs of its inputs, and field p of int16 u is input u of plane p.
  3 bits: two bytes of 2-bit fields, each for one half of a block, and one byte of 1-bit fields (`high`) for 8 inputs.
- 8:16, and 2:4 with it: per 16 inputs 8 fields in one integer (`codes`; 3 bits: 16 bits there and 8 in `high`). 4 bits:
  byte k is fields k and k + 4, so that one mask makes bytes of four fields. `mask` as below.
- bitmap: `mask` int16 u holds the bits of unit u, 8 inputs, of each half of a block; `codes` int32 holds the fields of
  an output's kept weights one after the other, and `starts` (blocks, N, 2) how many come before each half block; an
  output begins at word `rows` of `codes`.

Bits per weight without scales: dense b; 8:16 b / 2 + 1; bitmap b * density + 1.125.

N=outputs K=inputs G=groups B=blocks U=units of a block
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ctp_kernels import ragged, reference

LAYOUTS = ("dense", "8:16", "bitmap")
BITS = (2, 3, 4, 8)
_ROWS = 64
_LONGEST = 65535
"""Inputs of a bitmap: how many codes come before a half block is a 16-bit number."""


@dataclass(frozen=True)
class PackedWeight:
    """A linear layer's weights (outputs, inputs) for the kernels. Make it with `pack` or `from_parts`.

    scales_GN float16 and zeros_GN uint8 (None: 2^(bits - 1)) are padded as the outputs are; group_size counts inputs.
    order (inputs,) int64, where groups were no runs of inputs: which input is at each place, None for their own order.
    The other tensors are what this module's description says for the layout, or None.
    """

    layout: str
    bits: int
    outputs: int
    inputs: int
    group_size: int
    codes: Tensor
    scales_GN: Tensor
    zeros_GN: Tensor | None = None
    high: Tensor | None = None
    mask: Tensor | None = None
    starts: Tensor | None = None
    rows: Tensor | None = None
    order: Tensor | None = None

    @property
    def block(self) -> int:
        return block_of(self.layout, self.bits)

    @property
    def padded_outputs(self) -> int:
        return self.scales_GN.shape[1]

    @property
    def padded_inputs(self) -> int:
        return -(-self.inputs // self.block) * self.block

    @property
    def stride(self) -> int:
        """Inputs of one plane are this far apart in a row of x."""
        return 1 if self.layout == "dense" else 8

    @property
    def planes(self) -> int:
        """Tiles of weights that a block consists of."""
        if self.layout == "dense":
            return 8 if self.bits == 3 else 16 // self.bits
        return 16

    @property
    def scales_segments(self) -> bool:
        """Whether groups are whole segments of inputs, whose sums can be scaled instead of their weights."""
        return self.group_size % 128 == 0

    @property
    def weight_bytes(self) -> int:
        """Of all tensors: codes, masks, positions, scales and zeros."""
        return sum(x.numel() * x.element_size() for x in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        names = ("codes", "scales_GN", "zeros_GN", "high", "mask", "starts", "rows", "order")
        return {name: x for name in names if (x := getattr(self, name)) is not None}

    def to(self, device: torch.device | str) -> "PackedWeight":
        moved: dict[str, Any] = {name: x.to(device) for name, x in self.tensors().items()}
        return replace(self, **moved)


def block_of(layout: str, bits: int) -> int:
    """Inputs of one block: so many that tiles of bytes are 32 wide and those of integers 16, as tensor cores want."""
    return 128 if layout == "dense" and bits != 3 else 256


def from_parts(parts: reference.PackedParts, *, layout: str | None = None) -> PackedWeight:
    """A stored layer (docs/format-ctp.md) for the kernels; by default in the tightest layout that its mask allows.

    Inputs whose groups are scattered (`g_idx`) are sorted by group, after which a mask rarely is 2:4 or 8:16 any more.
    Raises: ValueError as `pack`, for scattered groups that are not equal in size, and for codes that the mask does not
        ask for.
    """
    groups = parts.scales.shape[1]
    keep_NK = None if parts.mask is None else ragged.unpack_bits(parts.mask)
    every_NK = keep_NK
    if every_NK is None:
        every_NK = torch.ones(parts.outputs, parts.inputs, dtype=torch.bool, device=parts.codes.device)
    codes_NK = ragged.unpack_kept(parts.codes.flatten(), every_NK, parts.bits)
    order_K = None
    if parts.g_idx is not None and bool((parts.g_idx.diff() < 0).any()):
        order_K = parts.g_idx.long().argsort(stable=True)
        codes_NK, keep_NK = codes_NK[:, order_K], None if keep_NK is None else keep_NK[:, order_K]
    if parts.g_idx is not None and bool((parts.g_idx.long().bincount(minlength=groups) * groups != parts.inputs).any()):
        raise ValueError("g_idx: the kernels need groups of as many inputs each")
    weight = pack(codes_NK, parts.scales, bits=parts.bits, keep_NK=keep_NK, zeros_NG=parts.zeros, layout=layout)
    return weight if order_K is None else replace(weight, order=order_K)


def pack(
    codes_NK: Tensor,
    scales_NG: Tensor,
    *,
    bits: int,
    keep_NK: Tensor | None = None,
    zeros_NG: Tensor | None = None,
    layout: str | None = None,
) -> PackedWeight:
    """Codes for the kernels: weight (n, k) is scale * (code - zero) where it is kept, else 0.

    Shapes: codes_NK (N, K) uint8 below 2^bits; scales_NG (N, G), stored as float16; keep_NK (N, K) bool, None for all;
        zeros_NG (N, G) uint8, None for 2^(bits - 1). Group g is inputs g K / G to (g + 1) K / G.
    layout: None takes 8:16 where the mask is exactly that, as a 2:4 one is, else a bitmap; dense without a mask.
    Raises: ValueError for shapes that do not go together, groups that are no multiple of 16 inputs (one group may be of
        any size), or a mask that does not fit the layout.
    """
    outputs, inputs = codes_NK.shape
    groups = scales_NG.shape[1]
    _check(codes_NK, scales_NG, keep_NK, zeros_NG, bits)
    layout = _fitting(keep_NK) if layout is None else layout
    if layout not in LAYOUTS:
        raise ValueError(f"layout {layout!r}: there are {', '.join(LAYOUTS)}")
    if layout == "8:16" and (keep_NK is None or not _keeps_half_of_16(keep_NK)):
        raise ValueError("layout 8:16 needs a mask that keeps exactly 8 of every 16 weights")
    block = block_of(layout, bits)
    size = (-(-outputs // _ROWS) * _ROWS, -(-inputs // block) * block)
    group_size = inputs // groups if groups > 1 else size[1]
    zeros_NK = torch.full_like(codes_NK, 1 << (bits - 1))
    if zeros_NG is not None:
        zeros_NK = zeros_NG.to(torch.uint8).repeat_interleave(inputs // groups, 1)
    every_NK = torch.ones_like(codes_NK, dtype=torch.bool) if keep_NK is None else keep_NK
    flipped_NK = _padded(torch.where(every_NK, codes_NK ^ zeros_NK, 0), size)
    padded_keep_NK = _padded(every_NK, size)
    if layout == "dense":
        tensors = _dense(flipped_NK, bits, block)
    elif layout == "8:16":
        tensors = _eight_sixteen(flipped_NK, padded_keep_NK, bits, block)
    else:
        tensors = _bitmap(flipped_NK, padded_keep_NK, bits, block)
    grid = (size[0], -(-size[1] // group_size))
    return PackedWeight(
        layout=layout,
        bits=bits,
        outputs=outputs,
        inputs=inputs,
        group_size=group_size,
        scales_GN=_padded(scales_NG.half(), grid).T.contiguous(),
        zeros_GN=None if zeros_NG is None else _padded(zeros_NG.to(torch.uint8), grid).T.contiguous(),
        **tensors,
    )


def _check(codes_NK: Tensor, scales_NG: Tensor, keep_NK: Tensor | None, zeros_NG: Tensor | None, bits: int) -> None:
    outputs, inputs = codes_NK.shape
    if bits not in BITS:
        raise ValueError(f"{bits} bits: the kernels know {', '.join(map(str, BITS))}")
    if codes_NK.dtype != torch.uint8 or scales_NG.shape[0] != outputs:
        raise ValueError(f"codes {tuple(codes_NK.shape)} {codes_NK.dtype} and scales {tuple(scales_NG.shape)}")
    groups = scales_NG.shape[1]
    if inputs % groups or (groups > 1 and inputs // groups % 16):
        raise ValueError(f"{groups} groups of {inputs} inputs: groups are equal, and of a multiple of 16 inputs")
    if keep_NK is not None and (keep_NK.shape != codes_NK.shape or keep_NK.dtype != torch.bool):
        raise ValueError(f"mask {tuple(keep_NK.shape)} {keep_NK.dtype} for codes {tuple(codes_NK.shape)}")
    if zeros_NG is not None and zeros_NG.shape != scales_NG.shape:
        raise ValueError(f"zeros {tuple(zeros_NG.shape)} and scales {tuple(scales_NG.shape)}")
    if int(codes_NK.max()) >> bits or (zeros_NG is not None and int(zeros_NG.max()) >> bits):
        raise ValueError(f"a code or a zero point does not fit {bits} bits")


def _fitting(keep_NK: Tensor | None) -> str:
    if keep_NK is None:
        return "dense"
    return "8:16" if _keeps_half_of_16(keep_NK) else "bitmap"


def _keeps_half_of_16(keep_NK: Tensor) -> bool:
    return keep_NK.shape[1] % 16 == 0 and bool((keep_NK.view(keep_NK.shape[0], -1, 16).sum(2) == 8).all())


def _padded(values: Tensor, size: tuple[int, int]) -> Tensor:
    padded = values.new_zeros(size)
    padded[: values.shape[0], : values.shape[1]] = values
    return padded


def _blocks(values_NK: Tensor, block: int) -> Tensor:
    """(N, K) to (blocks, N, block)."""
    return values_NK.view(values_NK.shape[0], -1, block).transpose(0, 1)


def joined(fields: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """The last dimension's integers as the bits of one, the first lowest; the inverse is `separate`."""
    shifts = torch.arange(fields.shape[-1], device=fields.device) * bits
    # fields do not overlap, so a wrapping sum is their union, the sign bit of 64 included
    return (fields.to(torch.int64) << shifts).sum(-1).to(dtype)


def separate(values: Tensor, bits: int, count: int) -> Tensor:
    """(..., count) uint8: the lowest `count` fields of integers, which may be negative."""
    shifts = torch.arange(count, device=values.device) * bits
    return ((values.to(torch.int64)[..., None] >> shifts) & ((1 << bits) - 1)).to(torch.uint8)


def _dense(flipped_NK: Tensor, bits: int, block: int) -> dict[str, Tensor]:
    flipped_BNK = _blocks(flipped_NK, block)
    blocks, outputs, _ = flipped_BNK.shape
    if bits != 3:
        planes = flipped_BNK.reshape(blocks, outputs, 16 // bits, -1)
        return {"codes": joined(planes.transpose(2, 3), bits, torch.int16)}
    planes = flipped_BNK.reshape(blocks, outputs, 2, 4, -1)
    low = joined((planes & 3).transpose(3, 4), 2, torch.uint8).flatten(2)
    return {"codes": low, "high": joined((planes >> 2).flatten(2, 3).transpose(2, 3), 1, torch.uint8)}


def _eight_sixteen(flipped_NK: Tensor, keep_NK: Tensor, bits: int, block: int) -> dict[str, Tensor]:
    units = _blocks(flipped_NK, block).unflatten(2, (-1, 16))
    kept = _blocks(keep_NK, block).unflatten(2, (-1, 16))
    mask = _mask(keep_NK, block)
    # kept weights first, in their order; what follows them is pruned, and 0
    fields = units.gather(3, kept.logical_not().to(torch.uint8).argsort(dim=3, stable=True))[..., :8]
    if bits == 3:
        words = joined(fields, 3, torch.int64)
        return {"codes": words.to(torch.int16), "high": (words >> 16).to(torch.uint8), "mask": mask}
    if bits == 4:
        fields = fields.unflatten(3, (2, 4)).transpose(3, 4).flatten(3)
    return {"codes": joined(fields, bits, {2: torch.int16, 4: torch.int32, 8: torch.int64}[bits]), "mask": mask}


def _bitmap(flipped_NK: Tensor, keep_NK: Tensor, bits: int, block: int) -> dict[str, Tensor]:
    if flipped_NK.shape[1] > _LONGEST:
        raise ValueError(f"a bitmap of {flipped_NK.shape[1]} inputs: the kernels take up to {_LONGEST}")
    counts_NH = keep_NK.view(keep_NK.shape[0], -1, block // 2).sum(2)
    before_NH = counts_NH.cumsum(1) - counts_NH
    words_N = (keep_NK.sum(1) * bits + 31) // 32
    stream = ragged.pack_kept(flipped_NK, keep_NK, bits)
    starts_N = ragged.row_starts(ragged.pack_bits(keep_NK), bits)
    # rows begin on whole words here; a window reads up to two words past the last code
    padded = stream.new_zeros((int(words_N.sum()) + 2) * 4)
    rows_N = words_N.cumsum(0) - words_N
    lengths_N = starts_N.diff()
    shift = (rows_N * 4 - starts_N[:-1]).repeat_interleave(lengths_N)
    padded[torch.arange(stream.numel(), device=stream.device) + shift] = stream
    return {
        "codes": padded.view(torch.int32),
        "mask": _mask(keep_NK, block),
        "starts": before_NH.view(before_NH.shape[0], -1, 2).transpose(0, 1).to(torch.int16).contiguous(),
        "rows": rows_N.to(torch.int32),
    }


def _mask(keep_NK: Tensor, block: int) -> Tensor:
    """(blocks, N, block / 16) int16: 8 bits of the first half of a block, and 8 of the second."""
    halves = _blocks(keep_NK, block).unflatten(2, (2, -1, 8))
    return joined(halves.transpose(2, 3).flatten(3), 1, torch.int64).to(torch.int16)


def _read_mask(mask: Tensor) -> Tensor:
    """(blocks, N, block) bool."""
    return separate(mask, 1, 16).unflatten(3, (2, -1)).transpose(2, 3).flatten(2).bool()


def unpack(weight: PackedWeight) -> tuple[Tensor, Tensor]:
    """The inverse of `pack`: codes (N, K) uint8, and (N, K) bool, which weights are kept.

    The code of a pruned weight is its zero point.
    """
    read = {"dense": _read_dense, "8:16": _read_eight_sixteen, "bitmap": _read_bitmap}
    flipped_BNK, keep_BNK = read[weight.layout](weight)
    flipped_NK, keep_NK = (
        x.transpose(0, 1).flatten(1)[: weight.outputs, : weight.inputs] for x in (flipped_BNK, keep_BNK)
    )
    zeros_GN = weight.zeros_GN
    if zeros_GN is None:
        zeros_GN = torch.full_like(weight.scales_GN, 1 << (weight.bits - 1), dtype=torch.uint8)
    group_K = torch.arange(weight.inputs, device=zeros_GN.device) // weight.group_size
    codes_NK = flipped_NK ^ zeros_GN.T[: weight.outputs, group_K]
    return in_order(codes_NK, weight), in_order(keep_NK, weight)


def in_order(values_RK: Tensor, weight: PackedWeight) -> Tensor:
    """Columns back where the layer has them."""
    return values_RK if weight.order is None else values_RK[:, weight.order.argsort()]


def _read_dense(weight: PackedWeight) -> tuple[Tensor, Tensor]:
    if weight.high is None:
        flipped_BNK = separate(weight.codes, weight.bits, 16 // weight.bits).transpose(2, 3).flatten(2)
    else:
        low = separate(weight.codes.unflatten(2, (2, -1)), 2, 4).transpose(3, 4)
        flipped_BNK = low.flatten(2) | separate(weight.high, 1, 8).transpose(2, 3).flatten(2) << 2
    return flipped_BNK, torch.ones_like(flipped_BNK, dtype=torch.bool)


def _read_eight_sixteen(weight: PackedWeight) -> tuple[Tensor, Tensor]:
    assert weight.mask is not None
    keep = _read_mask(weight.mask).unflatten(2, (-1, 16))
    words = weight.codes.to(torch.int64)
    if weight.high is not None:
        words = words & 0xFFFF | weight.high.to(torch.int64) << 16
    fields = separate(words, weight.bits, 8)
    if weight.bits == 4:
        fields = fields.unflatten(3, (4, 2)).transpose(3, 4).flatten(3)
    # padding keeps nothing, and takes the last field, which is 0 there
    ranks = (keep.cumsum(3) - 1).clamp(min=0)
    return (fields.gather(3, ranks) * keep).flatten(2), keep.flatten(2)


def _read_bitmap(weight: PackedWeight) -> tuple[Tensor, Tensor]:
    assert weight.mask is not None and weight.rows is not None
    keep_BNK = _read_mask(weight.mask)
    keep_NK = keep_BNK.transpose(0, 1).flatten(1)
    stored = weight.codes.view(torch.uint8)
    rows = zip((weight.rows * 4).tolist(), ((keep_NK.sum(1) * weight.bits + 7) // 8).tolist(), strict=True)
    stream = torch.cat([stored[first : first + length] for first, length in rows])
    flipped_NK = ragged.unpack_kept(stream, keep_NK, weight.bits)
    return _blocks(flipped_NK, weight.block), keep_BNK
