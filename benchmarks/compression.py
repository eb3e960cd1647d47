"""Compression by ctp, by its peers and by the published code: time, memory and perplexity, side by side.

    python benchmarks/compression.py DATA_FOLDER [--rounds 3] [--windows 64] [--only "ctp;GPTQModel"]
        [--eval-windows 48] [--peers-dtype float32] [--gptq-clone DIR] [--sparsegpt-clone DIR]

Same model (SmolLM2-135M, bfloat16), same windows of 1024 tokens of c4.train.jsonl, same settings as far as a peer has
them; each in a process and an environment of its own, in turn, so that a machine that slows down slows all of them.
"Scales tuned" sees no other windows: it calibrates on three quarters of them, and tunes on the rest.
Whole time is the process from start to end. Perplexity is ctp's evaluator on at most 48 windows of WikiText-2 and PTB.
GPTQModel and llm-compressor compute in bfloat16 where PyTorch has fast products for it, and else in float32, which is
several times as fast there: each gets what its user would choose.
The published code (IST-DASLab/gptq and IST-DASLab/sparsegpt) takes part where a clone of it is given.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from ctp_kernels.arithmetic import is_slow
from safetensors.torch import save_file

from ctp_cli.data.sources import load_text
from ctp_cli.data.windows import token_ids, windows
from ctp_cli.models.embedded import NAME
from ctp_cli.models.loading import load_tokenizer
from ctp_cli.models.resolve import resolve_model
from ctp_cli.recipe import EvalSection
from ctp_cli.stages.eval import Target, evaluate

HERE = Path(__file__).parent
SEQLEN = 1024
GPTQ, SPARSE = "GPTQ 4 bit g64", "SparseGPT 50%"


@dataclass(frozen=True)
class Competitor:
    """A command that compresses; {model}, {windows}, {out} and {count} are filled in."""

    method: str
    name: str
    command: tuple[str, ...]


def environment(name: str) -> str:
    """The interpreter of a peer's own environment, built on first use."""
    script = HERE.parent / "tests" / "interop" / "environments.py"
    done = subprocess.run([sys.executable, str(script), name], check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout.strip()


def competitors(data: Path, dtype: str, gptq: Path | None, sparsegpt: Path | None) -> list[Competitor]:
    ours = (sys.executable, "-m", "ctp_cli", "compress", "{model}", "--calibration", str(data / "c4.train.jsonl"))
    ours += ("-q", "-o", "{out}", "--windows")
    bits, free, peers = ("--bits", "4", "--group-size", "64"), ("--asymmetric", "--act-order", "static"), HERE / "peers"
    found = [
        Competitor(GPTQ, "ctp", (*ours, "{count}", *bits, *free)),
        Competitor(
            GPTQ,
            "ctp, scales tuned",
            (*ours, "{fitted}", *bits, *free, "--tune", "scales", "--tune-windows", "{tuned}"),
        ),
        Competitor(
            GPTQ,
            "GPTQModel",
            ("gptqmodel", str(peers / "with_gptqmodel.py"), "{model}", "{windows}", "{out}", "--dtype", dtype, *bits),
        ),
        Competitor(SPARSE, "ctp", (*ours, "{count}", "--sparsity", "0.5")),
    ]
    compressor = ("llmcompressor", str(peers / "with_llmcompressor.py"), "{model}", "{windows}", "{out}")
    compressor += ("--dtype", dtype, "--method")
    found.append(Competitor(GPTQ, "llm-compressor", (*compressor, "gptq", *bits)))
    found.append(Competitor(SPARSE, "llm-compressor", (*compressor, "sparsegpt", "--sparsity", "0.5")))
    for method, clone, options in ((GPTQ, gptq, bits), (SPARSE, sparsegpt, ("--sparsity", "0.5"))):
        if clone is not None:
            name = "gptq" if method == GPTQ else "sparsegpt"
            script = (sys.executable, str(peers / "reference.py"), str(clone), "{model}", "{windows}", "{out}")
            found.append(Competitor(method, "published code", (*script, "--method", name, *options)))
    return found


def run(competitor: Competitor, filled: dict[str, str], log: Path) -> dict[str, float]:
    """Seconds and bytes of one run. Its own words go to `log`."""
    command = [part.format(**filled) for part in competitor.command]
    if not Path(command[0]).is_absolute():
        command[0] = environment(command[0])
    shutil.rmtree(filled["out"], ignore_errors=True)
    variables = {**os.environ, "GPTQMODEL_CPU_WORKERS": "4", "HF_HUB_OFFLINE": "1"}
    started = time.perf_counter()
    with log.open("w") as errors:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=variables, check=False)
    seconds = time.perf_counter() - started
    if done.returncode:
        raise SystemExit(f"{competitor.name}: exit code {done.returncode}, see {log}")
    last = done.stdout.strip().splitlines()[-1]
    if last.startswith("{"):
        said = json.loads(last)
        return {"whole": seconds, "solve": said["solve_seconds"], "peak": said["peak_bytes"]}
    manifest = json.loads((Path(filled["out"]) / "ctp.json").read_text())
    return {"whole": seconds, "solve": manifest["seconds"], "peak": manifest["peak_memory_bytes"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--only", default="", help="names of competitors, separated by semicolons")
    parser.add_argument("--method", default="", help="part of a method's name")
    parser.add_argument("--eval-windows", type=int, default=48)
    slow = is_slow(torch.empty(0, dtype=torch.bfloat16))
    parser.add_argument("--peers-dtype", default="float32" if slow else "bfloat16")
    parser.add_argument("--gptq-clone", type=Path)
    parser.add_argument("--sparsegpt-clone", type=Path)
    given = parser.parse_args()
    wanted = set(filter(None, given.only.split(";")))
    taking_part = [
        c
        for c in competitors(given.data, given.peers_dtype, given.gptq_clone, given.sparsegpt_clone)
        if (not wanted or c.name in wanted) and given.method in c.method
    ]
    model = resolve_model(NAME)
    text = load_text(str(given.data / "c4.train.jsonl"), default_part="train")
    ids_NT = windows(token_ids(text, load_tokenizer(model.path)), SEQLEN, most=given.windows, text=text)
    section = EvalSection(
        ppl=(f"wikitext2={given.data / 'wikitext2.test.txt'}", f"ptb={given.data / 'ptb.test.txt'}:lines"),
        windows=given.eval_windows,
    )
    runs: dict[Competitor, list[dict[str, float]]] = {c: [] for c in taking_part}
    quality: dict[Competitor, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        save_file({"ids": ids_NT.contiguous()}, scratch / "windows.safetensors")
        for turn in range(given.rounds):
            for competitor in taking_part:
                filled = {"model": str(model.path), "windows": str(scratch / "windows.safetensors")}
                filled |= {"out": str(scratch / "out"), "count": str(given.windows)}
                filled |= {"fitted": str(given.windows - given.windows // 4), "tuned": str(given.windows // 4)}
                measured = run(competitor, filled, scratch / "errors.txt")
                runs[competitor].append(measured)
                print(
                    f"round {turn + 1}: {competitor.method}, {competitor.name}: {measured}", file=sys.stderr, flush=True
                )
                if turn == 0:
                    report = evaluate(section, targets=[Target("it", resolve_model(str(scratch / "out")))])
                    quality[competitor] = " / ".join(f"{report.value('it', t)[0]:.2f}" for t in ("wikitext2", "ptb"))
    print("| method | by | whole time (min-max), s | compressing, s | peak, GB | WikiText-2 / PTB | time, ctp = 1 |")
    print("|---|---|---|---|---|---|---|")
    for competitor, measured in runs.items():
        ours = next((r for c, r in runs.items() if c.name == "ctp" and c.method == competitor.method), None)
        print("| " + " | ".join(row(competitor, measured, ours, quality[competitor])) + " |")


def row(
    competitor: Competitor, measured: list[dict[str, float]], ours: list[dict[str, float]] | None, quality: str
) -> list[str]:
    whole = [m["whole"] for m in measured]
    # round by round: both runs of a round met the same machine
    ratios = [] if ours is None else [a / b["whole"] for a, b in zip(whole, ours, strict=True)]
    return [
        competitor.method,
        competitor.name,
        f"{statistics.median(whole):.0f} ({min(whole):.0f}-{max(whole):.0f})",
        f"{statistics.median(m['solve'] for m in measured):.0f}",
        f"{max(m['peak'] for m in measured) / 1e9:.1f}",
        quality,
        f"{statistics.median(ratios):.2f}" if ratios else "",
    ]


if __name__ == "__main__":
    main()
