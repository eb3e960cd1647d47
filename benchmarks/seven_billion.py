"""Compress a checkpoint shaped like LLaMA-7B and watch the memory: peak and estimate side by side, time per block.

    python benchmarks/seven_billion.py --folder /somewhere/with/30/GB
    python benchmarks/seven_billion.py --layers 2 --hidden 512          # a small try

The weights are random bfloat16 numbers, written block by block: arithmetic takes as long on them as on learned ones,
quality means nothing. The tokenizer is the embedded model's, and so is the size of the vocabulary. `ctp compress` runs
in a process of its own, whose resident memory is read from /proc (Linux only): anonymous memory, which is what the
process needs, and the total, which counts pages of mapped files too; the system takes those back when it is short.
"""

import argparse
import itertools
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from random_checkpoints import kept_or_temporary, like_llama_7b, write_checkpoint

SAMPLING_SECONDS = 0.2


@dataclass
class Memory:
    """Bytes. The kernel keeps the highest total itself; anonymous memory is sampled."""

    anonymous: int = 0
    total: int = 0

    def see(self, process: int) -> None:
        try:
            lines = Path(f"/proc/{process}/status").read_text().splitlines()
        except OSError:
            return
        kilobytes = {
            name: value.split()[0] for name, _, value in (line.partition(":") for line in lines) if value.strip()
        }
        self.anonymous = max(self.anonymous, 1024 * int(kilobytes.get("RssAnon", 0)))
        self.total = max(self.total, 1024 * int(kilobytes.get("VmHWM", 0)))


def compress(model: Path, out: Path, options: list[str]) -> tuple[dict[str, str], Memory, list[float], float]:
    """What the dry run says, what was used, when each shard was finished, and the whole time."""
    command = [sys.executable, "-m", "ctp_cli", "compress", str(model), "-o", str(out), *options]
    plan = json.loads(subprocess.run([*command, "--dry-run", "--json"], check=True, capture_output=True).stdout)
    memory, started = Memory(), time.time()
    running = subprocess.Popen([*command, "-q"], stdout=subprocess.DEVNULL)
    while running.poll() is None:
        memory.see(running.pid)
        time.sleep(SAMPLING_SECONDS)
    if running.returncode:
        raise SystemExit(running.returncode)
    seconds = time.time() - started
    return plan, memory, sorted(file.stat().st_mtime - started for file in out.glob("*.safetensors")), seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--folder", type=Path, help="for checkpoint and result, kept; without it, a temporary one")
    parser.add_argument("options", nargs="*", help="of ctp compress, after --; else --sparsity 0.5 --bits 4")
    given = parser.parse_args()
    with kept_or_temporary(given.folder) as folder:
        run(given, folder)


def run(given: argparse.Namespace, folder: Path) -> None:
    model, out = folder / f"llama-{given.layers}x{given.hidden}", folder / "compressed"
    if not (model / "config.json").exists():  # written last
        model.mkdir(parents=True, exist_ok=True)
        started = time.monotonic()
        config = like_llama_7b(model, layers=given.layers, hidden=given.hidden)
        size = write_checkpoint(model, config)
        print(f"wrote {size / 1e9:.2f} GB of weights in {time.monotonic() - started:.0f} s", file=sys.stderr)
    options = ["--calibration", "pydoc", "--windows", str(given.windows), "--seqlen", str(given.seqlen), "--force"]
    options += given.options or ["--sparsity", "0.5", "--bits", "4"]
    plan, memory, shards, seconds = compress(model, out, options)
    results = json.loads((out / "ctp.json").read_text())["results"]
    blocks = [later - earlier for earlier, later in itertools.pairwise(shards)]
    print("| | estimated | happened |\n|---|---|---|")
    print(f"| peak memory | {plan['estimated memory']} | {memory.anonymous / 1e6:.0f} MB anonymous, ", end="")
    print(f"{memory.total / 1e6:.0f} MB with mapped files |")
    print(f"| checkpoint | {plan['estimated size']} | {results['checkpoint_bytes'] / 1e6:.0f} MB |")
    print(f"| time | {plan['estimated time']} | {seconds:.0f} s |")
    print(f"| time until blocks began | | {shards[0]:.1f} s |")
    print(f"| time per block | | {sum(blocks) / max(len(blocks), 1):.1f} s ", end="")
    print(f"({min(blocks, default=0):.1f} to {max(blocks, default=0):.1f}) |")
    print(f"| model before | | {results['original_bytes'] / 1e6:.0f} MB |")


if __name__ == "__main__":
    main()
