"""Every output is an artifact: a folder with `ctp.json`, made beside its final name and appearing by one rename.

Work in progress lives in `NAME.partial/`. Its `ctp.partial.json` holds the identity of the work (settings and
fingerprints of the inputs): the same identity goes on from there, another one is refused with the differences.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ctp_cli import __version__
from ctp_cli.errors import CtpError, InputError, OutputError, UnfinishedError
from ctp_cli.files import read_json, sync_folder, write_json

MANIFEST = "ctp.json"
IDENTITY = "ctp.partial.json"
SCHEMA_VERSION = 1


_MADE_FOR: ContextVar[tuple[str | None, str | None]] = ContextVar("made_for", default=(None, None))


@contextlib.contextmanager
def made_for(key: str, made_from: str | None = None) -> Iterator[None]:
    """Artifacts finished inside carry `key` in their manifest, by which a recipe's runner knows its own again, and
    `made_from`: the hash of the manifest of what they were made from.
    """
    token = _MADE_FOR.set((key, made_from))
    try:
        yield
    finally:
        _MADE_FOR.reset(token)


@dataclass
class Workspace:
    """A `NAME.partial/` folder being filled. `resumed` says that it held work of the same identity."""

    path: Path
    output: Path
    kind: str
    identity: dict[str, Any]
    resumed: bool
    force: bool
    started: float = field(default_factory=time.monotonic)

    def finish(self, manifest: Mapping[str, Any], *, scratch: tuple[str, ...] = ()) -> Path:
        """Write `ctp.json`, flush everything, and rename the folder to its final name.

        Files that match `scratch`, from which interrupted work goes on, are removed in that order just before: after it
        a kill could leave them in the finished artifact, and now it costs at worst the work.
        """
        scratch = (*scratch, IDENTITY)
        made = sorted(
            path for path in self.path.rglob("*") if path.is_file() and not any(path.match(p) for p in scratch)
        )
        files = {str(path.relative_to(self.path)): path.stat().st_size for path in made}
        write_json(
            self.path / MANIFEST,
            {
                "schema_version": SCHEMA_VERSION,
                "kind": self.kind,
                "created": datetime.now(UTC).isoformat(timespec="microseconds"),
                "identity": self.identity,
                "environment": environment(),
                "peak_memory_bytes": peak_memory_bytes(),
                "seconds": round(time.monotonic() - self.started, 3),
                "resumed": self.resumed,
                "files": files,
                "made_for": _MADE_FOR.get()[0],
                "made_from": _MADE_FOR.get()[1],
                **manifest,
            },
        )
        for path in self.path.rglob("*"):
            if path.is_file():
                with path.open("rb") as handle:
                    os.fsync(handle.fileno())
        for pattern in scratch:
            for path in self.path.glob(pattern):
                path.unlink(missing_ok=True)
        replaced = None
        if self.output.exists():
            if not self.force:  # somebody made it while we worked
                raise OutputError(f"{self.output} exists by now", hint=f"the finished work is in {self.path}")
            replaced = self.output.with_name(f"{self.output.name}.replaced-{os.getpid()}")
            self.output.rename(replaced)
        self.path.rename(self.output)
        sync_folder(self.output.parent)
        if replaced is not None:
            shutil.rmtree(replaced)
        return self.output

    def discard(self) -> None:
        """Leave nothing to go on from: after an error that the same command would run into again."""
        _empty(self.path)


@contextlib.contextmanager
def workspace(output: Path, *, kind: str, identity: Mapping[str, Any], force: bool = False) -> Iterator[Workspace]:
    """Open `output`.partial for work, alone.

    Raises OutputError if the output exists, if another process works on it, or if unfinished work of other settings
    is there. An error before anything was saved leaves no folder behind.
    """
    plain: dict[str, Any] = json.loads(json.dumps(identity, default=str))
    refuse_existing(output, force=force)
    partial = unfinished(output)
    lock_path = output.with_name(f".{output.name}.lock")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        lock = lock_path.open("w")
    except OSError as error:
        raise OutputError(
            f"{output}: cannot write there ({error.strerror})", hint="choose another place with -o"
        ) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputError(
                f"another ctp process is making {output}", hint="wait for it, or choose another -o"
            ) from None
        refuse_existing(output, force=force)  # again, now that nobody else can make it
        resumed = _open_partial(partial, plain, goes_on=refuse_other_work(output, plain, force=force))
        try:
            yield Workspace(partial, output, kind, plain, resumed, force)
        finally:
            if partial.exists() and not any(p.name != IDENTITY for p in partial.iterdir()):
                shutil.rmtree(partial)
            lock_path.unlink(missing_ok=True)


def unfinished(output: Path) -> Path:
    """Where the work on `output` is until it is whole."""
    return output.with_name(output.name + ".partial")


@contextlib.contextmanager
def all_or_nothing(space: Workspace) -> Iterator[None]:
    """For what takes seconds: it starts over rather than going on, and leaves nothing when it fails."""
    _empty(space.path)
    try:
        yield
    except CtpError:
        _empty(space.path)
        raise
    except OSError as error:
        _empty(space.path)
        if _is_about_an_input(error, space.path):
            raise InputError(
                f"{error.filename}: cannot be read ({error.strerror})", hint="is the folder complete?"
            ) from None
        raise UnfinishedError(
            f"{space.output}: {error.strerror or error}", hint="make room and repeat the command"
        ) from None
    except BaseException:
        _empty(space.path)
        raise


def _is_about_an_input(error: OSError, folder: Path) -> bool:
    """Whether a file elsewhere could not be opened; what is written lies in `folder`, and a copy names both."""
    if error.filename is None or error.filename2 is not None:
        return False
    return not Path(os.fsdecode(error.filename)).absolute().is_relative_to(folder.absolute())


def _empty(folder: Path) -> None:
    if not folder.is_dir():  # already renamed to its final name
        return
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != IDENTITY:
            path.unlink()


def refuse_existing(output: Path, *reads: Path | None, force: bool) -> None:
    """Also with `force`, only what ctp itself made is ever replaced: never a model's own folder or a file, nor what
    holds one of `reads`, the inputs.
    """
    for one in reads:
        if one is not None and one.resolve().is_relative_to(output.resolve()):
            what = "is what is to be read" if one.resolve() == output.resolve() else f"holds {one}, which is to be read"
            raise OutputError(f"{output} {what}", hint="choose another name with -o")
    if not output.name:
        raise OutputError(f"{output} is no name for an output", hint="choose a name with -o")
    if output.exists() and not force:
        raise OutputError(f"{output} exists", hint="choose another name with -o, or replace it with --force")
    if output.exists() and (not output.is_dir() or manifest_of(output) is None):
        raise OutputError(
            f"{output} was not made by ctp: --force does not replace it", hint="choose another name with -o"
        )


def refuse_other_work(output: Path, identity: Mapping[str, Any], *, force: bool = False) -> bool:
    """Whether unfinished work of these settings is there. Raises OutputError if another's is, unless `force`."""
    partial = unfinished(output)
    if not partial.exists():
        return False
    before, now = _identity_in(partial), json.loads(json.dumps(identity, default=str))
    if before == now:
        return True
    if not partial.is_dir() or (before is None and any(partial.iterdir())):
        raise OutputError(f"{partial} is there and was not made by ctp", hint="move it away")
    if before is not None and not force:
        lines = "; ".join(differences(before, now))
        raise OutputError(
            f"{partial} holds unfinished work with other settings: {lines}",
            hint="repeat the first command to go on with it, choose another -o, or start over with --force",
        )
    return False


