"""Perplexity after compression, beside the published SparseGPT/GPTQ code on the same model, windows and texts.

    python benchmarks/compression_quality.py DATA_FOLDER [--only NAME] [--texts wikitext2,ptb,c4]

DATA_FOLDER holds c4.train.jsonl, wikitext2.test.txt, ptb.test.txt and c4.valid.jsonl. Protocol: SmolLM2-135M in
bfloat16; calibration on the first 64 windows of 1024 tokens, tuning on the 96 after them; evaluation on at
most 48 windows of 1024, no BOS. The reference figures were measured on another machine with the published code and are
only quoted here.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ctp_cli.models.embedded import NAME
from ctp_cli.models.resolve import resolve_model
from ctp_cli.recipe import EvalSection
from ctp_cli.stages.eval import Target, evaluate

_PLAIN = ["--target", "layer", "--act-order", "none", "--no-true-sequential", "--no-mse-clip", "--asymmetric"]
_TUNED = ["--tune-windows", "96"]
# name -> (options of `ctp compress`, the reference's (WikiText-2, PTB, C4), 0 where not measured)
CASES: dict[str, tuple[list[str], tuple[float, float, float]]] = {
    "50%, reference settings": (["--sparsity", "0.5", *_PLAIN], (38.93, 86.53, 0)),
    "50%, defaults": (["--sparsity", "0.5"], (38.93, 86.53, 0)),
    "50% + 4 bit per row, reference settings": (
        ["--sparsity", "0.5", "--bits", "4", "--group-size", "row", *_PLAIN, "--true-sequential"],
        (61.4, 135.3, 86.0),
    ),
    "50% + 4 bit, defaults": (["--sparsity", "0.5", "--bits", "4"], (61.4, 135.3, 86.0)),
    "4 bit g64, reference settings": (["--bits", "4", "--group-size", "64", *_PLAIN], (28.02, 59.22, 0)),
    "4 bit, defaults": (["--bits", "4"], (28.02, 59.22, 0)),
    "50%, tuned": (["--sparsity", "0.5", *_TUNED], (38.93, 86.53, 0)),
    "50% + 4 bit, tuned": (["--sparsity", "0.5", "--bits", "4", *_TUNED], (61.4, 135.3, 86.0)),
    "4 bit, tuned": (["--bits", "4", *_TUNED], (28.02, 59.22, 0)),
}
_FULL = (21.30, 45.79, 30.13)


def texts(folder: Path, names: list[str]) -> tuple[str, ...]:
    files = {"wikitext2": "wikitext2.test.txt", "ptb": "ptb.test.txt:lines", "c4": "c4.valid.jsonl"}
    return tuple(f"{name}={folder / files[name]}" for name in names)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--texts", default="wikitext2,ptb")
    arguments = parser.parse_args()
    names = arguments.texts.split(",")
    section = EvalSection(ppl=texts(arguments.data, names), windows=48)
    columns = ["wikitext2", "ptb", "c4"]
    print("| | seconds | " + " | ".join(names) + " | reference |\n|---|---|" + "---|" * (len(names) + 1), flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        for case, (options, reference) in {"full model": ([], _FULL), **CASES}.items():
            if arguments.only not in case:
                continue
            path, seconds = NAME, 0.0
            if options:
                path = str(Path(scratch) / "model")
                calibration = ["--calibration", str(arguments.data / "c4.train.jsonl")]
                started = time.monotonic()
                command = [sys.executable, "-m", "ctp_cli", "compress", NAME, *options, *calibration, "-q", "--force"]
                subprocess.run([*command, "-o", path], check=True, stdout=subprocess.DEVNULL)
                seconds = time.monotonic() - started
            report = evaluate(section, targets=[Target("it", resolve_model(path))])
            cells = []
            for name in names:
                value, error = report.value("it", name)
                known = reference[columns.index(name)]
                cells.append(f"{value:.2f} ± {error:.2f}" + (f" ({value / known - 1:+.1%})" if known else ""))
            quoted = " / ".join(f"{value:g}" for value in reference if value)
            print(f"| {case} | {seconds:.0f} | {' | '.join(cells)} | {quoted} |", flush=True)


if __name__ == "__main__":
    main()
