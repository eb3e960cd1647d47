"""Damage recipes, prompt files, checkpoints and texts a thousand times each, and count what `ctp` makes of it.

    python benchmarks/mutations.py [--mutants 1000] [--seed 0] [--kinds recipes,texts] [--real 40]
    python benchmarks/mutations.py --one KIND INDEX [--seed 0]

Every mutant (`tests/hostile` makes them) is read by the command that would read it, inside one process, because to
start one takes seconds. Harmless: exit code 0. Refused: exit code 2, one message, and nothing left behind. Anything
else is a fault: a traceback, another code, a message that fills the screen, a half-written or changed file, 20 s of
processor time, 500 MB more memory than before, a crash. Of all mutants `--real` are also given to a `ctp` of their own,
whose exit code and message must be the same. A fault's line ends with what repeats it.
"""

import argparse
import contextlib
import json
import os
import random
import resource
import selectors
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
import torch
from hostile import KINDS, Inputs, Mutant, judge, mutant

_FRESH_AFTER = 250
"""Mutants that one process reads."""
_ADDRESS_BYTES = 3_000_000_000
"""Beyond what it has at its start, a process gets no memory: one that wants more dies, not the machine."""
_SILENT_SECONDS = 180
"""A process that says nothing for so long hangs where no signal reaches it."""


def prepared(kind: str, index: int, seed: int, inputs: Inputs, root: Path) -> tuple[Mutant, Path]:
    place = root / "place"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    os.chdir(place)
    return mutant(kind, random.Random(f"{seed} {kind} {index}"), inputs, place), place


def work(kind: str, start: int, stop: int, seed: int, root: Path) -> None:
    """Judge mutants, a JSON line each."""
    out = os.fdopen(os.dup(1), "w", buffering=1)
    torch.set_num_threads(1)
    inputs = Inputs(root / "inputs")
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + _ADDRESS_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    for index in range(start, stop):
        made, place = prepared(kind, index, seed, inputs, root / f"work-{kind}")
        begun = time.process_time()
        verdict = judge(made, place)
        seconds = time.process_time() - begun
        line = {"index": index, "code": verdict.exit_code, "error": verdict.error, "fault": verdict.fault}
        out.write(json.dumps(line | {"what": made.what, "command": made.arguments, "seconds": seconds}) + "\n")


def environment(root: Path) -> dict[str, str]:
    cache = str(Inputs(root / "inputs").cache)
    return os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CTP_CACHE": cache, "NO_COLOR": "1"}


def judged(kind: str, start: int, stop: int, seed: int, root: Path) -> list[dict[str, Any]]:
    """The verdicts of one process after another; one that crashed or fell silent is a fault of its last mutant."""
    found: list[dict[str, Any]] = []
    around = environment(root)
    while start < stop:
        end = min(start + _FRESH_AFTER, stop)
        line = [sys.executable, __file__, "--worker", kind, str(start), str(end), str(seed), str(root)]
        errors = root / f"errors-{kind}"
        with errors.open("w") as sink:
            process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=sink, bufsize=0, env=around)
        assert process.stdout is not None
        watch = selectors.DefaultSelector()
        watch.register(process.stdout, selectors.EVENT_READ)
        while True:
            silent = not watch.select(_SILENT_SECONDS)
            said = b"" if silent else process.stdout.readline()
            if not said:
                break
            verdict = json.loads(said)
            found.append(verdict)
            if verdict["fault"]:
                report(kind, seed, verdict)
        if silent:
            process.kill()
        if process.wait() == 1:  # by an exception of this script's own
            raise SystemExit(errors.read_text()[-3000:])
        start = found[-1]["index"] + 1 if found else start
        if start < end:
            fault = "says nothing any more" if silent else f"crashes: {errors.read_text()[-300:]}"
            found.append({"index": start, "code": -1, "error": "", "fault": fault, "what": "?", "seconds": 0.0})
            report(kind, seed, found[-1])
            start += 1
    return found


def report(kind: str, seed: int, verdict: dict[str, Any]) -> None:
    what = f"{verdict['what'][:150]} | {' '.join(verdict.get('command', ()))[:150]} | {verdict['fault']}"
    print(f"fault: {what!r}: --one {kind} {verdict['index']} --seed {seed}", file=sys.stderr, flush=True)


def differs(kind: str, verdict: dict[str, Any], seed: int, root: Path) -> bool:
    """Whether a real process ends otherwise than the command did in here."""
    inputs = Inputs(root / "inputs")
    made, place = prepared(kind, verdict["index"], seed, inputs, root / f"work-{kind}")
    with contextlib.suppress(subprocess.TimeoutExpired):
        done = subprocess.run(
            [sys.executable, "-m", "ctp_cli", *made.arguments],
            cwd=place,
            env=environment(root) | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
            capture_output=True,
            text=True,
            timeout=300,
        )
        said = " ".join(line for line in done.stderr.splitlines() if line.startswith("error: "))
        if done.returncode == verdict["code"] and said == verdict["error"] and "Traceback" not in done.stderr:
            return False
        print(
            f"another end: exit code {done.returncode}, {done.stderr[-300:]!r}, here {verdict['code']} "
            f"{verdict['error'][:300]!r}: --one {kind} {verdict['index']} --seed {seed}",
            file=sys.stderr,
        )
    return True


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        kind, start, stop, seed, folder = sys.argv[2:]
        return work(kind, int(start), int(stop), int(seed), Path(folder))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutants", type=int, default=1000, help="of each kind")
    parser.add_argument("--start", type=int, default=0, help="index of the first one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--real", type=int, default=40, help="mutants that are also given to a process of their own")
    parser.add_argument("--folder", type=Path, help="where whole inputs are kept for the next time")
    parser.add_argument("--one", nargs=2, metavar=("KIND", "INDEX"), help="show one mutant and its verdict")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        root = (given.folder or Path(scratch)).resolve()
        if given.one:
            kind, index = given.one[0], int(given.one[1])
            for verdict in judged(kind, index, index + 1, given.seed, root):
                print(json.dumps(verdict, indent=2))
            return None
        print("| kind | mutants | refused | harmless | faults | real processes | end otherwise | slowest, s |")
        print("|---|---|---|---|---|---|---|---|")
        kinds = given.kinds.split(",")
        faults = 0
        for kind in kinds:
            found = judged(kind, given.start, given.start + given.mutants, given.seed, root)
            fine = [verdict for verdict in found if not verdict["fault"]]
            sample = random.Random(given.seed).sample(fine, min(given.real // len(kinds), len(fine)))
            others = sum(differs(kind, verdict, given.seed, root) for verdict in sample)
            refused = sum(verdict["code"] == 2 for verdict in fine)
            bad = len(found) - len(fine)
            faults += bad + others
            slowest = max(verdict["seconds"] for verdict in found)
            row = (kind, len(found), refused, len(fine) - refused, bad, len(sample), others, f"{slowest:.1f}")
            print("| " + " | ".join(map(str, row)) + " |", flush=True)
    raise SystemExit(1 if faults else 0)


if __name__ == "__main__":
    main()
