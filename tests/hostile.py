# ruff: noqa: E501 - tables of what to write are read best in long lines
"""Inputs as an enemy or a broken disk would make them: recipes, prompt files, checkpoints and texts, mutated by a seed.

`Inputs` makes whole ones, `mutant` damages one of them in a folder and says which command is to read it, `judge` runs
that command as the shell would and says what went wrong. A mutant may be harmless; then the command succeeds.
"""

import gzip
import io
import json
import logging
import random
import resource
import shutil
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import torch
import yaml
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from ctp_cli.app import app
from ctp_cli.errors import CtpError
from ctp_cli.prompts.file import KvPrefix, Prompt, PromptMetadata, fingerprint_tokenizer, save_prompt
from ctp_cli.recipe import load

KINDS = ("recipes", "prompts", "checkpoints", "texts")
MEMORY_BYTES = 500_000_000
"""More than before the command began, at its peak: beyond this a mutant did harm."""
SECONDS = 20.0
"""Of processor time. The commands here take one or two on whole inputs."""

_SMALL = ("--windows", "2", "--seqlen", "16")
_LEARN = ("--tokens", "3", "--steps", "1", "--batch-size", "1", "--seqlen", "16", "--validation-windows", "2")
_RECIPE = """\
# a recipe whose stages all are a moment's work
model: model
output: made
seed: 0
device: cpu
compress: {sparsity: '2:4', bits: 4, group_size: 32, calibration: text.txt, windows: 2, seqlen: 16, format: ctp,
  max_memory: 4GB}
learn:
  tokens: 3
  steps: 1
  batch_size: 1
  seqlen: 16
  learning_rate: 0.01
  text: pydoc:test
  validation: text.txt
  validation_windows: 2
  init: text:be brief
stitch: {format: vocab}
eval:
  ppl: ["t=text.txt"]
  seqlen: 16
  windows: 2
  max_ppl: 1e9
bench: {prompt_len: [0, 2], seqlen: 16, new_tokens: 2, rounds: 1}
"""


@dataclass(frozen=True)
class Mutant:
    """A damaged input in place, what was done to it, and the command that reads it."""

    arguments: tuple[str, ...]
    what: str


@dataclass(frozen=True)
class Verdict:
    """`fault` None: refused or harmless, as the exit code says."""

    exit_code: int
    error: str
    fault: str | None


