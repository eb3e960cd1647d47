"""Do other engines read what ctp writes? Makes checkpoints, lets foreign readers load them, compares logits.

And the other way round: does ctp take what others make, see others.py. Then vLLM serves a stitched checkpoint, and a
prompt per request: see serve.py.

    .venv/bin/python tests/interop/run.py              # everything; the first time builds the environments
    .venv/bin/python tests/interop/run.py --only w3    # the checkpoints whose name contains w3
    .venv/bin/python tests/interop/run.py --format gptq     # one format, and only the environments of its readers
    .venv/bin/python tests/interop/run.py --environment vllm      # one environment
    .venv/bin/python tests/interop/run.py --only serving          # no checkpoints, only the servers

Run from ctp's own environment. stdout carries the tables, stderr the progress; exit code 1 on failure.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from environments import BuildError, environment_python
from others import Other, others, use, write_twin, write_windows
from tables import print_table, row_name

HERE = Path(__file__).resolve().parent
ENVIRONMENTS = {
    "gptqmodel": ("gptq",),
    "autogptq": ("gptq",),
    "llmcompressor": ("compressed-tensors",),
    "vllm": ("gptq", "compressed-tensors"),
}
"""The formats that are read in an environment."""
FORMATS = ("gptq", "compressed-tensors")


ROTARY = {
    "rope_type": "llama3",
    "rope_theta": 200.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
"""Of the random model: nobody's default, so that a reader that does not find them is found out."""


class RunError(RuntimeError):
    """A checkpoint could not be made or read; the message carries the output of the command that failed."""


@dataclass(frozen=True)
class Case:
    """One checkpoint: what `ctp compress` is told."""

    bits: int
    group_size: int
    symmetric: bool = True
    act_order: str = "none"
    """As in `ctp compress`. column is desc_act, where groups are scattered; the others should look alike on disk."""
    sparsity: float | None = None
    embedded: bool = False
    """The embedded default model, not the small random one."""
    one_dense: bool = False
    """One linear layer has 16-bit weights; made in format ctp and converted."""

    @property
    def name(self) -> str:
        parts = [
            "smollm2" if self.embedded else "random",
            f"s{self.sparsity:.0%}".rstrip("%") if self.sparsity else "",
            f"w{self.bits}",
            f"g{self.group_size}",
            "sym" if self.symmetric else "asym",
            "" if self.act_order == "none" else self.act_order,
            "one-dense" if self.one_dense else "",
        ]
        return "-".join(part for part in parts if part)

    def forms(self, environment: str) -> list[str]:
        """The formats in which this environment's readers should read it."""
        forms = [form for form in ENVIRONMENTS[environment] if form in self.written()]
        return [form for form in forms if not self.unread(environment, form)]

    def unread(self, environment: str, form: str) -> str:
        """Why this environment's readers do not read that format of theirs, "" if they should."""
        if environment in ("autogptq", "vllm") and form == "gptq" and not self.symmetric:
            return "gptq_v2"
        if environment == "autogptq" and self.one_dense:
            return "a dense layer"  # it takes every layer for quantized
        if environment == "vllm" and self.bits != 4:
            return f"{self.bits} bit"  # its kernel for CPUs has 4
        if environment == "vllm" and self.act_order == "column":
            return "scattered groups"  # it gave them up
        return ""

    def written(self) -> list[str]:
        """The formats in which it can be written so that a twin exists."""
        # the scales of a bfloat16 model are others in compressed-tensors, and so are its weights: no twin; and it has
        # no scattered groups any more
        return [form for form in FORMATS if form == "gptq" or not (self.embedded or self.act_order == "column")]

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
    static = [Case(4, 64, symmetric, "static") for symmetric in (True, False)]
    return [*plain, joint, *static, Case(4, 64, act_order="group", embedded=True), Case(4, 64, one_dense=True)]


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
        vocab_size=512,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,  # on stdout
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
        rope_parameters=ROTARY,
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


def compress(case: Case, model: Path, text: Path, folder: Path, forms: Iterable[str]) -> None:
    """The checkpoint and its dense twin: runs of ctp that differ in --format only; and the twin's logits."""
    first = ("ctp",) if case.one_dense else ("dense", *forms)
    for form in first:
        options = [*case.options(), "--format", form, "--calibration", str(text), "--force"]
        ctp("compress", str(model), *options, "-o", str(folder / form))
    if case.one_dense:
        leave_dense(folder / "ctp", "model.layers.0.mlp.down_proj", model)
        for form in ("dense", *forms):
            ctp("convert", str(folder / "ctp"), "--format", form, "--force", "-o", str(folder / form))
    write_reference(folder)


