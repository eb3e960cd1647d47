"""GPTQ by GPTQModel, on windows of token ids. Runs in the environment that `make interop` builds for it.

    GPTQMODEL_CPU_WORKERS=4 python benchmarks/peers/with_gptqmodel.py MODEL WINDOWS OUT --bits 4 --group-size 64

Asymmetric unless told otherwise, everything else as GPTQModel has it. Prints one JSON line; the checkpoint is in gptq
format.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from peak import peak_bytes
from safetensors.torch import load_file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("windows", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--symmetric", action="store_true")
    parser.add_argument("--dtype", default="bfloat16", help="of the arithmetic")
    given = parser.parse_args()
    config = QuantizeConfig(bits=given.bits, group_size=given.group_size, sym=given.symmetric, device="cpu")
    model = GPTQModel.load(str(given.model), config, dtype=getattr(torch, given.dtype))
    examples = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in load_file(given.windows)["ids"]]
    started = time.perf_counter()
    model.quantize(examples, batch_size=8, backend=BACKEND.GPTQ_TORCH)
    seconds = time.perf_counter() - started
    model.save(str(given.out))
    print(json.dumps({"solve_seconds": seconds, "peak_bytes": peak_bytes()}))


if __name__ == "__main__":
    main()
