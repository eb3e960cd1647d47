"""Causal attention by PyTorch and as ctp has it, forward and backward; interleaved, medians.

    python benchmarks/attention.py [--batch 4] [--heads 9] [--key-heads 3] [--width 64] [--rounds 7]

As a layer calls it: a text of 256 to 1,024 tokens, alone or behind the keys and values of a prompt, for which
transformers gives a mask and repeats the keys and values that heads share. Shapes are those of a SmolLM2 block.
"""

import argparse
import statistics
import time
from contextlib import nullcontext

import torch
from ctp_kernels.arithmetic import fast_arithmetic
from torch import Tensor
from torch.nn import functional

CASES = ((256, 100), (512, 100), (512, 0), (1024, 0))


def timed(given: list[Tensor], outer_BHTD: Tensor, *, ours: bool) -> tuple[float, float]:
    """Seconds of the forward and of the backward pass."""
    started = time.perf_counter()
    query, key, value = given
    tokens, keys = query.shape[2], key.shape[2]
    mask = None if tokens == keys else torch.ones(tokens, keys, dtype=torch.bool).tril(keys - tokens)
    with fast_arithmetic(torch.device("cpu")) if ours else nullcontext():
        if ours:
            out = functional.scaled_dot_product_attention(
                query, key, value, attn_mask=mask, is_causal=mask is None, enable_gqa=True
            )
        else:
            repeated = [x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value)]
            out = functional.scaled_dot_product_attention(query, *repeated, attn_mask=mask, is_causal=mask is None)
    between = time.perf_counter()
    torch.autograd.grad(out, given, outer_BHTD)
    return between - started, time.perf_counter() - between


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"batch": 4, "heads": 9, "key-heads": 3, "width": 64, "rounds": 7}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    sizes = parser.parse_args()
    torch.manual_seed(0)
    print("| | forward, ms: PyTorch, ctp | | backward, ms: PyTorch, ctp | |\n|---|---|---|---|---|")
    for dtype in (torch.float32, torch.bfloat16):
        for tokens, prefix in CASES:
            shapes = [(tokens, sizes.heads), *[(prefix + tokens, sizes.key_heads)] * 2]
            given = [
                torch.randn(sizes.batch, count, heads, sizes.width, dtype=dtype).transpose(1, 2).requires_grad_()
                for count, heads in shapes
            ]
            outer_BHTD = torch.randn_like(given[0])
            timed(given, outer_BHTD, ours=True), timed(given, outer_BHTD, ours=False)
            turns = [[timed(given, outer_BHTD, ours=ours) for ours in (False, True)] for _ in range(sizes.rounds)]
            cells = [f"{str(dtype).removeprefix('torch.')}, {tokens} tokens" + (f" behind {prefix}" if prefix else "")]
            for part in range(2):
                theirs, ours = (statistics.median(turn[who][part] for turn in turns) * 1e3 for who in range(2))
                cells += [f"{theirs:.1f}, {ours:.1f}", f"{theirs / ours:.2f}"]
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
