"""Drive the published GPTQ or SparseGPT code, from the user's own clone, over a Llama-like model on the CPU.

    python benchmarks/peers/reference.py CLONE MODEL WINDOWS OUT --method gptq|sparsegpt [--bits 4] [--group-size 64]

CLONE is a checkout of IST-DASLab/gptq or IST-DASLab/sparsegpt; its classes are used as they are. The order of work is
that of the drivers there: all blocks in turn, one sample at a time, a Hessian for every layer, and a second pass over
each block for the next one's inputs. Prints one JSON line.
"""

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peak import peak_bytes
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

_SETS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("up_proj", "gate_proj"), ("down_proj",))


class _InputsCaught(Exception):
    """Ends a forward pass in front of the first block."""


def first_inputs(model: torch.nn.Module, ids_NT: torch.Tensor) -> tuple[list[torch.Tensor], dict[str, object]]:
    """What the first block is given: hidden states of every window, and the arguments that all blocks share."""
    hidden, arguments = [], {}

    def catch(_module: object, args: tuple[torch.Tensor, ...], kwargs: dict[str, object]) -> None:
        hidden.append(args[0])
        arguments.update(kwargs)
        raise _InputsCaught

    handle = model.model.layers[0].register_forward_pre_hook(catch, with_kwargs=True)
    for ids_T in ids_NT:
        with contextlib.suppress(_InputsCaught):
            model(ids_T[None], use_cache=False)
    handle.remove()
    return hidden, arguments


def _feed(solver: Any) -> Callable[..., None]:
    return lambda _module, args, out: solver.add_batch(args[0], out)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clone", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("windows", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--method", choices=("gptq", "sparsegpt"), required=True)
    parser.add_argument("--bits", type=int, default=16)
    parser.add_argument("--group-size", type=int, default=-1)
    parser.add_argument("--sparsity", type=float, default=0.0)
    parser.add_argument("--true-sequential", action="store_true")
    given = parser.parse_args()
    sys.path.insert(0, str(given.clone))
    torch.cuda.synchronize = torch.cuda.empty_cache = lambda: None  # the classes call them; there is no GPU here
    if given.method == "gptq":
        from gptq import GPTQ as Solver
    else:
        from sparsegpt import SparseGPT as Solver
    from quant import Quantizer

    model = AutoModelForCausalLM.from_pretrained(given.model, dtype="auto").eval()
    hidden, arguments = first_inputs(model, load_file(given.windows)["ids"])
    solve_seconds = 0.0
    for block in model.model.layers:
        layers = {name.split(".")[-1]: m for name, m in block.named_modules() if isinstance(m, torch.nn.Linear)}
        for names in _SETS if given.true_sequential else (tuple(layers),):
            solvers = {name: Solver(layers[name]) for name in names}
            for solver in solvers.values():
                if given.bits < 16:
                    solver.quantizer = Quantizer()
                    solver.quantizer.configure(given.bits, perchannel=True, sym=False, mse=False)
            hooks = [layers[name].register_forward_hook(_feed(solvers[name])) for name in names]
            for x in hidden:
                block(x, **arguments)
            for hook in hooks:
                hook.remove()
            started = time.perf_counter()
            for solver in solvers.values():
                if given.method == "gptq":
                    solver.fasterquant(percdamp=0.01, groupsize=given.group_size)
                else:
                    solver.fasterprune(given.sparsity, percdamp=0.01)
                solver.free()
            solve_seconds += time.perf_counter() - started
        outputs = [block(x, **arguments) for x in hidden]
        hidden = [y[0] if isinstance(y, tuple) else y for y in outputs]
    model.save_pretrained(given.out)
    AutoTokenizer.from_pretrained(given.model).save_pretrained(given.out)
    print(json.dumps({"solve_seconds": solve_seconds, "peak_bytes": peak_bytes()}))


if __name__ == "__main__":
    main()