class Inputs:
    """Whole inputs in one folder, made once: a tiny model in every format, prompts of every kind, texts."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if (folder / "whole").exists():
            return
        folder.mkdir(parents=True, exist_ok=True)
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
        model = tiny_model("llama", folder / "dense", bos=False, **sizes)
        text = folder / "text.txt"
        text.write_text("a small text that is long enough for windows of sixteen tokens\n" * 40)
        for name in ("gptq", "compressed-tensors", "ctp"):
            line = ("compress", str(model), "--bits", "4", "--sparsity", "2:4", "--group-size", "32", "--format", name)
            self._make(*line, "--calibration", str(text), *_SMALL, "-o", str(folder / name))
        self._make(
            "compress",
            str(model),
            "--sparsity",
            "0.5",
            "--calibration",
            str(text),
            *_SMALL,
            "-o",
            str(folder / "shards"),
        )
        self._prompts(model)
        self._make("stitch", str(folder / "soft.safetensors"), str(model), "-o", str(folder / "stitched"))
        (folder / "whole").touch()

    @property
    def cache(self) -> Path:
        """Where the embedded model lies, which here is the tiny one: a recipe without a model fetches nothing."""
        place = self.folder / "cache" / "models" / "smollm2-135m"
        if not place.exists():
            shutil.copytree(self.folder / "dense", place)
        return self.folder / "cache"

    def _make(self, *arguments: str) -> None:
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output

    def _prompts(self, model: Path) -> None:
        network, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
        rows = network.get_input_embeddings().weight[5:8].detach().float().clone()
        facts = {
            "base_model": "dense",
            "tokenizer_fingerprint": fingerprint_tokenizer(tokenizer),
            "steps": 3,
            "seed": 1,
        }
        data = json.dumps({"text_sha256": "0", "file_sha256": "1"})
        soft = PromptMetadata(**facts, data=data, compression="null", validation_perplexity=9.5)
        save_prompt(self.folder / "soft.safetensors", Prompt(rows, soft))
        kv = torch.randn(2, 2, 2, 3, 16, generator=torch.Generator().manual_seed(0))
        save_prompt(self.folder / "kv.safetensors", KvPrefix(kv, PromptMetadata(kind="kv-prefix", **facts)))


def mutant(kind: str, draw: random.Random, inputs: Inputs, place: Path) -> Mutant:
    """Put a damaged input into the folder `place`, which becomes the current one of the command."""
    makers: dict[str, Callable[[random.Random, Inputs, Path], Mutant]] = {
        "recipes": _recipe,
        "prompts": _prompt,
        "checkpoints": _checkpoint,
        "texts": _text,
    }
    return makers[kind](draw, inputs, place)


def judge(made: Mutant, place: Path) -> Verdict:
    """Run the command inside this process, in the current folder, which is `place`; find any fault."""
    before = _listing(place)
    logging.getLogger().handlers.clear()  # they write to the streams of the command before
    _reset_peak()
    resident, clock = _peak(), time.process_time()
    signal.signal(signal.SIGVTALRM, _too_long)
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    try:
        result = CliRunner().invoke(app, list(made.arguments))
        code, error, out = result.exit_code, result.stderr, result.stdout
    except _TooLongError as hang:
        where = traceback.extract_tb(hang.__traceback__)[-2]  # the last one is the signal's own
        return Verdict(-1, "", f"hangs in {where.filename}:{where.lineno}")
    except BaseException as panic:  # what the libraries written in Rust raise is no Exception
        return Verdict(-1, "", f"{type(panic).__name__}: {str(panic)[:200]}")
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    lines = error.splitlines()
    said = [line for line in lines if line.startswith("error: ")]
    fault = None
    unsolvable = code == 3 and any("hold NaN or infinity" in line for line in said)  # says which layer
    if code not in (0, 2) and not unsolvable:
        fault = f"exit code {code}: {' '.join(said)[:300]}"
    elif "Traceback" in error or "Traceback" in out:
        fault = "a traceback"
    elif code == 2 and (len(said) != 1 or out.strip()):
        fault = f"{len(said)} error messages; stdout {out[:80]!r}"
    elif code == 2 and len(error) > 20_000:
        fault = f"a message of {len(error):,} characters"
    elif _peak() - resident > MEMORY_BYTES:
        fault = f"took {(_peak() - resident) / 1e6:,.0f} MB"
    elif time.process_time() - clock > SECONDS:
        fault = f"took {time.process_time() - clock:.0f} s"
    else:
        fault = _changed(before, _listing(place), succeeded=code == 0)
    return Verdict(code, " ".join(said), fault)


class _TooLongError(BaseException):
    """Past every `except Exception`."""


def _too_long(*_: object) -> None:
    raise _TooLongError


def _listing(place: Path) -> dict[str, tuple[int, int]]:
    found = {}
    for path in sorted(place.rglob("*")):
        status = path.lstat()
        found[str(path.relative_to(place))] = (status.st_size if path.is_file() else 0, status.st_mode)
    return found


def _changed(before: dict[str, Any], after: dict[str, Any], *, succeeded: bool) -> str | None:
    """Inputs stay as they are; a refused command leaves nothing, a finished one only what is whole."""
    if any(after.get(name) != what for name, what in before.items()):
        return "changed its input"
    made = [name for name in after if name not in before]
    if succeeded:
        made = [name for name in made if ".partial" in name or name.endswith((".writing", ".lock"))]
    # the stages of a recipe that were made before the refused one are whole, and are kept
    made = [name for name in made if not _in_whole_artifact(name, after)]
    made = [name for name in made if name != "made" or not any(x.startswith("made/") for x in after)]
    return f"left {', '.join(made[:3])}" if made else None


def _in_whole_artifact(name: str, after: dict[str, Any]) -> bool:
    parts = Path(name).parts
    return (
        len(parts) > 1
        and parts[0] == "made"
        and not parts[1].endswith(".partial")
        and f"made/{parts[1]}/ctp.json" in after
    )


def _reset_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def _peak() -> int:
    """Largest resident bytes since `_reset_peak`; where the system cannot start over, since the process began."""
    try:
        status = Path("/proc/self/status").read_text()
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# What is done to bytes and to values ---------------------------------------------------------------------------------

_VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 3, 7, 33, 1000, 2**31 - 1, 2**31, 2**40, 2**60, 2**63, 2**64, -(2**63), 10**400,
    0.5, -0.5, 1e-300, 1e308, float("inf"), float("nan"), "", "x", "0", "-1", "1e999", "nan", "\0", "a\0b", "..",
    "../..", "/", "/dev/null/x", "\ud800", "é\u202e", "%s{}", "[red]", "a" * 100_000, [], {}, [[]], [None], [0], [-1],
    [2**60, 2**60], ["x"] * 1000, {"": None}, {"x": 1}, {"auto_map": {"AutoConfig": "evil.py"}},
)  # fmt: skip


def _bytes(draw: random.Random, content: bytes) -> tuple[bytes, str]:
    """Damage that knows nothing of the format."""
    size = len(content)
    where, other = sorted((draw.randrange(size + 1), draw.randrange(size + 1)))
    changes: dict[str, Callable[[], bytes]] = {
        "bits flipped": lambda: _flipped(draw, content),
        "cut": lambda: content[:where],
        "head lost": lambda: content[where:],
        "middle lost": lambda: content[:where] + content[other:],
        "repeated": lambda: content[:other] + content[where:],
        "appended": lambda: content + draw.randbytes(draw.choice((1, 8, 4096))),
        "noise": lambda: content[:where] + draw.randbytes(min(64, other - where)) + content[other:],
        "NUL": lambda: content[:where] + b"\0" + content[where:],
        "zeroed": lambda: content[:where] + bytes(other - where) + content[other:],
        "BOM": lambda: b"\xef\xbb\xbf" + content,
        "UTF-16": lambda: content.decode("latin-1").encode("utf-16"),
        "Latin-1": lambda: content[:where] + b"\xe9\xff" + content[where:],
        "CR": lambda: content.replace(b"\n", b"\r"),
        "empty": lambda: b"",
        "a pickle": lambda: b"\x80\x04\x95\x1d\0\0\0\0\0\0\0\x8c\x05posix\x94\x8c\x06system\x94\x93\x94\x8c\x02id\x94\x85\x94R\x94.",
    }  # fmt: skip
    name = draw.choice(list(changes))
    return changes[name](), name


def _flipped(draw: random.Random, content: bytes) -> bytes:
    changed = bytearray(content)
    for _ in range(draw.choice((1, 1, 3, 20))):
        if changed:
            changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def _places(value: Any, depth: int = 0) -> Iterator[tuple[Any, Any]]:
    """(container, key) of everything inside; of long lists only the ends."""
    if isinstance(value, dict):
        keys = list(value)
        keys = keys if len(keys) <= 60 else keys[:30] + keys[-30:]
    else:
        keys = [*range(len(value))][:4] if isinstance(value, list) else []
    for key in keys:
        yield value, key
        if depth < 8:
            yield from _places(value[key], depth + 1)


def _value(draw: random.Random, content: Any) -> str:
    """Change one thing inside a JSON-like value, in place; return what."""
    places = list(_places(content))
    if not places:
        return "nothing"
    holder, key = draw.choice(places)
    change = draw.choice(("drop", "rename", "replace", "replace", "replace", "nest", "swap", "scale", "list"))
    if change == "drop":
        del holder[key]
    elif change == "rename" and isinstance(holder, dict):
        holder[draw.choice((f"{key}x", str(key)[:-1], str(key).upper(), "", "x" * 70_000))] = holder.pop(key)
    elif change == "nest":
        inner: Any = holder[key]
        for _ in range(draw.choice((3, 90, 900))):
            inner = [inner]
        holder[key] = inner
    elif change == "swap":
        second, other = draw.choice(places)
        try:
            holder[key], second[other] = second[other], holder[key]
            json.dumps(content)
        except (KeyError, IndexError, ValueError):  # one lay inside the other
            return "nothing"
    elif change == "scale" and type(holder[key]) in (int, float):
        holder[key] *= draw.choice((-1, 0, 0.5, 2, 2**20, 2**70))
    elif change == "list":
        holder[key] = [holder[key]] * draw.choice((2, 500))
    else:
        holder[key] = draw.choice(_VALUES)
    return f"{change} {str(key)[:40]}"


def _json(draw: random.Random, content: bytes) -> tuple[bytes, str]:
    if draw.random() < 0.25:
        return _bytes(draw, content)
    value = json.loads(content)
    what = [_value(draw, value) for _ in range(draw.choice((1, 1, 1, 2, 4)))]
    text = json.dumps(value)
    special = draw.random()
    if special < 0.03:
        return b"[" * 200_000, "deep"
    if special < 0.06:
        return text.replace(": ", ": 1" + "0" * 5000 + ', "y": ', 1).encode(), "a number of 5000 digits"
    if special < 0.09:
        return (text[:-1] + "," + text[1:]).encode(), "every key twice"
    return text.encode("utf-8", "surrogatepass"), ", ".join(what)


def _safetensors(draw: random.Random, content: bytes) -> tuple[bytes, str]:
    """A header that lies, consistently or not, or data that does."""
    if draw.random() < 0.2:
        return _bytes(draw, content)
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    names = [name for name in header if name != "__metadata__"]
    name = draw.choice(names)
    entry = header[name]
    start, end = entry["data_offsets"]
    change = draw.choice(
        ("length", "dtype", "shape", "product", "offsets", "overlap", "metadata", "json", "nan", "drop", "rename",
         "reshape", "empty", "other size", "scalar", "many", "same bytes", "deep")
    )  # fmt: skip
    if change == "length":
        lie = draw.choice((0, 1, 2, 7, length - 1, length + 1, len(content), 10**8, 2**31, 2**63, 2**64 - 1))
        return lie.to_bytes(8, "little") + content[8:], f"length {lie}"
    if change == "dtype":
        names = ("F64", "F32", "F16", "BF16", "I64", "I32", "I8", "U8", "BOOL", "F8_E4M3", "F4", "C64", "U32", "x")
        entry["dtype"] = draw.choice(names)
    elif change == "shape":
        entry["shape"] = draw.choice(([], [0], [-1], [1], [2**60], [2**32, 2**32], [2**63, 2], [0, 2**62], [1.5], "x",
                                      [2**64, 0], [1] * 70, None))  # fmt: skip
    elif change == "product":
        entry["shape"] = [2**30, 2**30]
        entry["data_offsets"] = [0, 2**62]
    elif change == "offsets":
        entry["data_offsets"] = draw.choice(
            ([0, 0], [end, start], [start + 1, end + 1], [start, end - 1], [-8, end], [start, 2**62], [2**63, 2**64],
             [start], [], None, ["0", "8"], [start, end, end], [0.0, float(end)], [True, end])
        )  # fmt: skip
    elif change == "overlap":
        header["second"] = dict(entry)
        header[draw.choice(names)]["data_offsets"] = [start, end]
    elif change == "metadata":
        facts = header.setdefault("__metadata__", {})
        key = draw.choice([*facts, "format", "format_version", "kind", "layout", "steps", "seed", "data"])
        facts[key] = draw.choice(
            ("", "x", "-1", "1" * 5000, "1e999", "nan", "kv-prefix", "soft-prompt", "bos-prompt-text", "\0", "{", "[]",
             '{"text_sha256": [1]}', "[" * 5000, "0", "2", "٣", "1_0", "tf", "np", 5, None, [], "a" * 10**6)
        )  # fmt: skip
    elif change == "json":
        return _with_header(*_json(draw, json.dumps(header).encode()), data)
    elif change == "nan":
        values = {2: (0x7C00, 0x7E00, 0xFBFF), 4: (0x7F800000, 0x7FC00000, 0x7F7FFFFF, 0xFF800000, 0x7FFFFFFF)}
        width = draw.choice((2, 4))
        pattern = draw.choice(values[width]).to_bytes(width, "little")
        count = draw.choice((1, 8, (end - start) // width))
        count = min(count, (end - start) // width)
        data = data[:start] + pattern * count + data[start + width * count :]
    elif change == "drop":
        del header[name]
        header, data = _moved(header, start, end, data, b"")
    elif change == "rename":
        header[draw.choice((f"{name}x", "", "a\0", name.upper(), "../x", name + ".weight", "0", name * 50))] = (
            header.pop(name)
        )
    elif change == "reshape" and entry["shape"]:
        count = 1
        for number in entry["shape"]:
            count *= number
        entry["shape"] = draw.choice(([count], [1, count], [count, 1], [*entry["shape"], 1], entry["shape"][::-1]))
    elif change in ("empty", "other size", "scalar"):
        wide = {"F64": 8, "I64": 8, "F16": 2, "BF16": 2, "I16": 2, "U8": 1, "I8": 1, "BOOL": 1}.get(entry["dtype"], 4)
        shape = list(entry["shape"]) or [1]
        if change == "other size":
            where = draw.randrange(len(shape))
            shape[where] = draw.choice((1, shape[where] - 1, shape[where] + 1, 2 * shape[where], shape[where] // 2))
        shape = {"empty": [0, *shape[1:]], "scalar": []}.get(change, shape)
        count = 1
        for number in shape:
            count *= number
        entry["shape"] = shape
        grown = (data[start:end] * 3)[: count * wide].ljust(count * wide, b"\1")
        header, data = _moved(header, start, end, data, grown)
        entry["data_offsets"] = [start, start + count * wide]
    elif change == "many":
        for number in range(draw.choice((100, 20_000))):
            header[f"n{number}"] = {"dtype": "U8", "shape": [0], "data_offsets": [end, end]}
    elif change == "same bytes":
        header[draw.choice(("second", "prompt_embeddings", "key_values"))] = dict(entry)
    elif change == "deep":
        entry["shape"] = json.loads("[" * 800 + "]" * 800)
    return _with_header(json.dumps(header).encode("utf-8", "surrogatepass"), f"{change} of {name}", data)


def _with_header(header: bytes, what: str, data: bytes) -> tuple[bytes, str]:
    return len(header).to_bytes(8, "little") + header + data, what


def _moved(header: dict[str, Any], start: int, end: int, data: bytes, new: bytes) -> tuple[dict[str, Any], bytes]:
    """Other data between two offsets, and all that comes later moved to fit: a file that is whole."""
    shift = len(new) - (end - start)
    for entry in header.values():
        offsets = entry.get("data_offsets")
        if offsets and offsets[0] >= end:
            entry["data_offsets"] = [offsets[0] + shift, offsets[1] + shift]
    return header, data[:start] + new + data[end:]


# The four kinds ------------------------------------------------------------------------------------------------------


def _recipe(draw: random.Random, inputs: Inputs, place: Path) -> Mutant:
    (place / "model").symlink_to(inputs.folder / "dense")
    shutil.copyfile(inputs.folder / "text.txt", place / "text.txt")
    content = _RECIPE.encode()
    if (how := draw.random()) < 0.3:
        content, what = _bytes(draw, content)
    elif how < 0.65:
        value = yaml.safe_load(_RECIPE)
        what = ", ".join(_value(draw, value) for _ in range(draw.choice((1, 1, 2))))
        content = json.dumps(value).encode("utf-8", "surrogatepass")  # is YAML, too
    else:
        text, what = _yaml_text(draw)
        content = text.encode("utf-8", "surrogatepass")
    (place / "r.yaml").write_bytes(content)
    harmless = _is_a_moments_work(place / "r.yaml")
    return Mutant(("run", "r.yaml") if harmless and draw.random() < 0.4 else ("run", "r.yaml", "--dry-run"), what)


def _yaml_text(draw: random.Random) -> tuple[str, str]:
    """What only YAML has: anchors, tags, odd numbers, many documents."""
    line = draw.choice([line for line in _RECIPE.splitlines() if ": " in line and line[0] != "#" and "{" not in line])
    key = line.split(":")[0]
    value = draw.choice(
        ("!!python/object/apply:os.system ['touch pwned']", "!!python/name:os.system", "!!binary aGVsbG8=", "!!set {a, b}",
         "!!omap [a: 1]", "!!timestamp 2001-99-99", "2001-01-01", "2001-01-01 25:00:00", "!!int 'x'", "!!float 'x'",
         "0x" + "f" * 5000, "0x" + "f" * 40, "0b" + "1" * 20_000, "9" * 5000, "1:99:99:99", "1_000", "1e5", ".inf", ".nan",
         "-.inf", "0o17", "017", "~", "yes", "off", "=", "<<", "|\n  a\n  b", ">-\n  a", "*unknown", "&a [*a]", "&a {b: *a}",
         "? [a]\n  : b", "{[1, 2]: 3}", "{1: 2}", "{null: 1}", "{? {a: b} : c}", '"\\u0000"', '"\\ud800"', '"\\x07"',
         "'" + "a" * 300_000 + "'", "\t1", "- a", "%TAG ! x", "!<!> x", "! x", "!!str 5", "!!null ''", "!!bool 7",
         "!!merge x", "[" * 3000, "{" * 500, "[" * 50 + "]" * 50, "{a: " * 200 + "}" * 200, "!!seq {}", "!!map []", "/x/\0")
    )  # fmt: skip
    choice = draw.randrange(12)
    if choice == 0:
        depth = draw.choice((3, 7, 9, 25))
        bomb = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, depth))
        target = draw.choice(
            ("eval: {ppl: *a%d}", "seed: *a%d", "compress: *a%d", "bench: {prompt_len: *a%d}", "x: *a%d")
        )
        return bomb + _RECIPE + target % (depth - 1) + "\n", f"aliases of aliases, {depth} deep"
    if choice == 1:
        depth = draw.choice((3, 8, 25))
        bomb = "m0: &m0 {a: 1}\n" + "".join(
            f"m{i}: &m{i} {{<<: [{', '.join([f'*m{i - 1}'] * 9)}]}}\n" for i in range(1, depth)
        )
        return bomb + _RECIPE, f"merges of merges, {depth} deep"
    if choice == 2:
        return "".join(f"key{i}: {i}\n" for i in range(draw.choice((50, 3000, 100_000)))) + _RECIPE, "many keys"
    if choice == 3:
        return _RECIPE + "---\n" + _RECIPE, "two documents"
    if choice == 4:
        return _RECIPE + line + "\n", f"{key.strip()} twice"
    if choice == 5:
        return "? " * draw.choice((10, 5000)) + "a\n" + _RECIPE, "question marks"
    return _RECIPE.replace(line, f"{key}: {value}"), f"{key.strip()}: {value[:40]}"


def _is_a_moments_work(recipe: Path) -> bool:
    """Whether running it is quick and writes where it may; numbers that ask for hours of work are no attack."""
    try:
        asked = load(recipe)
    except (CtpError, Exception):
        return False
    compress, learn, scored, bench = asked.compress, asked.learn, asked.eval, asked.bench
    return not (
        asked.output not in ("made", "/dev/null/x", "a\0b", "", "..", "x" * 5000, "a" * 100_000)
        or (compress and compress.windows * compress.seqlen + 100 * compress.rounds + compress.tune_windows > 2000)
        or (compress and compress.refine > 20)
        or (learn and (learn.steps is None or learn.steps * learn.batch_size * (learn.seqlen + learn.tokens) > 3000))
        or (learn and learn.validation_windows > 50)
        or (scored and scored.windows * scored.seqlen > 30_000)
        or (bench and (bench.seqlen + bench.new_tokens + sum(bench.prompt_len)) * bench.rounds > 3000)
    )


def _prompt(draw: random.Random, inputs: Inputs, place: Path) -> Mutant:
    kind = draw.choice(("soft", "soft", "kv"))
    content, what = _safetensors(draw, (inputs.folder / f"{kind}.safetensors").read_bytes())
    folder = place / "prompt"
    folder.mkdir()
    file = folder / "prompt.safetensors"
    if draw.random() < 0.03:
        what = _wrong_place(draw, file)
    else:
        file.write_bytes(content)
    given = str(draw.choice((file, folder)).relative_to(place))
    model = str(inputs.folder / draw.choice(("dense", "ctp")))
    text = str(inputs.folder / "text.txt")
    form = draw.choice(("vocab", "peft", "kv")) if kind == "soft" else draw.choice(("kv", "peft"))
    commands: tuple[tuple[str, ...], ...] = (
        ("stitch", given, model, "--format", form, "-o", "out"),
        ("stitch", given, model, "--format", form, "-o", "out"),
        ("eval", model, "--prompt", given, "--ppl", text, *_SMALL, "-o", "out"),
        ("learn", model, "--init", given, "--text", text, "--method", {"soft": "soft-prompt"}.get(kind, "kv-prefix"),
         *_LEARN, "-o", "out"),
    )  # fmt: skip
    return Mutant(draw.choice(commands), f"{kind} prompt: {what}")


def _wrong_place(draw: random.Random, file: Path) -> str:
    """Something else where a file is expected."""
    file.unlink(missing_ok=True)
    what = draw.choice(("nothing", "a folder", "a link to nowhere", "a link to itself", "a link to a device"))
    if what == "a folder":
        file.mkdir()
    elif what == "a link to nowhere":
        file.symlink_to("nowhere")
    elif what == "a link to itself":
        file.symlink_to(file.name)
    elif what == "a link to a device":
        file.symlink_to("/dev/zero")
    return what


_OFTEN = ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json")


def _checkpoint(draw: random.Random, inputs: Inputs, place: Path) -> Mutant:
    form = draw.choice(("dense", "shards", "gptq", "compressed-tensors", "ctp", "stitched"))
    folder = place / "model"
    shutil.copytree(inputs.folder / form, folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    weights = [path for path in files if path.suffix == ".safetensors"]
    often = [path for path in files if path.name in _OFTEN]
    what = []
    for _ in range(draw.choice((1, 1, 1, 2))):
        file = draw.choice(draw.choice((files, weights, often)))
        if draw.random() < 0.06 or not file.is_file():
            how = _wrong_place(draw, file) if not file.is_dir() else "nothing more"
        else:
            content = file.read_bytes()
            mutate = {".safetensors": _safetensors, ".json": _json}.get(file.suffix, _bytes)
            try:
                content, how = mutate(draw, content)
            except (ValueError, KeyError, IndexError, TypeError, AttributeError):  # a second change to a broken file
                content, how = _bytes(draw, content)
            file.write_bytes(content)
        what.append(f"{file.relative_to(folder)}: {how}")
    text, prompt = str(inputs.folder / "text.txt"), str(inputs.folder / "soft.safetensors")
    compress = ("compress", "model", "--bits", "4", "--group-size", "32", "--calibration", text, *_SMALL, "-o", "out")
    commands: list[tuple[str, ...]] = [
        ("eval", "model", "--ppl", text, *_SMALL, "-o", "out"),
        ("stitch", prompt, "model", "-o", "out"),
        ("learn", "model", "--text", text, *_LEARN, "-o", "out"),
    ]
    if form in ("dense", "shards"):
        commands += [compress, compress, (*compress, "--dry-run"), (*compress, "--tune-windows", "1")]
    elif form == "stitched":
        commands += [("unstitch", "model", "-o", "out")] * 3
    else:
        forms = ("gptq", "compressed-tensors", "ctp", "dense")
        commands += [("convert", "model", "--format", draw.choice(forms), "-o", "out")] * 3
    return Mutant(draw.choice(commands), f"{form}: {'; '.join(what)}")


def _text(draw: random.Random, inputs: Inputs, place: Path) -> Mutant:
    ending = draw.choice((".txt", ".jsonl", ".jsonl.gz", ".json.gz", ".parquet"))
    file = place / f"rows{ending}"
    content, what = _rows(draw, ending)
    if draw.random() < 0.4 and len(content) < 10**6:
        content, how = _bytes(draw, content)
        what += f", {how}"
    file.write_bytes(content)
    if draw.random() < 0.03:
        what = _wrong_place(draw, file)
    spec = file.name + draw.choice(("", "", "", "", ":text", ":lines", ":other", ":", "::", ":\0"))
    model = str(inputs.folder / "dense")
    commands: tuple[tuple[str, ...], ...] = (
        ("eval", model, "--ppl", spec, *_SMALL, "-o", "out"),
        ("compress", model, "--bits", "4", "--group-size", "32", "--calibration", spec, *_SMALL, "-o", "out"),
        ("learn", model, "--text", spec, *_LEARN, "-o", "out"),
        ("learn", model, "--text", "pydoc:test", "--validation", spec, *_LEARN, "-o", "out"),
    )
    return Mutant(draw.choice(commands), f"{spec!r}: {what}")


_WORDS = "Some words that make a row of text, for windows of sixteen tokens. "


def _rows(draw: random.Random, ending: str) -> tuple[bytes, str]:
    if ending == ".txt":
        text = draw.choice((_WORDS * 40, "a", "", " \n\t ", "\0" * 3000, "é" * 2000, "a" * 2_000_000, "\n" * 100_000,
                            "<s></s><|endoftext|>" * 200, "\ufffe\u202e" * 500, "😀" * 700, "\x1b[31m" * 500,
                            "<pad>" * 400))  # fmt: skip
        return text.encode(), f"{text[:10]!r} x {len(text)}"
    if ending == ".parquet":
        return _parquet(draw)
    rows = [json.dumps({"text": _WORDS * 5, "n": number}) for number in range(10)]
    odd = draw.choice(
        ('{"text": 5}', '{"text": null}', "[]", "5", "null", "{", '{"text": "\\ud800"}', '{"text": "\\u0000"}', "", "\0",
         '{"other": "x"}', '{"text": ["x"]}', "[" * 100_000, '{"text": ' + "9" * 5000 + "}", '{"n": ' + "9" * 5000 + "}",
         '{"text": "a", "text": 1}', "NaN", '{"text": "' + "a" * 1_000_000 + '"}', '{"text": ""}', "\ufeff{}", "\x85",
         '{"text": "x"} {"text": "y"}', "// x", "{'text': 'x'}", '{"text": "x"')
    )  # fmt: skip
    place = draw.randrange(len(rows) + 1)
    content = "\n".join([*draw.choice((rows[:place], [])), odd, *draw.choice((rows[place:], []))]).encode()
    what = f"row {odd[:30]!r}"
    if ending.endswith(".gz"):
        if draw.random() < 0.08:
            out = io.BytesIO()
            with gzip.GzipFile(fileobj=out, mode="wb", compresslevel=1) as bomb:
                line = draw.choice((b'{"text": "%s"}\n', b" %s\n", b'{"text": "%s'))
                for _ in range(800):
                    bomb.write(line % (b"a" * 1_000_000))
            return out.getvalue(), "a bomb of 800 MB"
        content = gzip.compress(content, 1)
    return content, what


def _parquet(draw: random.Random) -> tuple[bytes, str]:
    columns: dict[str, Any] = {
        "text": [_WORDS * 5] * 10,
        "numbers": list(range(10)),
        "nulls": pyarrow.array([None] * 10, pyarrow.string()),
        "bytes": [b"\xff\xfe"] * 10,
        "lists": [[_WORDS]] * 10,
        "structs": [{"text": _WORDS}] * 10,
        "times": pyarrow.array([2**62] * 10, pyarrow.timestamp("us")),
        "invalid": pyarrow.Array.from_buffers(
            pyarrow.string(), 1, [None, pyarrow.py_buffer(b"\0\0\0\0\2\0\0\0"), pyarrow.py_buffer(b"\xff\xfe")]
        ),
        "large": pyarrow.array([_WORDS] * 10, pyarrow.large_string()),
        "dictionary": pyarrow.array([_WORDS] * 10).dictionary_encode(),
        "bomb": pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 3000, pyarrow.int32()), ["a" * 300_000]),
        "none": pyarrow.array([], pyarrow.string()),
    }
    name = draw.choice([*columns, *("text",) * 4])
    out = io.BytesIO()
    named = draw.choice(("text", "text", "text", "", "a.b", "TEXT"))
    pyarrow.parquet.write_table(
        pyarrow.table({named: columns[name]}), out, compression=draw.choice(("none", "snappy", "gzip", "zstd"))
    )
    return out.getvalue(), f"column {named!r} of {name}"
