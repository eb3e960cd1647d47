"""Run the command that reads a mutant as the shell would, and say what went wrong."""

import logging
import resource
import signal
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from ctp_cli.app import app
from hostile.inputs import Mutant

MEMORY_BYTES = 500_000_000
"""More than before the command began, at its peak: beyond this a mutant did harm."""
SECONDS = 20.0
"""Of processor time. The commands here take one or two on whole inputs."""


@dataclass(frozen=True)
class Verdict:
    """`fault` None: refused or harmless, as the exit code says."""

    exit_code: int
    error: str
    fault: str | None


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
