"""16-bit products as PyTorch makes them on this processor, beside the way that ctp takes; interleaved, medians.

    python benchmarks/sixteen_bit.py [--tokens 2048] [--rounds 7]

Layers are those of a SmolLM2 block. Where the processor has 16-bit products both ways are the same.
Attention: `benchmarks/attention.py`.
"""

import argparse
import statistics
import time

import torch
from ctp_kernels.arithmetic import fast_arithmetic, is_slow
from torch import Tensor, nn

LAYERS = {"q, o": (576, 576), "k, v": (576, 192), "gate, up": (576, 1536), "down": (1536, 576)}


def seconds(layer: nn.Linear, x_TI: Tensor, *, ours: bool, backward: bool) -> float:
    started = time.perf_counter()
    if ours:
        with fast_arithmetic(torch.device("cpu")):
            y_TO = layer(x_TI)
    else:
        y_TO = layer(x_TI)
    if backward:
        y_TO.backward(y_TO.detach())
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    torch.manual_seed(0)
    print(f"products of bfloat16 are slow here: {is_slow(torch.zeros(1, dtype=torch.bfloat16))}")
    print("| | PyTorch, ms | ctp, ms | ratio |\n|---|---|---|---|")

    def row(name: str, run) -> None:  # type: ignore[no-untyped-def]
        run(ours=True), run(ours=False)
        pairs = [(run(ours=False), run(ours=True)) for _ in range(given.rounds)]
        theirs, ours = (statistics.median(times) * 1e3 for times in zip(*pairs, strict=True))
        print(f"| {name} | {theirs:.1f} | {ours:.1f} | {theirs / ours:.2f} |", flush=True)

    for name, (inputs, outputs) in LAYERS.items():
        layer = nn.Linear(inputs, outputs, bias=False).bfloat16().requires_grad_(False)
        for backward in (False, True):
            x_TI = torch.randn(given.tokens, inputs).bfloat16().requires_grad_(backward)
            suffix = " and gradient" if backward else ""

            def run(*, ours: bool, layer: nn.Linear = layer, x: Tensor = x_TI, backward: bool = backward) -> float:
                return seconds(layer, x, ours=ours, backward=backward)

            row(f"{name}: {inputs} -> {outputs}{suffix}", run)


if __name__ == "__main__":
    main()
