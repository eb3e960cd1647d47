"""Memory of learning a prompt on a large quantized checkpoint whose layers stay packed: `ctp learn --packed`.

    python benchmarks/learning_memory.py [--layers 32] [--hidden 4096] [--batch-size 1] [--seqlen 1024] [--tokens 100]
        [--bits 4] [--steps 1] [--folder KEPT]

LLaMA-7B's proportions, random codes in format gptq, groups of 128. `ctp learn` runs in a process of its own, whose peak
resident memory the kernel keeps (Linux only).
"""

import argparse
import json
import resource
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
    parser.add_argument("--folder", type=Path, help="for the checkpoint, kept; without it, a temporary one")
    given = parser.parse_args()
    with kept_or_temporary(given.folder) as folder:
        run(given, folder)


def run(given: argparse.Namespace, folder: Path) -> None:
    model, out = folder / f"llama-{given.layers}x{given.hidden}-w{given.bits}", folder / "prompt"
    if not (model / "config.json").exists():  # written last
        model.mkdir(parents=True, exist_ok=True)
        config = like_llama_7b(model, layers=given.layers, hidden=given.hidden)
        size = write_checkpoint(
            model,
            config,
            GPTQSettings(
                given.bits, 128 if config.intermediate_size % 128 == 0 else 32, symmetric=True, desc_act=False
            ),
        )
        print(f"wrote {size / 1e9:.2f} GB", file=sys.stderr, flush=True)
    command = [
        sys.executable,
        "-m",
        "ctp_cli",
        "learn",
        str(model),
        "--packed",
        "--gradient-checkpointing",
        "--force",
        "-o",
        str(out),
        "--json",
    ]
    for name in ("batch-size", "seqlen", "tokens", "steps"):
        command += [f"--{name}", str(getattr(given, name.replace("-", "_")))]
    command += ["--validate-every", str(given.steps), "--validation-windows", "1", "--text", "pydoc"]
    started = time.monotonic()
    done = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    weights = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    print("| checkpoint, GB | peak memory, GB | learning, s | everything, s |\n|---|---|---|---|")
    print(f"| {weights / 1e9:.2f} | {peak / 1e9:.2f} | {done['seconds']:.0f} | {time.monotonic() - started:.0f} |")


if __name__ == "__main__":
    main()
