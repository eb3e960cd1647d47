"""Prompts learned on one compression or on several at once, on each of them and on compressions that none has seen.

    python benchmarks/transfer.py FULL DATA_FOLDER A B C [--unseen D,E] [--method kv-prefix] [--steps 60] [--batch 4]
        [--seqlen 256] [--seeds 2] [--windows 16] [--jobs 4]

Texts, choice and windows as in ingredients.py. A cell is the share of ln(compressed / full) that the prompt wins back,
averaged over the texts, by seed. A prompt of several compressions takes as many steps as one of one: each gets a part.
"""

import argparse
import itertools
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean

from ingredients import TEXTS, add_options, evaluation, learned, logs, split

from ctp_cli.models.resolve import resolve_model
from ctp_cli.stages.eval import Target, evaluate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("full")
    parser.add_argument("data", type=Path)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--unseen", default="", help="separated by commas")
    parser.add_argument("--method", default="soft-prompt")
    add_options(parser)
    given = parser.parse_args()
    groups = [[model] for model in given.models] + ([given.models] if len(given.models) > 1 else [])
    measured = [*given.models, *filter(None, given.unseen.split(","))]
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(given.jobs) as pool:
        folder = Path(scratch)
        halves = split(given.data / "c4.valid.jsonl", folder)
        tasks = list(itertools.product(range(len(groups)), range(given.seeds)))

        def learn(group: int, seed: int) -> None:
            output = folder / f"{group}-{seed}"
            learned(given, groups[group], f"--method {given.method}", seed, halves[0], output)

        list(pool.map(learn, *zip(*tasks, strict=True)))
        targets = [Target("full", resolve_model(given.full))]
        for model in measured:
            targets.append(Target(model, resolve_model(model)))
            targets += [
                Target(f"{model} {g} {seed}", resolve_model(model), folder / f"{g}-{seed}") for g, seed in tasks
            ]
        report = evaluate(evaluation(given, halves[1]), targets=targets)
    full = logs(report, "full")

    def won_back(model: str, group: int) -> str:
        compressed, shares = logs(report, model), []
        lost = mean(c - f for c, f in zip(compressed, full, strict=True))
        for seed in range(given.seeds):
            prompted = logs(report, f"{model} {group} {seed}")
            shares.append(mean(c - p for c, p in zip(compressed, prompted, strict=True)) / lost)
        return " ".join(f"{share:.0%}" for share in shares)

    print(f"| learned on | {' | '.join(Path(model).name for model in measured)} |\n|---" + "|---" * len(measured) + "|")
    for label in ("full", *measured):
        values = ", ".join(f"{report.value(label, text)[0]:.2f}" for text in TEXTS)
        print(f"| {Path(label).name}: perplexity of {', '.join(TEXTS)} {values}" + " |" * (len(measured) + 1))
    for number, group in enumerate(groups):
        cells = (won_back(model, number) for model in measured)
        print(f"| {', '.join(Path(model).name for model in group)} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
