"""What each ingredient of learning gives: the same model, text and number of steps, one choice changed at a time.

    python benchmarks/ingredients.py FULL COMPRESSED DATA_FOLDER [--steps 60] [--batch 4] [--seqlen 256] [--seeds 2]
        [--windows 16] [--only "soft prompt,teacher"] [--jobs 4]

DATA_FOLDER holds c4.train.jsonl, c4.valid.jsonl, wikitext2.test.txt and ptb.test.txt. Prompts are learned on the first,
chosen on the first half of the second's documents, and measured on its second half and on the other two, none of which
they saw; windows of 1024 tokens. Gap: what a prompt wins back of ln(compressed / full), averaged over the texts.
"Against the plain prompt" is the paired difference in nats per token to the first row's first seed, window by window.
--jobs: prompts learned at the same time, where a GPU has room for several.
"""

import argparse
import math
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean

from ctp_cli.models.resolve import resolve_model
from ctp_cli.recipe import EvalSection
from ctp_cli.stages.eval import EvalReport, Target, evaluate

TEXTS = ("c4", "wikitext2", "ptb")
PLAIN = "soft prompt"
INSTRUCTION = (  # the paper's hard prompt names the compression and asks to mind it; this one does so in other words
    "Some of your parameters were removed or rounded. Read what comes next with care, and say what is most likely."
)
VARIANTS = {
    PLAIN: "",
    "teacher, half of the loss": "--teacher {full}",
    "teacher alone": "--teacher {full} --teacher-share 1",
    "from an instruction": f"--init 'text:{INSTRUCTION}'",
    "50 tokens": "--tokens 50",
    "rate 3e-3": "--lr 3e-3",
    "rate 3e-2": "--lr 3e-2",
    "kv-prefix": "--method kv-prefix",
    "kv-prefix, teacher": "--method kv-prefix --teacher {full}",
    "kv-prefix, from the soft prompt": "--method kv-prefix --init {plain}",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("full")
    parser.add_argument("compressed")
    parser.add_argument("data", type=Path)
    add_options(parser)
    parser.add_argument("--only", default=",".join(VARIANTS).replace(", ", "; "), help="with ; for commas in names")
    given = parser.parse_args()
    names = [name.replace(";", ",") for name in given.only.split(",")]
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(given.jobs) as pool:
        folder = Path(scratch)
        halves = split(given.data / "c4.valid.jsonl", folder)
        prompts: dict[tuple[str, int], Path] = {}
        seconds: dict[str, float] = {}

        def learn(name: str, seed: int) -> None:
            started = time.monotonic()
            number = f"{names.index(name)}-{seed}"
            learned(given, [given.compressed], VARIANTS[name], seed, halves[0], folder / number)
            prompts[name, seed], seconds[name] = folder / number, time.monotonic() - started
            print(f"{name}, seed {seed}: {seconds[name]:.0f} s", file=sys.stderr, flush=True)

        tasks = [(name, seed) for seed in range(given.seeds) for name in names]
        for started_from_another in (False, True):  # which has to be there
            these = [task for task in tasks if ("{plain}" in VARIANTS[task[0]]) == started_from_another]
            list(pool.map(learn, *zip(*these, strict=True)) if these else ())
        section = evaluation(given, halves[1])
        model = resolve_model(given.compressed)
        targets = [Target(f"{name} {seed}", model, prompts[name, seed]) for name, seed in tasks]
        targets += [Target("compressed", model), Target("full", resolve_model(given.full))]
        table(evaluate(section, targets=targets), names, given.seeds, seconds)


def split(text: Path, folder: Path) -> tuple[Path, Path]:
    """The first and the second half of a file's lines."""
    lines = text.read_text().splitlines(keepends=True)
    halves = folder / "first.jsonl", folder / "second.jsonl"
    for path, part in zip(halves, (lines[: len(lines) // 2], lines[len(lines) // 2 :]), strict=True):
        path.write_text("".join(part))
    return halves


def add_options(parser: argparse.ArgumentParser) -> None:
    for name, default in {"steps": 60, "batch": 4, "seqlen": 256, "seeds": 2, "windows": 16, "jobs": 1}.items():
        parser.add_argument(f"--{name}", type=int, default=default)


def evaluation(given: argparse.Namespace, c4: Path) -> EvalSection:
    wikitext2, ptb = given.data / "wikitext2.test.txt", f"{given.data / 'ptb.test.txt'}:lines"
    return EvalSection(ppl=(f"c4={c4}", f"wikitext2={wikitext2}", f"ptb={ptb}"), windows=given.windows)


def learned(
    given: argparse.Namespace, models: Sequence[str], variant: str, seed: int, chosen_on: Path, output: Path
) -> None:
    """Learn a prompt into the folder `output`."""
    plain = output.parent / f"0-{seed}" / "prompt.safetensors"
    options = shlex.split(variant.format(full=shlex.quote(given.full), plain=plain))
    command = [sys.executable, "-m", "ctp_cli", "learn", *models, "-q", "-o", str(output)]
    command += ["--text", str(given.data / "c4.train.jsonl"), "--validation", str(chosen_on), "--seed", str(seed)]
    command += ["--steps", str(given.steps), "--batch-size", str(given.batch), "--seqlen", str(given.seqlen)]
    command += ["--validate-every", str(max(given.steps // 3, 1)), "--validation-windows", "16", *options]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def logs(report: EvalReport, label: str) -> list[float]:
    return [math.log(report.value(label, text)[0]) for text in TEXTS]


def table(report: EvalReport, names: list[str], seeds: int, seconds: dict[str, float]) -> None:
    compressed, full = logs(report, "compressed"), logs(report, "full")
    print(f"| | seconds | {' | '.join(TEXTS)} | gap won back, by seed | against the plain prompt, by text |")
    print("|---" * (len(TEXTS) + 4) + "|")
    for label in ("full", "compressed"):
        values = (f"{value:.2f} ± {error:.2f}" for value, error in (report.value(label, text) for text in TEXTS))
        print(f"| {label} | | {' | '.join(values)} | | |")
    for name in names:
        labels = [f"{name} {seed}" for seed in range(seeds)]
        values = (f"{math.exp(mean(math.log(report.value(x, text)[0]) for x in labels)):.2f}" for text in TEXTS)
        gaps = []
        for label in labels:
            won = mean(c - p for c, p in zip(compressed, logs(report, label), strict=True))
            gaps.append(won / mean(c - f for c, f in zip(compressed, full, strict=True)))
        against = [score.against_first for score in report.scores if score.label == labels[0]]
        cells = [f"{seconds[name]:.0f}", *values, " ".join(f"{gap:.0%}" for gap in gaps)]
        print(f"| {name} | {' | '.join(cells)} | {'; '.join(filter(None, against))} |")


if __name__ == "__main__":
    main()