def _open_partial(partial: Path, identity: dict[str, Any], *, goes_on: bool) -> bool:
    if partial.exists():
        if goes_on:
            (partial / MANIFEST).unlink(missing_ok=True)  # killed while finishing; it is no part of what it lists
            write_json(partial / IDENTITY, identity)
            return True
        shutil.rmtree(partial)
    partial.mkdir()
    write_json(partial / IDENTITY, identity)
    return False


def _identity_in(partial: Path) -> Any:
    """Of the work in it; killed just before it had its final name, its manifest alone says so. None: not known."""
    if (partial / IDENTITY).exists():
        return read_json(partial / IDENTITY)
    manifest = read_json(partial / MANIFEST) if (partial / MANIFEST).exists() else None
    return manifest.get("identity") if isinstance(manifest, dict) else None


def differences(before: Any, now: Any, where: str = "") -> list[str]:
    """'compress.bits was 3, is 4' for every leaf that differs."""
    if isinstance(before, dict) and isinstance(now, dict):
        lines = []
        for key in sorted(before.keys() | now.keys()):
            lines += differences(before.get(key), now.get(key), f"{where}.{key}" if where else key)
        return lines
    return [] if before == now else [f"{where} was {before}, is {now}"]


def manifest_of(path: Path, *, kind: str | None = None) -> dict[str, Any] | None:
    """The manifest of a finished artifact, or None if `path` is none (of that kind)."""
    if path.name.endswith(".partial") or not (path / MANIFEST).is_file():
        return None
    manifest = read_json(path / MANIFEST)
    return manifest if kind is None or manifest.get("kind") == kind else None


