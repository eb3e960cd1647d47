"""Compress a checkpoint shaped like LLaMA-7B and watch the memory: peak and estimate side by side, time per block.

    python benchmarks/seven_billion.py --folder /somewhere/with/30/GB
    python benchmarks/seven_billion.py --layers 2 --hidden 512          # a small try
    python benchmarks/seven_billion.py --trace memory.png -- --bits 4   # memory over time, as a figure and memory.csv

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
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from random_checkpoints import kept_or_temporary, like_llama_7b, write_checkpoint

SAMPLING_SECONDS = 0.2


@dataclass
class Memory:
    """Bytes. The kernel keeps the highest total itself; anonymous memory is sampled."""

    anonymous: int = 0
    total: int = 0
    samples: list[tuple[float, int, int]] = field(default_factory=list)
    """Seconds since the start, anonymous and total at that time."""

    def see(self, process: int, seconds: float) -> None:
        try:
            lines = Path(f"/proc/{process}/status").read_text().splitlines()
        except OSError:
            return
        kilobytes = {
            name: value.split()[0] for name, _, value in (line.partition(":") for line in lines) if value.strip()
        }
        anonymous, total, peak = (1024 * int(kilobytes.get(name, 0)) for name in ("RssAnon", "VmRSS", "VmHWM"))
        self.samples.append((seconds, anonymous, total))
        self.anonymous, self.total = max(self.anonymous, anonymous), max(self.total, peak)

    def draw(self, figure: Path, shards: Sequence[float], estimated_bytes: float) -> None:
        """The samples as a figure, with the moments at which shards were finished, and as CSV beside it."""
        lines = [f"{seconds:.1f},{anonymous},{total}" for seconds, anonymous, total in self.samples]
        figure.with_suffix(".csv").write_text("\n".join(["seconds,anonymous_bytes,resident_bytes", *lines, ""]))
        at, anonymous, total = zip(*self.samples, strict=True)
        axes = Figure(figsize=(8, 3.5), layout="constrained").subplots()
        axes.plot(at, [value / 1e9 for value in total], color="0.7", label="resident, with mapped files")
        axes.plot(at, [value / 1e9 for value in anonymous], label="anonymous")
        axes.axhline(estimated_bytes / 1e9, color="C3", linestyle="--", label="estimated by --dry-run")
        axes.vlines(shards, 0, 0.15, color="0.4", linewidth=0.8, label="a block is written")
        axes.set(xlabel="seconds", ylabel="GB", ylim=(0, None))
        axes.figure.legend(loc="outside upper center", ncols=4, fontsize="small")
        axes.figure.savefig(figure, dpi=120)


def compress(model: Path, out: Path, options: list[str]) -> tuple[dict[str, Any], Memory, list[float], float]:
    """What the dry run says, what was used, when each shard was finished, and the whole time."""
    command = [sys.executable, "-m", "ctp_cli", "compress", str(model), "-o", str(out), *options]
    plan = json.loads(subprocess.run([*command, "--dry-run", "--json"], check=True, capture_output=True).stdout)
    memory, started = Memory(), time.time()
    running = subprocess.Popen([*command, "-q"], stdout=subprocess.DEVNULL)
    while running.poll() is None:
        memory.see(running.pid, time.time() - started)
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
    parser.add_argument("--trace", type=Path, metavar="FILE.png", help="draw memory over time")
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
    if given.trace is not None:
        memory.draw(given.trace, shards, plan["memory_bytes"])
    results = json.loads((out / "ctp.json").read_text())["results"]
    blocks = [later - earlier for earlier, later in itertools.pairwise(shards)]
    print("| | estimated | happened |\n|---|---|---|")
    print(f"| peak memory | {plan['memory_bytes'] / 1e6:.0f} MB | {memory.anonymous / 1e6:.0f} MB anonymous, ", end="")
    print(f"{memory.total / 1e6:.0f} MB with mapped files |")
    print(f"| checkpoint | {plan['checkpoint_bytes'] / 1e6:.0f} MB | {results['checkpoint_bytes'] / 1e6:.0f} MB |")
    print(f"| time | {plan['seconds']:.0f} s | {seconds:.0f} s |")
    print(f"| time until blocks began | | {shards[0]:.1f} s |")
    print(f"| time per block | | {sum(blocks) / max(len(blocks), 1):.1f} s ", end="")
    print(f"({min(blocks, default=0):.1f} to {max(blocks, default=0):.1f}) |")
    print(f"| model before | | {results['original_bytes'] / 1e6:.0f} MB |")


if __name__ == "__main__":
    main()
