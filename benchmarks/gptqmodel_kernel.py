"""GPTQModel's own 4-bit product for CPUs with AVX-512 BF16, beside ours and PyTorch's.

    ~/.cache/ctp/interop/gptqmodel/bin/python benchmarks/gptqmodel_kernel.py [--size 4096] [--rounds 15] [--threads 1]

Run with the Python of the environment that `make interop` builds for GPTQModel, which compiles its kernel at first use;
of ctp it needs the folder `kernels` alone. Layers of size x size, 4 bits, groups of 128, x in bfloat16; dense codes.
Products take turns, with weights in rotation, more than the caches hold; medians in microseconds.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))
from ctp_kernels import reference
from ctp_kernels.packed import PackedLayer, product_int8, product_int16
from ctp_kernels.ragged import pack_kept
from ctp_kernels.reference import PackedParts

GROUP, BITS = 128, 4
ROTATED_BYTES = 80e6
Product = Callable[[Tensor], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"size": 4096, "rounds": 15, "threads": 1}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    generator = torch.Generator().manual_seed(0)
    count = int(ROTATED_BYTES // (given.size**2 / 2)) + 1
    codes_NK = torch.randint(0, 16, (given.size, given.size), dtype=torch.uint8, generator=generator)
    scales_NG = (torch.rand(given.size, given.size // GROUP, generator=generator) + 0.5).half()
    parts = PackedParts(codes=pack_kept(codes_NK, codes_NK >= 0, BITS), scales=scales_NG, bits=BITS)
    layers = [PackedLayer.of(PackedParts(codes=parts.codes.clone(), scales=scales_NG, bits=BITS)) for _ in range(count)]
    products: dict[str, list[Product]] = {
        "GPTQModel": [gptqmodels(codes_NK, scales_NG) for _ in range(count)],
        "ctp, x in 16 bits": [lambda x, layer=layer: product_int16(x, layer) for layer in layers],
        "ctp, x in 8 bits": [lambda x, layer=layer: product_int8(x, layer) for layer in layers],
    }
    W_NK = reference.decode(parts)
    print("| rows of x | " + " | ".join(products) + " |\n" + "|---" * (1 + len(products)) + "|")
    for rows in (1, 4, 16, 64):
        x_MK = torch.randn(rows, given.size, generator=generator).bfloat16()
        wanted_MN = x_MK.double() @ W_NK.T
        for name, copies in products.items():
            error = float((copies[0](x_MK).double() - wanted_MN).norm() / wanted_MN.norm())
            assert error < 1e-2, f"{name} is off by {error:.1e}"
        medians = {
            name: f"{statistics.median(times):.0f}" for name, times in timed(products, x_MK, given.rounds).items()
        }
        print(f"| {rows} | " + " | ".join(medians.values()) + " |", flush=True)


def gptqmodels(codes_NK: Tensor, scales_NG: Tensor) -> Product:
    """GPTQModel's kernel with a layer of its own."""
    from gptqmodel.nn_modules.qlinear.torch_cpu_avx512 import TorchCpuAvx512Linear, pack_hf_int4

    usable, why = TorchCpuAvx512Linear.cached_validate_once()
    if not usable:
        sys.exit(f"GPTQModel's kernel cannot be used here: {why}")
    kernel = TorchCpuAvx512Linear.gemm_int4_qzero_group_scaled_cpu_kernel
    scales_GN = scales_NG.t().float().contiguous()
    packed, zeros_GN = pack_hf_int4(codes_NK), torch.full(scales_GN.shape, 8, dtype=torch.uint8)
    return lambda x: kernel(x, packed, zeros_GN, scales_GN, GROUP, None)


def timed(products: dict[str, list[Product]], x_MK: Tensor, rounds: int) -> dict[str, list[float]]:
    """Microseconds of one product, every round: once through all copies."""
    found: dict[str, list[float]] = {name: [] for name in products}
    for _ in range(rounds):
        for name, copies in products.items():
            copies[0](x_MK)  # threads are awake then
            started = time.perf_counter()
            for run in copies:
                run(x_MK)
            found[name].append((time.perf_counter() - started) / len(copies) * 1e6)
    return found


if __name__ == "__main__":
    main()
