"""Compile a C++ file of this folder at first use, with the system's compiler, into a cache; load it by ctypes.

    library = load("gram_bf16", AVX512_BF16)
    library = load("sweep", AVX512, AVX2)

The first of the given levels that the processor has is taken. A machine that has none, or no compiler, gets None, and
one line in the log that says why; the caller then does without.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

log = logging.getLogger(__name__)

_COMPILERS = ("c++", "g++", "clang++")
_OPTIONS = (
    "-O3",
    "-std=c++17",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wno-psabi",
    "-shared",
    "-fPIC",
    "-pthread",
)
_SECONDS = 120


@dataclass(frozen=True)
class Level:
    """Processor features by their names in /proc/cpuinfo, and what tells the compiler of them."""

    needs: tuple[str, ...]
    flags: tuple[str, ...]


AVX2 = Level(("avx2", "fma", "bmi2", "popcnt"), ("-mavx2", "-mfma", "-mbmi2", "-mpopcnt"))
AVX512 = Level(
    ("avx512f", "avx512bw", "avx512vl", "avx512dq", "fma", "popcnt"),
    ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mpopcnt", "-mprefer-vector-width=512"),
)
AVX2_F16C = Level((*AVX2.needs, "bmi1", "f16c"), (*AVX2.flags, "-mbmi", "-mf16c"))
AVX512_VNNI = Level(
    (*AVX512.needs, "avx512vbmi", "avx512_vbmi2", "avx512_vnni", "f16c"),
    (*AVX512.flags, "-mavx512vbmi", "-mavx512vbmi2", "-mavx512vnni", "-mf16c"),
)
AVX512_BF16 = Level((*AVX512.needs, "avx512_bf16"), (*AVX512.flags, "-mavx512bf16"))


@functools.cache
def load(name: str, *levels: Level) -> ctypes.CDLL | None:
    """The shared library made of NAME.cpp for the first level this processor has; None where it has none of them.

    The environment variable CTP_NO_CPU_KERNELS=1 turns all of them off.
    """
    if os.environ.get("CTP_NO_CPU_KERNELS") == "1":
        return None
    level = next((level for level in levels if cpu_features().issuperset(level.needs)), None)
    if level is None:
        missing = [feature for feature in levels[-1].needs if feature not in cpu_features()]
        log.info("%s: not used, this processor has no %s", name, ", ".join(missing))
        return None
    try:
        return ctypes.CDLL(str(_built(name, level.flags)))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:  # RuntimeError: there is no home folder
        log.info("%s: not used, it cannot be built or loaded here (%s)", name, error)
        return None


@functools.cache
def cpu_features() -> frozenset[str]:
    """What /proc/cpuinfo lists for the first processor; empty where there is no such file."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line for line in lines if line.startswith("flags")), "").partition(":")[2].split())


def _built(name: str, flags: tuple[str, ...]) -> Path:
    source = Path(__file__).with_name(f"{name}.cpp")
    compiler = next((found for found in map(shutil.which, _COMPILERS) if found), None)
    if compiler is None:
        raise OSError(f"no C++ compiler ({', '.join(_COMPILERS)})")
    command = [compiler, *_OPTIONS, *flags]
    sources = b"".join(path.read_bytes() for path in (source, *sorted(source.parent.glob("*.h"))))
    key = hashlib.sha256(sources + repr((command, platform.machine())).encode()).hexdigest()[:16]
    library = cache_folder() / "kernels" / f"{name}-{key}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
            made = Path(scratch) / library.name
            subprocess.run([*command, str(source), "-o", str(made)], check=True, capture_output=True, timeout=_SECONDS)
            made.replace(library)
    return library


def cache_folder() -> Path:
    """Where ctp keeps what it built, fetched or converted; CTP_CACHE overrides the platform's habit.

    Raises: RuntimeError where there is no home folder.
    """
    if given := os.environ.get("CTP_CACHE"):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ctp"
