"""Random packed layers, as they are stored, for tests of kernels."""

import torch
from ctp_kernels.ragged import pack_bits, pack_kept
from ctp_kernels.reference import PackedParts
from torch import Tensor


def random_mask(layout: str, outputs: int, inputs: int, generator: torch.Generator) -> Tensor | None:
    """None for dense; a bitmap has a full row, an empty one, and a run of 128 empty inputs."""
    if layout == "dense":
        return None
    if layout in ("2:4", "8:16"):
        n, m = map(int, layout.split(":"))
        order = torch.rand(outputs, inputs // m, m, generator=generator).argsort(2)
        return (order < n).view(outputs, inputs)
    keep = torch.rand(outputs, inputs, generator=generator) < 0.4
    keep[0], keep[-1] = True, False
    keep[1:-1, 128:256] = False
    return keep


def random_parts(
    layout: str, *, bits: int, outputs: int, inputs: int, groups: int, symmetric: bool, seed: int = 0
) -> PackedParts:
    """A layer that has every code, and kept weights whose code is their zero point."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (outputs, inputs), generator=generator).to(torch.uint8)
    zeros = torch.full((outputs, groups), 2 ** (bits - 1), dtype=torch.uint8)
    if not symmetric:
        zeros = torch.randint(0, 2**bits, (outputs, groups), generator=generator).to(torch.uint8)
    zero_codes = zeros.repeat_interleave(inputs // groups, 1)
    codes = torch.where(torch.rand(outputs, inputs, generator=generator) < 0.1, zero_codes, codes)
    keep = random_mask(layout, outputs, inputs, generator)
    every = torch.ones(outputs, inputs, dtype=torch.bool) if keep is None else keep
    assert (codes[every] == zero_codes[every]).any() and len(codes[every].unique()) == 2**bits
    return PackedParts(
        codes=pack_kept(codes, every, bits),
        scales=(torch.rand(outputs, groups, generator=generator) + 0.5).half() / 2**bits,
        bits=bits,
        mask=None if keep is None else pack_bits(keep),
        zeros=None if symmetric else zeros,
    )
