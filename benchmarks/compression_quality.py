"""Perplexity after compression: one pass and tuned, beside the published SparseGPT/GPTQ code where that was measured.

    python benchmarks/compression_quality.py DATA_FOLDER [--only "50%,4 bit"] [--how "one pass,tuned"]
        [--tune-windows 32] [--model FOLDER] [--windows 64] [--options "--rounds 6"] [--seeds 0,1,2] [--eval-windows 48]
        [--bos]

DATA_FOLDER holds c4.train.jsonl, wikitext2.test.txt and ptb.test.txt. Protocol: the embedded SmolLM2-135M, or another
model, in bfloat16; calibration on the first windows of 1024 tokens, tuning on those after them; evaluation on at most
48 windows of 1024, or --eval-windows, no BOS but with --bos. Excess: what a model loses against the full one, nats per
token, averaged over both texts.
The reference figures were measured with the published code on the embedded model and are only quoted here.
--seeds: 0 is the calibration text as it comes, another shuffles its documents, so that others calibrate and tune.
"""

import argparse
import itertools
import math
import random
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ctp_cli.models.embedded import NAME
from ctp_cli.models.resolve import resolve_model
from ctp_cli.recipe import EvalSection
from ctp_cli.stages.eval import Target, evaluate

GROUP = ["--group-size", "64"]
SETTINGS: dict[str, list[str]] = {
    "50%": ["--sparsity", "0.5"],
    "50% + 4 bit": ["--sparsity", "0.5", "--bits", "4", *GROUP],
    "50% + 4 bit per row": ["--sparsity", "0.5", "--bits", "4", "--group-size", "row"],
    "4 bit": ["--bits", "4", *GROUP],
    "3 bit": ["--bits", "3", *GROUP],
    "2 bit": ["--bits", "2", *GROUP],
    "62.5%": ["--sparsity", "0.625"],
    "75%": ["--sparsity", "0.75"],
    "2:4": ["--sparsity", "2:4"],
    "8:16": ["--sparsity", "8:16"],
    "50% + 3 bit": ["--sparsity", "0.5", "--bits", "3", *GROUP],
}
REFERENCE = {
    "50%": (38.93, 86.53),
    "50% + 4 bit": (61.4, 135.3),
    "50% + 4 bit per row": (61.4, 135.3),
    "4 bit": (28.02, 59.22),
}
"""WikiText-2 and PTB after the published code, on the embedded model; with pruning it quantizes per row."""
PLAIN = ["--pruner", "sparsegpt", "--refine", "0", "--act-order", "none", "--no-mse-clip", "--asymmetric"]
"""What the published code does; its quantizing drivers, unlike its pruning one, also take layers in turn."""


def options(setting: str, how: str, tune_windows: int) -> list[str]:
    if how == "reference settings":
        in_turn = ["--true-sequential"] if setting.startswith("50% + ") else ["--no-true-sequential"]
        return [*SETTINGS[setting], *PLAIN, *in_turn]
    return [*SETTINGS[setting], *(["--tune-windows", str(tune_windows)] if how == "tuned" else [])]


def shuffled(text: Path, seed: int, folder: Path) -> Path:
    """The text's documents, one a line, in the order that the seed draws; the text itself for 0."""
    if not seed:
        return text
    documents = text.read_bytes().splitlines(keepends=True)
    random.Random(seed).shuffle(documents)
    copy = folder / f"{text.stem}.{seed}{text.suffix}"
    copy.write_bytes(b"".join(documents))
    return copy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", default=NAME)
    parser.add_argument("--only", default=",".join(SETTINGS), help="settings, separated by commas")
    parser.add_argument("--how", default="one pass,tuned", help="of: reference settings, one pass, tuned")
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--tune-windows", type=int, default=32)
    parser.add_argument("--options", default="", help="further options of `ctp compress`")
    parser.add_argument("--eval-windows", type=int, default=48)
    parser.add_argument("--bos", action="store_true", help="before every window, as Gemma wants it")
    parser.add_argument("--seeds", default="0", help="of the calibration text's documents, 0 as they come")
    given = parser.parse_args()
    texts = {"wikitext2": "wikitext2.test.txt", "ptb": "ptb.test.txt:lines"}
    section = EvalSection(
        ppl=tuple(f"{name}={given.data / file}" for name, file in texts.items()),
        windows=given.eval_windows,
        bos=given.bos,
    )

    def measured(path: str) -> list[tuple[float, float]]:
        report = evaluate(section, targets=[Target("it", resolve_model(path))])
        return [report.value("it", name) for name in texts]

    full = measured(given.model)
    print(
        "| | how | seconds | WikiText-2 | PTB | excess | its share of the reference's |\n|---|---|---|---|---|---|---|"
    )
    print(f"| full model | | | {' | '.join(f'{value:.2f} ± {error:.2f}' for value, error in full)} | | |", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        path = str(Path(scratch) / "model")
        for setting in given.only.split(","):
            for how, seed in itertools.product(given.how.split(","), map(int, given.seeds.split(","))):
                command = [sys.executable, "-m", "ctp_cli", "compress", given.model, "-q", "--force", "-o", path]
                command += ["--windows", str(given.windows), "--calibration"]
                command += [str(shuffled(given.data / "c4.train.jsonl", seed, Path(scratch)))]
                command += [*options(setting, how, given.tune_windows), *shlex.split(given.options)]
                command += ["--bos"] if given.bos else []
                started = time.monotonic()
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
                seconds = time.monotonic() - started
                found = measured(path)
                known = REFERENCE.get(setting) if given.model == NAME else None
                label = [how, given.options, f"seed {seed}" if given.seeds != "0" else ""]
                cells = [setting, " ".join(filter(None, label)), f"{seconds:.0f}"]
                for (value, error), theirs in zip(found, known or (0, 0), strict=True):
                    cells.append(f"{value:.2f} ± {error:.2f}" + (f" ({value / theirs - 1:+.1%})" if theirs else ""))
                excess = sum(math.log(value / base) for (value, _), (base, _) in zip(found, full, strict=True)) / 2
                share = ""
                if known is not None:
                    lost = sum(math.log(value / base) for value, (base, _) in zip(known, full, strict=True)) / 2
                    share = f"{excess / lost:.2f}"
                print(f"| {' | '.join(cells)} | {excess:.3f} | {share} |", flush=True)


if __name__ == "__main__":
    main()
