"""Do other engines read what ctp writes? Makes checkpoints, lets foreign readers load them, compares logits.

    .venv/bin/python tests/interop/run.py              # everything; the first time builds the environments
    .venv/bin/python tests/interop/run.py --only w3    # the checkpoints whose name contains w3
    .venv/bin/python tests/interop/run.py --format gptq     # one format, and only the environment of its readers

Run from ctp's own environment. stdout carries the table, stderr the progress; exit code 1 on failure.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from environments import BuildError, environment_python

HERE = Path(__file__).resolve().parent
CTP = Path(sys.executable).with_name("ctp")
ENVIRONMENTS = {"gptq": "gptqmodel", "compressed-tensors": "llmcompressor"}
"""The environment in which a format is read."""


class RunError(RuntimeError):
    """A checkpoint could not be made or read; the message carries the output of the command that failed."""


@dataclass(frozen=True)
class Case:
    """One checkpoint: what `ctp compress` is told."""

    bits: int
    group_size: int
    symmetric: bool = True
    act_order: str = "none"
    """As in `ctp compress`. column is desc_act, where groups are scattered; the others look alike on disk."""
    sparsity: float | None = None
    embedded: bool = False
    """The embedded default model, not the small random one."""

    @property
    def name(self) -> str:
        parts = [
            "smollm2" if self.embedded else "random",
            f"s{self.sparsity:.0%}".rstrip("%") if self.sparsity else "",
            f"w{self.bits}",
            f"g{self.group_size}",
            "sym" if self.symmetric else "asym",
            "" if self.act_order == "none" else self.act_order,
        ]
        return "-".join(part for part in parts if part)

    def options(self) -> list[str]:
        """The options of `ctp compress` that make it."""
        options = ["--bits", str(self.bits), "--group-size", str(self.group_size)]
        options.append("--symmetric" if self.symmetric else "--asymmetric")
        options += ["--act-order", self.act_order]
        # the format is on trial here, not the accuracy
        options += ["--windows", "16", "--seqlen", "128"]
        options += ["--quantizer", "rtn", "--no-mse-clip"] if self.embedded else []
        return options + (["--sparsity", str(self.sparsity)] if self.sparsity else [])


def cases() -> list[Case]:
    """Every bits, symmetry and act-order; group sizes take turns, so that every pair of settings meets."""
    plain = [
        Case(bits, 64 if symmetric == (act_order == "none") else 32, symmetric, act_order)
        for bits, symmetric, act_order in product((2, 3, 4, 8), (True, False), ("none", "column"))
    ]
    joint = Case(4, 64, act_order="group", sparsity=0.5)
    return [*plain, joint, Case(4, 64, act_order="group", embedded=True)]


def write_text(path: Path) -> None:
    """Calibration text that every Python carries."""
    from pydoc_data.topics import topics

    path.write_text("\n\n".join(topics[name] for name in sorted(topics))[:300_000])


def write_random_model(folder: Path, text: Path) -> None:
    """A small random Llama and a tokenizer for the text; float16, as readers decode, so twins can agree exactly."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train([str(text)], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.08,  # larger than usual: without training, layers must still move the logits
        bos_token_id=fast.bos_token_id,
        eos_token_id=fast.eos_token_id,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).half().save_pretrained(folder)


def embedded_model() -> Path | None:
    """The embedded default model's folder, or None (and a word why) where it cannot be had."""
    from ctp_cli.errors import CtpError
    from ctp_cli.models.embedded import embedded_model as fetch

    try:
        return fetch()
    except CtpError as error:
        print(f"skipping the embedded model: {error}", file=sys.stderr)
        return None


