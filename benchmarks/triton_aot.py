"""What the kernels for packed weights become on GPUs that are not there: a table in Markdown.

    python benchmarks/triton_aot.py [--target sm_90 ...] [--batch 16] [--bits 4]

Compiles for a layer of 4096 x 4096 in groups of 128, in the default configuration of each GPU, and reads registers,
spills, shared memory and instructions from the machine code. Needs triton and no GPU; takes some minutes.
"""

import argparse

import torch
from ctp_kernels.triton.aot import TARGETS, Compiled, compile_columns, compile_dequantize, compile_forward, sample
from ctp_kernels.triton.config import Config, default
from ctp_kernels.triton.layouts import LAYOUTS

HEADINGS = (
    "kernel", "target", "dtype", "tile", "registers", "spilled", "shared KB", "instructions", "tensor cores",
    "async copies",
)  # fmt: skip


def row(kernel: str, dtype: str, tile: str, found: Compiled) -> str:
    tensor = " ".join(f"{count} {name}" for name, count in found.tensor.items())
    cells = (
        kernel, found.target, dtype, tile, found.registers, found.spilled, f"{found.shared_bytes / 1024:.1f}",
        found.instructions, tensor, found.asynchronous_copies,
    )  # fmt: skip
    return "| " + " | ".join(map(str, cells)) + " |"


def described(config: Config) -> str:
    return f"{config.block_m} x {config.block_n}, {config.warps} warps, {config.stages} stages"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", action="append", choices=list(TARGETS))
    parser.add_argument("--batch", type=int, action="append", help="rows of x; 16 and 512 where not given")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--layout", action="append", choices=LAYOUTS)
    arguments = parser.parse_args()
    print("| " + " | ".join(HEADINGS) + " |")
    print("|" + "---|" * len(HEADINGS))
    types = (("fp16", torch.float16), ("bf16", torch.bfloat16))
    for layout in arguments.layout or LAYOUTS:
        weight = sample(layout, arguments.bits)
        for target in arguments.target or TARGETS:
            for batch in arguments.batch or (16, 512):
                tile = described(default(batch, weight, TARGETS[target]))
                for name, dtype in types if batch == 16 else types[:1]:
                    found = compile_forward(weight, target, batch=batch, dtype=dtype)
                    print(row(f"{layout}, {arguments.bits} bits, M = {batch}", name, tile, found), flush=True)
            found = compile_dequantize(weight, target)
            print(row(f"{layout}, {arguments.bits} bits, made dense", "fp16", "", found), flush=True)
    for target in arguments.target or TARGETS:
        for name, found in compile_columns(target).items():
            print(row(f"solver, {name}", "fp32", "", found), flush=True)


if __name__ == "__main__":
    main()
