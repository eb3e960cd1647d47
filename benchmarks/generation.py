"""Tokens per second of a whole model, packed against dense, one sequence, greedy.

    python benchmarks/generation.py [MODEL CHECKPOINT] [--rounds 3] [--new-tokens 32] [--context 32] [--gguf FILE]
        [--only "ctp packed;ctp packed, x in 8 bits"]

MODEL is dense, CHECKPOINT a quantized one of it. Without them: LLaMA's architecture with a billion random weights and a
vocabulary of 32,000 (22 blocks of width 2,048), and the same pruned to 50% with 4 bits in format ctp. Each competitor
runs in a process of its own, in turn, so that a machine that slows down slows all of them:

- transformers in bfloat16 and in float32, as it comes;
- the packed checkpoint as ctp chooses, with pruned layers as dense codes, and with none so, each with
  activations rounded to 8 bits, too;
- llama.cpp on a GGUF file, where --gguf is given and llama-cpp-python is installed (the embedded model's file is Q4_1).

The time of the tokens after the first counts. Memory is the process's peak resident size after the model was loaded.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from ctp_kernels.prefix import cache_keyword, cache_of
from peers.peak import peak_bytes
from random_checkpoints import llama_config, write_checkpoint
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from ctp_cli.checkpoints.packed import PackedSettings
from ctp_cli.checkpoints.packed_linear import PackedLinear
from ctp_cli.models.loading import load_model
from ctp_cli.models.resolve import resolve_model

BILLION = {"layers": 22, "hidden": 2048, "wide": 5632, "vocabulary": 32000, "head": 64}
DTYPES = {"transformers bfloat16": torch.bfloat16, "transformers float32": torch.float32}
PACKED = {
    "ctp packed": {},
    "ctp packed, x in 8 bits": {"CTP_INT8_ACTIVATIONS": "1"},
    "ctp packed, dense codes": {"CTP_DENSE_CODES": "1"},
    "ctp packed, dense codes, x in 8 bits": {"CTP_DENSE_CODES": "1", "CTP_INT8_ACTIVATIONS": "1"},
    "ctp packed, as stored": {"CTP_DENSE_CODES": "0"},
    "ctp packed, as stored, x in 8 bits": {"CTP_DENSE_CODES": "0", "CTP_INT8_ACTIVATIONS": "1"},
}
"""What the environment says."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("checkpoint", nargs="?")
    for name, default in {"rounds": 3, "new-tokens": 32, "context": 32}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--gguf", type=Path)
    parser.add_argument("--only", default="", help="names of competitors, separated by semicolons")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # this process is that competitor
    given = parser.parse_args()
    if given.one:
        print(json.dumps(measured(given)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        if given.model is None:
            given.model, given.checkpoint = random_pair(Path(scratch))
        compare(given)


def random_pair(folder: Path) -> tuple[str, str]:
    config = llama_config(**BILLION)
    for name, form in (("dense", None), ("packed", PackedSettings(4, 64, symmetric=True))):
        (folder / name).mkdir()
        write_checkpoint(folder / name, config, form, pruned=0.5)
    return str(folder / "dense"), str(folder / "packed")


def compare(given: argparse.Namespace) -> None:
    wanted = given.only.split(";") if given.only else [*DTYPES, *PACKED, *(["llama.cpp"] if given.gguf else [])]
    competitors = ["transformers bfloat16", *(name for name in wanted if name != "transformers bfloat16")]
    found: dict[str, list[dict[str, float]]] = {name: [] for name in competitors}
    sizes = ["--new-tokens", str(given.new_tokens), "--context", str(given.context)]
    for turn in range(given.rounds):
        for name in competitors:
            files = [given.model, given.checkpoint, *(["--gguf", str(given.gguf)] if given.gguf else [])]
            command = [sys.executable, __file__, *files, *sizes, "--one", name]
            told = os.environ | PACKED.get(name, {})
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=told)
            found[name].append(json.loads(done.stdout.splitlines()[-1]))
            print(f"round {turn + 1}: {name}: {found[name][-1]}", file=sys.stderr, flush=True)
    print("| | tokens/s, median (min to max) | times transformers bfloat16 | peak memory, GB |\n|---|---|---|---|")
    base = found["transformers bfloat16"]
    for name, rounds in found.items():
        rates = [one["tokens_per_second"] for one in rounds]
        ratio = statistics.median(
            one["tokens_per_second"] / other["tokens_per_second"] for one, other in zip(rounds, base, strict=True)
        )
        spread = f"{statistics.median(rates):.2f} ({min(rates):.2f} to {max(rates):.2f})"
        print(f"| {name} | {spread} | {ratio:.2f} | {max(one['peak_bytes'] for one in rounds) / 1e9:.2f} |")


def measured(given: argparse.Namespace) -> dict[str, float]:
    if given.one == "llama.cpp":
        return llama_cpp(given)
    disable_progress_bar()
    if given.one in PACKED:
        model: Any = load_model(resolve_model(given.checkpoint).path, packed=True)
        check_ways(model, given.one)
    else:
        path = resolve_model(given.model).path
        model = AutoModelForCausalLM.from_pretrained(path, dtype=DTYPES[given.one]).eval()
    forget_peak()
    ids = torch.randint(5, 30000, (1, given.context), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        out = model(input_ids=ids, use_cache=True)
        started = 0.0
        for index in range(given.new_tokens + 2):
            if index == 2:  # kernels are built and layers brought into their form before
                started = time.perf_counter()
            token = out.logits[:, -1:].argmax(-1)
            out = model(input_ids=token, use_cache=True, **{cache_keyword(model): cache_of(out)})
        seconds = time.perf_counter() - started
    return {"tokens_per_second": given.new_tokens / seconds, "peak_bytes": float(peak_bytes())}


def check_ways(model: Any, name: str) -> None:
    """Raises RuntimeError if products are not made as the competitor's name says."""
    for layer in (module for module in model.modules() if isinstance(module, PackedLinear)):
        dense = bool(layer.dense_codes_on)
        wrong = ("as stored" in name and dense) or ("dense codes" in name and not dense)
        if wrong or layer.int8_activations != ("8 bits" in name):
            raise RuntimeError(f"{name}: int8_activations={layer.int8_activations}, {layer.dense_codes_on=}")


def llama_cpp(given: argparse.Namespace) -> dict[str, float]:
    import llama_cpp  # type: ignore[import-not-found]

    threads = torch.get_num_threads()
    model = llama_cpp.Llama(
        str(given.gguf),
        n_ctx=given.context + given.new_tokens + 8,
        n_threads=threads,
        n_threads_batch=threads,
        verbose=False,
    )
    forget_peak()
    model.eval(list(range(5, 5 + given.context)))
    started = 0.0
    for index in range(given.new_tokens + 2):
        if index == 2:
            started = time.perf_counter()
        model.eval([model.sample(temp=0.0)])
    seconds = time.perf_counter() - started
    return {"tokens_per_second": given.new_tokens / seconds, "peak_bytes": float(peak_bytes())}


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


if __name__ == "__main__":
    main()