def compress(case: Case, model: Path, text: Path, folder: Path, forms: Iterable[str]) -> dict[str, Path]:
    """The checkpoint in every format: runs of ctp that differ in --format only."""
    made = {}
    # the scales of a bfloat16 model are others in compressed-tensors, and so are its weights: no twin; and it has no
    # scattered groups any more
    left_out = {"compressed-tensors"} if case.embedded or case.act_order == "column" else set()
    for form in ("dense", *(form for form in forms if form not in left_out)):
        made[form] = folder / f"{case.name}-{form}"
        command = [str(CTP), "compress", str(model), *case.options(), "--format", form]
        _output([*command, "--calibration", str(text), "--force", "-o", str(made[form])])
    return made


def read(pythons: dict[str, Path], made: dict[str, Path]) -> list[dict[str, Any]]:
    """What each foreign reader makes of a checkpoint, see read_checkpoint.py."""
    readings = []
    for form, python in pythons.items():
        if form in made:
            command = [str(python), str(HERE / "read_checkpoint.py"), form, str(made[form]), str(made["dense"])]
            readings += [json.loads(line) for line in _output(command, allowed=(0, 1)).splitlines()]
    return readings


def _output(command: list[str], allowed: tuple[int, ...] = (0,)) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode not in allowed or (done.returncode and not done.stdout):
        said = "\n".join(done.stderr.strip().splitlines()[-20:])
        raise RunError(f"exit code {done.returncode} from: {' '.join(command)}\n{said}")
    return done.stdout


def cell(reading: dict[str, Any]) -> str:
    """The largest logit difference of one reading, or that it failed."""
    if reading["error"]:
        return "FAILED: no logits"
    verdict = "" if reading["passed"] else "FAILED: "
    return f"{verdict}{reading['max_abs_diff']:.1e} of {reading['max_abs_logit']:.1f}"


def print_table(results: dict[str, list[dict[str, Any]]]) -> None:
    """Checkpoints down, readers across, the largest logit difference in between; then failures in full."""
    readings = {reading["reader"]: reading for made in results.values() for reading in made}
    for reader, reading in readings.items():
        print(f"{reader}: {', '.join(f'{package} {version}' for package, version in reading['versions'].items())}")
    rows = [["checkpoint", *readings]]
    for name, made in results.items():
        cells = {reading["reader"]: cell(reading) for reading in made}
        rows.append([name, *(cells.get(reader, "not read") for reader in readings)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())
    for name, readings in results.items():
        for reading in readings:
            if not reading["passed"]:
                print(f"FAILED {name}: {reading['reader']}: {reading['error'] or json.dumps(reading)}")


def run(only: str, forms: Iterable[str], folder: Path) -> int:
    """Make, read and tabulate. Returns the exit code."""
    pythons = {form: environment_python(ENVIRONMENTS[form]) for form in forms}
    text, small = folder / "calibration.txt", folder / "random-model"
    write_text(text)
    write_random_model(small, text)
    wanted = [case for case in cases() if only in case.name]
    embedded = embedded_model() if any(case.embedded for case in wanted) else None
    results, broken = {}, 0
    for case in wanted:
        model = embedded if case.embedded else small
        if model is None:
            continue
        print(case.name, file=sys.stderr, flush=True)
        try:
            results[case.name] = read(pythons, compress(case, model, text, folder, pythons))
        except RunError as error:
            print(f"FAILED {case.name}: {error}", file=sys.stderr)
            broken += 1
    if results:
        print_table(results)
    failed = sum(not reading["passed"] for readings in results.values() for reading in readings)
    print(f"{len(results)} checkpoints read, {failed} readings failed, {broken} checkpoints not made or read")
    return 1 if failed or broken or not results else 0


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="only checkpoints whose name contains this")
    parser.add_argument("--format", choices=ENVIRONMENTS, help="only this one (default: all)")
    parser.add_argument("--keep", type=Path, help="folder for the checkpoints (default: one that is removed)")
    arguments = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory(prefix="ctp-interop-") as scratch:
            folder = arguments.keep or Path(scratch)
            folder.mkdir(parents=True, exist_ok=True)
            return run(arguments.only, [arguments.format] if arguments.format else list(ENVIRONMENTS), folder)
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    raise SystemExit(main())
