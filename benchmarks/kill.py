"""Kill `compress`, `learn` and `run` at random moments, run them again, and count what was lost.

    python benchmarks/kill.py [--moments 100] [--seed 0] [--only run]

Works on a small model trained on the spot. Of each command's time, from start to end, moments are drawn at random; the
process group is killed there (SIGKILL), and then:
- lost: the same command, run again, fails;
- half: an output is there under its final name but is not what an uninterrupted run makes;
- differs: the output of the second run is not, byte for byte, that of an uninterrupted one.
Manifests and reports hold dates, times and paths: of these only what was computed is compared.
"""

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from trained_model import train

SMALL = ("--calibration", "pydoc:train", "--windows", "16", "--seqlen", "128")
LEARN = ("--tokens", "8", "--steps", "24", "--batch-size", "4", "--seqlen", "48", "--validate-every", "4",
         "--validation-windows", "6", "--text", "pydoc:train", "--validation", "pydoc:validation")  # fmt: skip
RECIPE = """
model: {model}
output: {output}
compress: {{sparsity: 0.5, bits: 4, calibration: "pydoc:train", windows: 16, seqlen: 128}}
learn: {{tokens: 8, steps: 12, batch_size: 4, seqlen: 48, validate_every: 4, validation_windows: 6, text: "pydoc:train",
        validation: "pydoc:validation"}}
stitch: {{}}
eval: {{ppl: ["pydoc:test"], seqlen: 64, windows: 8}}
"""


def command(what: str, folder: Path, model: Path, compressed: Path) -> list[str]:
    ctp = [sys.executable, "-m", "ctp_cli"]
    if what == "compress":
        return [*ctp, "compress", str(model), "--sparsity", "0.5", "--bits", "4", *SMALL, "-q", "-o", str(folder / "o")]
    if what == "learn":
        return [*ctp, "learn", str(compressed), *LEARN, "-q", "-o", str(folder / "o")]
    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE.format(model=model, output=folder / "o"))
    return [*ctp, "run", str(recipe)]


def started(line: list[str]) -> subprocess.Popen[str]:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    quiet = subprocess.DEVNULL
    return subprocess.Popen(
        line, start_new_session=True, stdout=quiet, stderr=subprocess.PIPE, text=True, env=environment
    )


def finished(line: list[str]) -> tuple[int, str]:
    process = started(line)
    _, errors = process.communicate()
    return process.returncode, errors


def contents(output: Path) -> dict[str, str]:
    """Name -> hash of every file that must be the same in every run; of score tables the scores."""
    found = {}
    for file in sorted(path for path in output.rglob("*") if path.is_file()):
        name = str(file.relative_to(output))
        if file.name == "scores.json":
            scores = json.loads(file.read_text())["scores"]
            found[name] = json.dumps([[s["label"], s["text"], s["perplexity"]] for s in scores])
        elif file.suffix not in (".png", ".md") and file.name not in ("ctp.json", "report.json"):
            found[name] = hashlib.sha256(file.read_bytes()).hexdigest()
    return found


def changed(found: dict[str, str], expected: dict[str, str]) -> list[str]:
    """Names of what is missing, too much, or not the same."""
    return sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))


def half(what: str, output: Path, expected: dict[str, str]) -> list[str]:
    """What is wrong in an output that has its final name; `run` fills its folder artifact by artifact."""
    if not output.exists():
        return []
    if what != "run":
        return changed(contents(output), expected)
    whole = {path.name for path in output.iterdir() if path.is_dir() and not path.name.endswith(".partial")}
    found, wanted = (
        {name: value for name, value in files.items() if name.partition("/")[0] in whole}
        for files in (contents(output), expected)
    )
    return changed(found, wanted)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moments", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="compress,learn,run", help="learn needs what compress makes")
    given = parser.parse_args()
    draw = random.Random(given.seed)
    print("| command | takes, s | killed | had ended before | lost | half | differs |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        model = train(root)
        compressed = root / "compressed"
        wanted = given.only.split(",")
        for number, what in enumerate(wanted):
            folder = root / what
            folder.mkdir()
            line = command(what, folder, model, compressed)
            begun = time.perf_counter()
            code, errors = finished(line)
            seconds = time.perf_counter() - begun
            if code:
                raise SystemExit(f"{what} failed: {errors}")
            expected = contents(folder / "o")
            if what == "compress":
                (folder / "o").rename(compressed)
            counts = dict.fromkeys(("killed", "ended", "lost", "half", "differs"), 0)
            for trial in range(given.moments * (number + 1) // len(wanted) - given.moments * number // len(wanted)):
                place = root / f"{what}-{trial}"
                place.mkdir()
                one(
                    what,
                    command(what, place, model, compressed),
                    place / "o",
                    expected,
                    draw.uniform(0, seconds),
                    counts,
                )
            print("| " + " | ".join([what, f"{seconds:.1f}", *map(str, counts.values())]) + " |", flush=True)


def one(
    what: str, line: list[str], output: Path, expected: dict[str, str], moment: float, counts: dict[str, int]
) -> None:
    process = started(line)
    time.sleep(moment)
    ended = process.poll() is not None
    if not ended:
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    counts["ended" if ended else "killed"] += 1
    if wrong := half(what, output, expected):
        counts["half"] += 1
        print(f"{what}, killed after {moment:.2f} s: {', '.join(wrong)} half made", file=sys.stderr)
    if ended and what != "run":
        return
    code, errors = finished(line)
    # a compress or learn that was killed after its output had its name is refused: nothing is left to do
    if code and not (what != "run" and "exists" in errors and contents(output) == expected):
        counts["lost"] += 1
        print(f"{what}, killed after {moment:.2f} s, then exit code {code}: {errors}", file=sys.stderr)
    elif wrong := changed(contents(output), expected):
        counts["differs"] += 1
        print(f"{what}, killed after {moment:.2f} s: other {', '.join(wrong)}", file=sys.stderr)


if __name__ == "__main__":
    main()
