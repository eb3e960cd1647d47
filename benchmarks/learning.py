"""Learning a prompt by ctp and by PEFT: tokens per second, peak memory and loss, side by side.

    python benchmarks/learning.py MODEL TEXT [--rounds 3] [--steps 8] [--batch 4] [--seqlen 512] [--tokens 100]
        [--dtype float32] [--device cuda]

Same model (a dense checkpoint, in bfloat16 or float32), batches, start, learning rates and clipping; each in a process
of its own, in turn, so that a machine that slows down slows all of them. Each one's first step is left out of its time.
Peak memory is the process's on the CPU, and what PyTorch held at most on a GPU.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ctp_cli.data.batches import batch_at
from ctp_cli.data.sources import load_text
from ctp_cli.data.windows import token_ids
from ctp_cli.models.loading import decoder_embedding, load_model, load_tokenizer
from ctp_cli.models.resolve import resolve_model
from ctp_cli.prompts.training import random_rows

WHO = ("ctp", "peft-loop", "peft-trainer")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text")
    for name, default in {"rounds": 3, "steps": 8, "batch": 4, "seqlen": 512, "tokens": 100}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the frozen model")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    given = parser.parse_args()
    path = resolve_model(given.model).path
    runs: dict[str, list[dict[str, Any]]] = {who: [] for who in WHO}
    with tempfile.TemporaryDirectory() as folder:
        batches, out = Path(folder) / "batches.safetensors", Path(folder) / "out.json"
        save_file(prepared(path, given), batches)
        for turn in range(given.rounds):
            for who in WHO:
                script = str(Path(__file__).parent / "peers" / "learning.py")
                command = [sys.executable, script, who, str(path), str(batches), "--dtype", given.dtype]
                subprocess.run([*command, "--device", given.device, "--out", str(out)], check=True)
                runs[who].append(json.loads(out.read_text()))
                print(f"round {turn + 1}: {who}: {runs[who][-1]}", file=sys.stderr, flush=True)
    print("| by | tokens/s (min-max over rounds) | rate, ctp = 1 | peak memory, GB | loss of the steps |")
    print("|---|---|---|---|---|")
    rates = {
        who: [given.batch * given.seqlen / statistics.median(r["times"][1:]) for r in rows]
        for who, rows in runs.items()
    }
    for who, rows in runs.items():
        ratio = statistics.median(a / b for a, b in zip(rates[who], rates["ctp"], strict=True))
        spread = f"{statistics.median(rates[who]):.0f} ({min(rates[who]):.0f}-{max(rates[who]):.0f})"
        losses = " ".join(f"{loss:.3f}" for loss in rows[0]["losses"])
        print(f"| {who} | {spread} | {ratio:.2f} | {max(r['peak_bytes'] for r in rows) / 1e9:.2f} | {losses} |")


def prepared(path: Path, given: argparse.Namespace) -> dict[str, torch.Tensor]:
    tokenizer, network = load_tokenizer(path), load_model(path)
    ids_T = token_ids(load_text(given.text, default_part="train"), tokenizer)
    ids_SBT = torch.stack(
        [batch_at(ids_T, given.seqlen, step=step, batch_size=given.batch, seed=0) for step in range(given.steps)]
    )
    embedding = decoder_embedding(network)
    start_PD = random_rows(embedding, given.tokens, torch.arange(len(tokenizer)), torch.Generator().manual_seed(0))
    return {"ids": ids_SBT, "start": start_PD.contiguous()}


if __name__ == "__main__":
    main()