def newest(kinds: tuple[str, ...], folder: Path) -> Path | None:
    """The most recently finished artifact directly inside `folder`; refuses if two were finished at the same moment."""
    found: list[tuple[str, Path]] = []
    for child in folder.iterdir():
        with contextlib.suppress(OSError, InputError):  # a neighbour that cannot be read is not what is meant
            if child.is_dir() and (manifest := manifest_of(child)) and manifest.get("kind") in kinds:
                found.append((str(manifest.get("created", "")), child))
    if not found:
        return None
    latest = max(created for created, _ in found)
    candidates = sorted(path for created, path in found if created == latest)
    if len(candidates) > 1:
        raise InputError(
            f"which one is meant? equally new: {', '.join(p.name for p in candidates)}",
            hint="name it on the command line",
        )
    return candidates[0]


def file_fingerprint(path: Path) -> str:
    """Raises InputError for what cannot be read: a folder, a device or a link to nowhere under a file's name."""
    try:
        if path.exists() and not path.is_file():
            raise InputError(f"{path}: not a file", hint="is the folder complete?")
        with path.open("rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})", hint="is the folder complete?") from None


def folder_fingerprint(path: Path, patterns: tuple[str, ...] = ("*.safetensors", "*.json", "*.model")) -> str:
    """One hash over the names and contents of a checkpoint's files; our own manifest is not part of it."""
    digest = hashlib.sha256()
    names = sorted({p for pattern in patterns for p in path.glob(pattern)} - {path / MANIFEST})
    for name in names:
        digest.update(f"{name.name}\0{file_fingerprint(name)}\n".encode())
    return digest.hexdigest()


def environment() -> dict[str, str | int | None]:
    """Versions and machine, enough to explain why two runs differ."""
    versions: dict[str, str | int | None] = {"ctp": __version__, "python": platform.python_version()}
    for package in ("torch", "transformers", "accelerate", "safetensors"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    told = {name: os.environ[name] for name in ("CTP_INT8_ACTIVATIONS", "CTP_DENSE_CODES") if name in os.environ}
    return {**versions, **told, "platform": platform.platform(), "processor_count": os.cpu_count()}


def peak_memory_bytes() -> int:
    """Largest resident size of this process so far; where the kernel's mark was reset (`ctp bench`), since then.

    Linux hands `ru_maxrss` on to the programs that a process starts, so that they seem as large as their parent.
    """
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes on macOS, elsewhere KiB
