"""Runs the kernels in Triton's interpreter, and prints how far they are from the oracle, as JSON.

A program of its own: whether kernels are interpreted or compiled is settled when triton is imported. bfloat16 is wrong
in the interpreter without saying so, and is left to compilation and to GPUs.
"""

import json
import sys
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ctp_kernels.reference import PackedParts


@dataclass(frozen=True)
class Case:
    layout: str
    bits: int
    batch: int
    outputs: int
    inputs: int
    groups: int
    symmetric: bool
    dtype: str
    splits: int = 1
    block_m: int = 16
    block_n: int = 64

    @property
    def tolerance(self) -> float:
        """Of the relative Frobenius error: float16 results and weights are rounded to 11 bits; sums are float32."""
        return 1e-3 if self.dtype == "float16" else 1e-6


CASES = {
    f"{layout}-{number}": Case(layout, *settings)  # type: ignore[arg-type]
    for layout in ("dense", "2:4", "8:16", "bitmap")
    for number, settings in enumerate(
        [
            # bits, batch, outputs, inputs, groups, symmetric
            (4, 1, 72, 512, 4, True, "float16", 2),  # inputs split between programs
            (4, 17, 65, 288, 9, False, "float16"),  # tails everywhere, groups smaller than planes
            (3, 3, 7, 1024, 1, False, "float32"),  # one group
            (2, 16, 72, 288, 3, True, "float32"),  # groups that end within planes
            (8, 3, 40, 304, 19, False, "float16"),
            (4, 33, 128, 1024, 8, False, "float32", 3, 32, 128),  # tiled, blocks that splits share unequally
            (4, 3, 64, 1024, 2, True, "float16", 1, 16, 64),  # groups of two blocks and more
        ]
    )
}


def parts_of(case: Case) -> "PackedParts":
    from packed_layers import random_parts

    return random_parts(
        case.layout,
        bits=case.bits,
        outputs=case.outputs,
        inputs=case.inputs,
        groups=case.groups,
        symmetric=case.symmetric,
    )


def errors(case: Case, *, scattered: bool = False) -> dict[str, float]:
    import torch
    from ctp_kernels import reference
    from ctp_kernels.triton import dequantize, from_parts, matmul
    from ctp_kernels.triton.config import Config

    dtype = getattr(torch, case.dtype)
    parts = parts_of(case)
    if scattered:
        parts = replace(parts, g_idx=torch.arange(case.inputs) % case.groups)
    weight = from_parts(parts)
    assert weight.layout == {"2:4": "8:16"}.get(case.layout, case.layout)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, case.batch, case.inputs, generator=generator).to(dtype).requires_grad_()
    gy = torch.randn(1, case.batch, case.outputs, generator=generator).to(dtype)
    y = matmul(x, weight, config=Config(case.block_m, case.block_n, case.splits))
    assert y.shape == gy.shape
    y.backward(gy)

    def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
        return float((found.detach().double() - wanted).norm() / wanted.norm())

    assert x.grad is not None
    return {
        "y": distance(y, reference.matmul(x.detach().double(), parts)),
        "gx": distance(x.grad, reference.input_gradient(gy.double(), parts)),
        "w": distance(dequantize(weight, dtype=dtype), reference.decode(parts)),
    }


def unusual() -> dict[str, float]:
    """No rows at all, and a configuration that is chosen instead of given."""
    import torch
    from ctp_kernels import reference
    from ctp_kernels.triton import from_parts, matmul
    from packed_layers import random_parts

    parts = random_parts("dense", bits=4, outputs=24, inputs=128, groups=1, symmetric=True)
    weight = from_parts(parts)
    nothing = matmul(torch.ones(0, 128, requires_grad=True), weight)
    nothing.sum().backward()
    x = torch.randn(5, 128)
    y = matmul(x, weight)
    wanted = reference.matmul(x.double(), parts)
    return {"rows": float(nothing.shape[0]), "chosen": float((y - wanted).norm() / wanted.norm())}


if __name__ == "__main__":
    import torch

    # memory that nobody has written is NaN, so a result that a kernel leaves out shows
    torch.use_deterministic_algorithms(True)
    assert torch.ones(1).new_empty(3).isnan().all()
    torch.set_num_threads(1)
    wanted = sys.argv[1:] or CASES
    scattered = errors(CASES["dense-1"], scattered=True)
    json.dump(
        {"unusual": unusual(), "scattered": scattered, **{name: errors(CASES[name]) for name in wanted}}, sys.stdout
    )
