"""Memory of learning a prompt on a large quantized checkpoint, whose layers stay packed (`ctp learn --packed`) or not.

    python benchmarks/learning_memory.py [--layers 32] [--hidden 4096] [--batch-size 1] [--seqlen 1024] [--tokens 100]
        [--bits 4] [--steps 1] [--held packed,dense] [--folder KEPT]

LLaMA-7B's proportions, random codes in format gptq, groups of 128. Dense is bfloat16, as the checkpoint says. Each
`ctp learn` is a process of its own, whose peak resident memory its ctp.json says. How that grows with --layers is what
the weights of a layer take, and the inputs of a block that gradient checkpointing keeps.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from random_checkpoints import kept_or_temporary, like_llama_7b, write_checkpoint

from ctp_cli.checkpoints.gptq import GPTQSettings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = {"layers": 32, "hidden": 4096, "batch-size": 1, "seqlen": 1024, "tokens": 100, "bits": 4, "steps": 1}
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--held", default="packed", help="packed, dense, or both with a comma between")
    parser.add_argument("--folder", type=Path, help="for the checkpoint, kept; without it, a temporary one")
    given = parser.parse_args()
    with kept_or_temporary(given.folder) as folder:
        model = folder / f"llama-{given.layers}x{given.hidden}-w{given.bits}"
        if not (model / "config.json").exists():  # written last
            print(f"wrote {write(model, given) / 1e9:.2f} GB", file=sys.stderr, flush=True)
        print(
            "| weights held | checkpoint, GB | peak memory, GB | learning, s | everything, s |\n|---|---|---|---|---|"
        )
        for held in given.held.split(","):
            learn(given, model, folder / "prompt", held)


def write(model: Path, given: argparse.Namespace) -> int:
    model.mkdir(parents=True, exist_ok=True)
    config = like_llama_7b(model, layers=given.layers, hidden=given.hidden)
    group_size = 128 if config.intermediate_size % 128 == 0 else 32
    return write_checkpoint(model, config, GPTQSettings(given.bits, group_size, symmetric=True, desc_act=False))


def learn(given: argparse.Namespace, model: Path, out: Path, held: str) -> None:
    command = [sys.executable, "-m", "ctp_cli", "learn", str(model), "--gradient-checkpointing", "--force"]
    command += ["-o", str(out), "--json", *{"packed": ["--packed"], "dense": ["--dtype", "checkpoint"]}[held]]
    for name in ("batch-size", "seqlen", "tokens", "steps"):
        command += [f"--{name}", str(getattr(given, name.replace("-", "_")))]
    command += ["--validate-every", str(given.steps), "--validation-windows", "1", "--text", "pydoc"]
    started = time.monotonic()
    done = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    whole = time.monotonic() - started
    peak = json.loads((out / "ctp.json").read_text())["peak_memory_bytes"]
    weights = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    print(
        f"| {held} | {weights / 1e9:.2f} | {peak / 1e9:.2f} | {done['seconds']:.0f} | {whole:.0f} |",
        flush=True,
    )


if __name__ == "__main__":
    main()
