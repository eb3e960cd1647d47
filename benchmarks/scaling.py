"""How the time of `ctp compress` grows with a model's width, depth and calibration tokens.

    python benchmarks/scaling.py [--rounds 3]

Llama-like models of random bfloat16 weights, 50% + 4 bit in groups of 64, on windows of 1024 tokens: how long the
arithmetic takes does not depend on what the numbers are. One size is changed at a time; medians over rounds, sizes in
turn within a round. Beside the time, what was computed: the forward pass of the blocks' linear layers, and the upper
triangles of their Hessians (both grow with the tokens), and the solver's products (which do not).
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from ctp_cli.models.embedded import embedded_model

SEQLEN = 1024


@dataclass(frozen=True)
class Size:
    width: int = 512
    blocks: int = 4
    windows: int = 16

    @property
    def layers(self) -> list[tuple[int, int]]:
        """(outputs, inputs) of one block's sets of layers that share their input."""
        wide = 3 * self.width
        return [(3 * self.width, self.width), (self.width, self.width), (2 * wide, self.width), (self.width, wide)]

    def operations(self) -> tuple[float, float, float]:
        """Of the forward pass, the Hessians and the solver."""
        tokens = self.windows * SEQLEN
        forward = sum(2 * tokens * o * i for o, i in self.layers)
        hessians = sum(tokens * i * i for _, i in self.layers)
        # Cholesky and inverse of a factor i^3 / 3 each; later inputs corrected o i^2
        solver = sum(2 * i**3 / 3 + o * i * i for o, i in self.layers)
        return forward * self.blocks, hessians * self.blocks, solver * self.blocks


BASE = Size()
SIZES = [
    *(replace(BASE, width=width) for width in (256, 512, 1024, 2048)),
    *(replace(BASE, blocks=blocks) for blocks in (2, 8)),
    *(replace(BASE, windows=windows) for windows in (8, 32, 64)),
]


def make(size: Size, folder: Path) -> None:
    config = LlamaConfig(
        hidden_size=size.width,
        intermediate_size=3 * size.width,
        num_hidden_layers=size.blocks,
        num_attention_heads=size.width // 64,
        vocab_size=49152,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(embedded_model()).save_pretrained(folder)


def seconds(model: Path, size: Size, out: Path) -> float:
    command = [sys.executable, "-m", "ctp_cli", "compress", str(model), "--sparsity", "0.5", "--bits", "4"]
    command += ["--group-size", "64", "--calibration", "pydoc", "--windows", str(size.windows), "-q", "--force"]
    subprocess.run([*command, "-o", str(out)], check=True, stdout=subprocess.DEVNULL)
    return float(json.loads((out / "ctp.json").read_text())["seconds"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    timings: dict[Size, list[float]] = {size: [] for size in SIZES}
    with tempfile.TemporaryDirectory() as scratch:
        for turn in range(rounds):
            for size in SIZES:
                model = Path(scratch) / f"{size.width}-{size.blocks}"
                if not model.exists():
                    make(size, model)
                timings[size].append(seconds(model, size, Path(scratch) / "out"))
                print(f"round {turn + 1}: {size}: {timings[size][-1]:.1f} s", file=sys.stderr, flush=True)
    print("| width | blocks | tokens | seconds | forward, TFLOP | Hessians, TFLOP | solver, TFLOP | TFLOP/s |")
    print("|---|---|---|---|---|---|---|---|")
    for size in sorted(timings, key=lambda s: (s.blocks, s.windows, s.width)):
        parts = [part / 1e12 for part in size.operations()]
        middle = statistics.median(timings[size])
        cells = [str(size.width), str(size.blocks), str(size.windows * SEQLEN), f"{middle:.1f}"]
        print(f"| {' | '.join(cells + [f'{part:.3f}' for part in parts] + [f'{sum(parts) / middle:.2f}'])} |")


if __name__ == "__main__":
    main()
