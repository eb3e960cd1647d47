"""What one token of bfloat16 takes on the CPU, by PyTorch and as ctp has it: attention, the cache, a dense layer.

    python benchmarks/one_token.py [--keys 1040] [--heads 32] [--key-heads 32] [--hidden 2048] [--vocabulary 32000]
        [--layers 22] [--rounds 9]

Milliseconds of one layer or product, medians of turns taken one after the other. Attention and caches are those of as
many layers as a model has, products take weights in rotation, so that none is in the processor's caches when its turn
comes. The cache is transformers' own, which joins what there is with what comes, and `GrowingLayer`. Heads are 64 wide.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from ctp_kernels import one_row
from ctp_kernels.attention import causal_attention
from ctp_kernels.prefix import GrowingLayer
from torch import Tensor
from torch.nn import functional
from transformers.cache_utils import DynamicLayer

WIDTH = 64


def milliseconds(work: Callable[[], object], count: int) -> float:
    started = time.perf_counter()
    work()
    return (time.perf_counter() - started) * 1e3 / count


def bfloat16(*shape: int) -> Tensor:
    return torch.randn(*shape).bfloat16()


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = {"keys": 1040, "heads": 32, "key-heads": 32, "hidden": 2048, "vocabulary": 32000, "layers": 22}
    for name, default in {**defaults, "rounds": 9}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    torch.manual_seed(0)
    query, new = bfloat16(1, given.heads, 1, WIDTH), bfloat16(1, given.key_heads, 1, WIDTH)
    held = [[bfloat16(1, given.key_heads, given.keys, WIDTH) for _ in "kv"] for _ in range(given.layers)]
    caches: dict[type[DynamicLayer], list[DynamicLayer]] = {}
    for kind in (DynamicLayer, GrowingLayer):
        caches[kind] = [kind() for _ in held]
        for layer, (keys, values) in zip(caches[kind], held, strict=True):
            layer.update(keys, values)
    x, heads = bfloat16(1, given.hidden), [bfloat16(given.vocabulary, given.hidden) for _ in range(3)]

    def attend(way: Callable[..., Tensor | None], *more: float, **options: bool) -> Callable[[], object]:
        return lambda: [way(query, keys, values, *more, **options) for keys, values in held]

    def append(kind: type[DynamicLayer]) -> Callable[[], object]:
        return lambda: [layer.update(new, new) for layer in caches[kind]]

    def multiply(way: Callable[[Tensor, Tensor], Tensor | None]) -> Callable[[], object]:
        return lambda: [way(x, weight) for weight in heads]

    plain = functional.scaled_dot_product_attention
    pairs = {
        f"attention of one query to {given.keys} keys": (
            (attend(plain, enable_gqa=True), attend(causal_attention, WIDTH**-0.5)),
            given.layers,
        ),
        "one more token in a layer's cache": ((append(DynamicLayer), append(GrowingLayer)), given.layers),
        f"one row times {given.vocabulary} x {given.hidden}": (
            (multiply(functional.linear), multiply(one_row.linear)),
            len(heads),
        ),
    }
    print("| ms | PyTorch, transformers | ctp | ratio |\n|---|---|---|---|")
    for name, (ways, count) in pairs.items():
        turns = [[milliseconds(way, count) for way in ways] for _ in range(given.rounds + 1)][1:]
        theirs, ours = (statistics.median(turn[which] for turn in turns) for which in range(2))
        ratio = statistics.median(ours / theirs for theirs, ours in turns)
        print(f"| {name} | {theirs:.3f} | {ours:.3f} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