def leave_dense(checkpoint: Path, layer: str, model: Path) -> None:
    """Give a layer of a checkpoint in format ctp the model's own weights instead of its codes."""
    from safetensors.torch import load_file, save_file

    files = sorted(checkpoint.glob("ctp*.safetensors"))
    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(f"{layer}.")}
    kept[f"{layer}.weight"] = load_file(model / "model.safetensors")[f"{layer}.weight"]
    for file in files:
        file.unlink()
    save_file(kept, checkpoint / "ctp.safetensors", metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(kept, "ctp.safetensors")}
    (checkpoint / "ctp.safetensors.index.json").write_text(json.dumps(index))


def ctp(*command: str) -> None:
    """Run a command of ctp, in this process: importing takes longer than most of them."""
    from typer.testing import CliRunner

    from ctp_cli.app import app

    done = CliRunner().invoke(app, command)
    if done.exit_code:
        raise RunError(f"exit code {done.exit_code} from: ctp {' '.join(command)}\n{done.output}")


def write_reference(folder: Path, tokens: int = 64) -> None:
    """Random token ids and what transformers makes of them, with none of ctp's code."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "dense", dtype=torch.float32)
    ids = torch.randint(model.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        logits = model(ids).logits
    save_file({"ids": ids, "logits": logits.contiguous()}, folder / "reference.safetensors")


def read(python: Path, checkpoints: list[Path]) -> list[dict[str, Any]]:
    """What each reader of an environment makes of the checkpoints, see read_checkpoint.py."""
    command = [str(python), str(HERE / "read_checkpoint.py"), *map(str, checkpoints)]
    return [json.loads(line) for line in _output(command, allowed=(0, 1)).splitlines()]


def serve(python: Path, model: Path, folder: Path) -> bool:
    """Stitch a prompt onto the model and let serve.py compare; prints what it says. Returns whether all was equal."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ctp_cli.prompts.file import Prompt, save_prompt

    table = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).get_input_embeddings().weight.detach()
    ids = AutoTokenizer.from_pretrained(model)("Now follows the manual of a programming language. " * 5)["input_ids"]
    noise = torch.randn(len(ids), table.shape[1], generator=torch.Generator().manual_seed(0))
    prompt, stitched = folder / "prompt.safetensors", folder / "stitched"
    save_prompt(prompt, Prompt(table[ids] + table.std() * noise))  # as learned ones: near the table, but not of it
    ctp("stitch", str(prompt), str(model), "-o", str(stitched), "--force")
    command = [str(python), str(HERE / "serve.py"), str(stitched), str(model), str(prompt)]
    lines = _output([*command, "--log", str(folder / "vllm.log")], allowed=(0, 1)).splitlines()
    records = [json.loads(line) for line in lines]
    for record in records:
        print("serving:", record.pop("kind"), json.dumps(record))
    return all(record["passed"] for record in records)


def _output(command: list[str], allowed: tuple[int, ...] = (0,)) -> str:
    variables = {**os.environ, "GPTQMODEL_CPU_WORKERS": "4"}
    done = subprocess.run(command, capture_output=True, text=True, env=variables, check=False)
    if done.returncode not in allowed or (done.returncode and not done.stdout):
        said = "\n".join(done.stderr.strip().splitlines()[-20:])
        raise RunError(f"exit code {done.returncode} from: {' '.join(command)}\n{said}")
    return done.stdout


@contextmanager
def counted(broken: list[str], what: str) -> Iterator[None]:
    """What cannot be made, read or served is told and counted, and all else still runs."""
    print(what, file=sys.stderr, flush=True)
    try:
        yield
    except RunError as error:
        print(f"FAILED {what}: {error}", file=sys.stderr)
        broken.append(what)


def read_all(pythons: dict[str, Path], made: dict[str, list[Path]], broken: list[str]) -> list[dict[str, Any]]:
    """The readings of all checkpoints, which are given by environment."""
    readings = []
    for name, checkpoints in made.items():
        if checkpoints:
            with counted(broken, f"{name} reads {len(checkpoints)} checkpoints"):
                readings += [reading | {"environment": name} for reading in read(pythons[name], checkpoints)]
    return readings


