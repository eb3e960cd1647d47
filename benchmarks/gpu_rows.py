"""Up to how many rows of x a GPU should multiply weights as they are packed: a table in Markdown.

    python benchmarks/gpu_rows.py [--outputs 4096] [--inputs 4096]

Microseconds, medians, as CUDA graphs, weights in rotation: float16 `F.linear`, and for each layout the fused product,
making weights dense and multiplying, and the gradient. Needs a GPU and triton. `ways._MANY_ROWS` follows from it.
"""

import argparse
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from ctp_kernels import rooflines
from ctp_kernels.triton import dequantize, from_parts, matmul
from ctp_kernels.triton.ops import input_gradient
from ctp_kernels.triton.tune import rotation
from torch.nn import functional

KINDS = ("dense", "8:16", "bitmap")


def microseconds(copies: Sequence[Any], run: Callable[[Any], object]) -> float:
    from triton.testing import do_bench_cudagraph

    turns = itertools.cycle(copies)
    return 1e3 * float(do_bench_cudagraph(lambda: run(next(turns)), rep=5, return_mode="median"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--outputs", type=int, default=4096)
    parser.add_argument("--inputs", type=int, default=4096)
    given = parser.parse_args()
    shape = rooflines.LayerShape(given.outputs, given.inputs)
    generator = torch.Generator().manual_seed(0)
    half = [torch.randn(given.outputs, given.inputs, device="cuda", dtype=torch.float16) for _ in range(4)]
    layers = {
        kind: rotation(from_parts(rooflines.random_layer(shape, kind, generator, device="cuda"))) for kind in KINDS
    }
    columns = [f"{kind}, {what}" for kind in KINDS for what in ("fused", "made dense", "gradient")]
    print(f"{torch.cuda.get_device_name()}, {shape}, 4 bits\n")
    print("| rows of x | fp16 `F.linear` | " + " | ".join(columns) + " |\n" + "|---" * (len(columns) + 2) + "|")
    for rows in (16, 32, 64, 128, 256, 512, 2048):
        x_MK, gy_MN = (
            torch.randn(rows, size, device="cuda", dtype=torch.float16) for size in (given.inputs, given.outputs)
        )
        times = [microseconds(half, lambda weight, x_MK=x_MK: functional.linear(x_MK, weight))]
        for copies in layers.values():
            times.append(microseconds(copies, lambda weight, x_MK=x_MK: matmul(x_MK, weight)))
            times.append(microseconds(copies, lambda weight, x_MK=x_MK: functional.linear(x_MK, dequantize(weight))))
            times.append(microseconds(copies, lambda weight, gy_MN=gy_MN: input_gradient(gy_MN, weight)))
        print(f"| {rows} | " + " | ".join(f"{time:.1f}" for time in times) + " |", flush=True)


if __name__ == "__main__":
    main()
