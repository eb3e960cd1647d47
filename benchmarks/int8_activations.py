"""What rounding activations to 8 bits costs: perplexity, and errors of products on a model's own activations.

    python benchmarks/int8_activations.py MODEL... --ppl wikitext2=wikitext2.test.txt,ptb=ptb.test.txt:lines
        [--windows 48] [--seqlen 128]

Checkpoints of format ctp, in the dtype they are stored in; needs AVX2 and a C++ compiler. The same windows, one at a
time, so that products have few enough rows for packed weights, are scored twice: with activations rounded to 16 bits in
runs (`packed`) and to 8 bits (`packed int8`). That every product took this way is asserted. Differences are paired by
windows. Errors are those of 8-bit products against float32 ones with the same weights, on the inputs that layers get in
the first window: |y8 - y| / |y| of all tokens together, and of the worst one.
"""

import argparse
import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

from ctp_kernels import ways
from torch import Tensor
from transformers import PreTrainedModel

from ctp_cli.checkpoints.packed_linear import PackedLinear
from ctp_cli.data.sources import load_text
from ctp_cli.data.windows import token_ids, windows
from ctp_cli.evaluation.perplexity import Perplexity, compare, perplexity
from ctp_cli.models.loading import load_model, load_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--ppl", required=True, help="texts, as `ctp eval` takes them")
    parser.add_argument("--windows", type=int, default=48)
    parser.add_argument("--seqlen", type=int, default=128)
    given = parser.parse_args()
    texts = [load_text(spec, default_part="test") for spec in given.ppl.split(",")]
    print("| checkpoint | text | 16-bit activations | 8-bit activations | difference, nats per token |")
    print("|---|---|---|---|---|", flush=True)
    errors = {}
    for path in given.models:
        model, tokenizer = load_model(path, packed=True), load_tokenizer(path)
        for text in texts:
            ids_T = token_ids(text, tokenizer, most=given.windows * given.seqlen)
            windows_NT = windows(ids_T, given.seqlen, most=given.windows, text=text, at_least=2)
            wide, narrow = (scored(model, windows_NT, int8=int8) for int8 in (False, True))
            difference = compare(wide, narrow)
            values = [f"{one.value():.3f} ± {one.standard_error:.3f}" for one in (wide, narrow)]
            change = f"{difference.mean:+.5f} ± {difference.standard_error:.5f}"
            print(f"| {path.name} | {text.label} | {' | '.join(values)} | {change} |", flush=True)
            if path.name not in errors:
                errors[path.name] = product_errors(model, windows_NT[:1])
    print("\n| checkpoint | layers | all tokens: median, largest | worst token: median, largest |\n|---|---|---|---|")
    for name, kinds in errors.items():
        for kind, found in kinds.items():
            cells = (f"{median(part):.2%}, {max(part):.2%}" for part in zip(*found, strict=True))
            print(f"| {name} | {kind} | {' | '.join(cells)} |")


def scored(model: PreTrainedModel, windows_NT: Tensor, *, int8: bool) -> Perplexity:
    way = ask_for(model, int8=int8)

    def check(layer: PackedLinear, x: Tensor) -> None:
        taken = layer._weight.explain(x.dtype, x.shape[:-1].numel())
        assert taken.way == way, f"wanted {way}, took {taken}"

    with at_every_product(model, check):
        return perplexity(model, windows_NT, batch_size=1)


def ask_for(model: PreTrainedModel, *, int8: bool) -> str:
    """Returns the way that products should take from now on."""
    for layer in packed_layers(model).values():
        layer.int8_activations = int8
        layer.prepare()
    return ways.PACKED_INT8 if int8 else ways.PACKED


def product_errors(model: PreTrainedModel, window_1T: Tensor) -> dict[str, list[tuple[float, float]]]:
    """Relative errors of each layer's 8-bit product, all tokens together and of the worst, by the layers' names."""
    inputs: dict[PackedLinear, Tensor] = {}

    def keep(layer: PackedLinear, x: Tensor) -> None:
        inputs[layer] = x.flatten(0, -2).float()

    ask_for(model, int8=False)
    with at_every_product(model, keep):
        model.base_model(window_1T)
    exact = {layer: layer(x_TI) for layer, x_TI in inputs.items()}  # float32 is multiplied as it is
    ask_for(model, int8=True)
    found = defaultdict(list)
    for name, layer in packed_layers(model).items():
        wrong_TO = layer(inputs[layer]) - exact[layer]
        worst = float((wrong_TO.norm(dim=1) / exact[layer].norm(dim=1)).max())
        found[name.rpartition(".")[2]].append((float(wrong_TO.norm() / exact[layer].norm()), worst))
    return found


def packed_layers(model: PreTrainedModel) -> dict[str, PackedLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}


@contextlib.contextmanager
def at_every_product(model: PreTrainedModel, act: Callable[[PackedLinear, Tensor], None]) -> Iterator[None]:
    def hook(layer: Any, arguments: tuple[Tensor, ...]) -> None:
        act(layer, arguments[0])

    layers = packed_layers(model).values()
    assert layers, "no layer is packed"
    handles = [layer.register_forward_pre_hook(hook) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


if __name__ == "__main__":
    main()