def ours(
    wanted: list[Case], forms: Collection[str], pythons: dict[str, Path], models: dict[bool, Path | None], folder: Path
) -> tuple[list[dict[str, Any]], list[str]]:
    """Checkpoints of ctp in everyone's readers: the table is printed. `models`: whether embedded, and where it is.

    Returns the readings, and what is broken.
    """
    made: dict[str, list[Path]] = {name: [] for name in pythons}
    broken: list[str] = []
    unread = {}
    for case in wanted:
        model = models[case.embedded]
        reads = {name: [form for form in case.forms(name) if form in forms] for name in pythons}
        if model is None or not any(reads.values()):
            continue
        with counted(broken, case.name):
            found = {form for some in reads.values() for form in some}
            compress(case, model, folder / "calibration.txt", folder / case.name, found)
            for name, some in reads.items():
                made[name] += [folder / case.name / form for form in some]
                for form in set(ENVIRONMENTS[name]) & found - set(some):
                    unread[row_name(folder / case.name / form), name] = f"not read: {case.unread(name, form)}"
    readings = read_all(pythons, made, broken)
    print_table("What ctp writes, in other readers", readings, unread)
    return readings, broken


def theirs(
    wanted: list[Other], pythons: dict[str, Path], model: Path, folder: Path
) -> tuple[list[dict[str, Any]], list[str]]:
    """Checkpoints of other makers in ctp: the table is printed. Returns the readings, and what is broken."""
    made: dict[str, list[Path]] = {name: [] for name in pythons}
    broken: list[str] = []
    used = {}
    text, windows = folder / "calibration.txt", folder / "windows.safetensors"
    write_windows(windows, model, text)
    for other in wanted:
        checkpoint, stitched = (folder / name / other.form for name in (other.name, f"{other.name}-stitched"))
        with counted(broken, other.name):
            _output(other.command(pythons[other.environment], model, windows, checkpoint))
            commands = use(ctp, checkpoint, stitched, text)
            for done in (checkpoint, stitched):
                write_twin(ctp, done)
                made[other.environment].append(done)
            used[row_name(checkpoint), "ctp"] = ", ".join(commands)
    readings = read_all(pythons, made, broken)
    print_table("What others make: what ctp did with it, and its logits beside the maker's", readings, used)
    return readings, broken


def run(only: str, forms: Collection[str], environments: Iterable[str], folder: Path) -> int:
    """Make, read and tabulate. Returns the exit code."""
    pythons = {name: environment_python(name) for name in environments}
    text, small = folder / "calibration.txt", folder / "random-model"
    write_text(text)
    write_random_model(small, text)
    wanted = [case for case in cases() if only in case.name]
    embedded = embedded_model() if any(case.embedded for case in wanted) else None
    readings, broken = ours(wanted, forms, pythons, {True: embedded, False: small}, folder)
    foreign = [other for other in others() if other.environment in pythons and only in other.name]
    if foreign := [other for other in foreign if other.form in forms]:
        more, failed = theirs(foreign, pythons, small, folder)
        readings, broken = readings + more, broken + failed
    served = "vllm" in pythons and only in "serving"
    if served:
        with counted(broken, "vllm serves"):
            if not serve(pythons["vllm"], embedded_model() or small, folder):
                broken.append("serving")
    failures = sum(not reading["passed"] for reading in readings)
    print(f"{len(readings)} readings, {failures} failed; {len(broken)} checkpoints, environments or servers failed")
    return 1 if failures or broken or not (readings or served) else 0


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="only checkpoints whose name contains this")
    parser.add_argument("--format", choices=FORMATS, help="only this one (default: all)")
    parser.add_argument("--environment", choices=ENVIRONMENTS, help="only this one's readers (default: all)")
    parser.add_argument("--keep", type=Path, help="folder for the checkpoints (default: one that is removed)")
    arguments = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory(prefix="ctp-interop-") as scratch:
            folder = arguments.keep or Path(scratch)
            folder.mkdir(parents=True, exist_ok=True)
            forms = [arguments.format] if arguments.format else FORMATS
            names = [arguments.environment] if arguments.environment else list(ENVIRONMENTS)
            names = [name for name in names if set(ENVIRONMENTS[name]) & set(forms)]
            return run(arguments.only, forms, names, folder)
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    raise SystemExit(main())
