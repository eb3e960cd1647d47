"""One requirements file, one cached environment: NAME.txt beside this file becomes ~/.cache/ctp/interop/NAME.

Packages whose stated dependencies cannot be met, or are not wanted, stand in NAME.no-deps and are installed last.

Foreign readers need library versions that cannot live beside ours, so each gets a virtual environment of its
own. It is kept in ctp's cache and built again only when its requirements, or the Python that runs this, change.

    python tests/interop/environments.py gptqmodel     # prints the path of that environment's python
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


class BuildError(RuntimeError):
    """An environment could not be built; the message says which step and what to do."""


def environment_names() -> list[str]:
    """Names of all environments: one per requirements file beside this script."""
    return sorted(path.stem for path in HERE.glob("*.txt"))


def environment_folder(name: str) -> Path:
    """Where the environment lives, whether or not it exists; CTP_CACHE overrides, as for ctp itself."""
    platform_cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("CTP_CACHE") or platform_cache / "ctp") / "interop" / name


def environment_python(name: str) -> Path:
    """The environment's interpreter, built first where it is missing or out of date.

    Raises: BuildError if there is no such requirements file, or a build step fails.
    """
    requirements = HERE / f"{name}.txt"
    if not requirements.is_file():
        known = ", ".join(environment_names())
        raise BuildError(f"no environment named {name!r}: add {requirements.name}, or use one of: {known}")
    folder = environment_folder(name)
    python = folder / "bin" / "python"
    stamp = folder / "built-from.sha256"
    wanted = _fingerprint(requirements)
    if not (python.exists() and stamp.exists() and stamp.read_text() == wanted):
        _build(folder, python, requirements)
        stamp.write_text(wanted)  # last, so that an interrupted build starts over
    return python


def _fingerprint(requirements: Path) -> str:
    bare = _without_dependencies(requirements)
    content = requirements.read_bytes() + (bare.read_bytes() if bare.is_file() else b"")
    return hashlib.sha256(sys.version.encode() + content).hexdigest()


def _without_dependencies(requirements: Path) -> Path:
    return requirements.with_suffix(".no-deps")


def _build(folder: Path, python: Path, requirements: Path) -> None:
    print(f"building {folder} (once; it takes minutes and gigabytes)", file=sys.stderr)
    shutil.rmtree(folder, ignore_errors=True)
    _step([sys.executable, "-m", "venv", str(folder)])
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "--no-cache-dir", "install", "--quiet"]
    _step([*pip, "--requirement", str(requirements)])
    bare = _without_dependencies(requirements)
    if bare.is_file():
        _step([*pip, "--no-deps", "--requirement", str(bare)])


def _step(command: list[str]) -> None:
    # stdout carries only the interpreter's path
    code = subprocess.run(command, stdout=sys.stderr, check=False).returncode
    if code:
        raise BuildError(f"exit code {code} from: {' '.join(command)}\nits output is above")


def main() -> int:
    """Build the environments named on the command line (default: all) and print their interpreters."""
    try:
        for name in sys.argv[1:] or environment_names():
            print(environment_python(name))
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
