"""What every command shares: options, error reporting, and finding the artifact a user most likely means."""

import contextlib
import errno
import functools
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, ParamSpec, get_type_hints

import typer

from ctp_cli import artifact
from ctp_cli.console import BarProgress, Console
from ctp_cli.errors import CtpError, UnfinishedError, is_out_of_memory
from ctp_cli.recipe import Section

Given = ParamSpec("Given")

DEBUG_VARIABLE = "CTP_DEBUG"

Output = Annotated[
    Path | None,
    typer.Option(
        "-o", "--output", help="Folder to make; its name follows from MODEL's otherwise.", rich_help_panel="Output"
    ),
]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing output.", rich_help_panel="Output")]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.", rich_help_panel="Output")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="Only results and errors.", rich_help_panel="Output")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1, ...", rich_help_panel="Machine")]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Check everything, say what would be done, load no weights.",
        rich_help_panel="Output",
    ),
]

INTERRUPTED, TERMINATED = 130, 143
_GO_ON = "finished parts are kept: run the same command again to go on"


def shows_defaults(section: type[Section]) -> Callable[[Callable[Given, None]], Callable[Given, None]]:
    """Help says the defaults of `section`, which the options of the same names do not hold themselves."""

    def shown(command: Callable[Given, None]) -> Callable[Given, None]:
        hints = get_type_hints(command, include_extras=True)
        for name, field in section.model_fields.items():
            if name in hints and field.default is not None and field.default != ():
                (option,) = hints[name].__metadata__
                option.show_default = _default_text(name, field.default, option.param_decls or ())
        return command

    return shown


def _default_text(name: str, default: Any, declared: Sequence[str]) -> str:
    if isinstance(default, bool):
        flag = name.replace("_", "-")
        both = next((d for d in declared if "/" in d), f"--{flag}/--no-{flag}")
        return both.split("/")[0 if default else 1].removeprefix("--")
    return ",".join(map(str, default)) if isinstance(default, tuple) else str(default)


def reports_errors(command: Callable[Given, None]) -> Callable[Given, None]:
    """Turn errors into a message and an exit code; a traceback only for bugs and only with `ctp --debug`."""

    @functools.wraps(command)
    def wrapped(*args: Given.args, **kwargs: Given.kwargs) -> None:
        console = Console()
        with _sigterm_raises():
            try:
                command(*args, **kwargs)
            except CtpError as error:
                _stop(console, error)
            except KeyboardInterrupt:
                _stop(console, _interrupted(), code=INTERRUPTED)
            except _Terminated:
                _stop(console, _terminated(), code=TERMINATED)
            except (typer.Exit, typer.Abort):
                raise
            except Exception as error:
                if _disk_is_full(error):
                    _stop(
                        console,
                        UnfinishedError("the disk is full", hint="make room and run the same command: it goes on"),
                    )
                if is_out_of_memory(error):
                    _stop(
                        console,
                        UnfinishedError(f"out of memory ({error})", hint="use a smaller batch, --seqlen or model"),
                    )
                if os.environ.get(DEBUG_VARIABLE):
                    raise
                bug = CtpError(f"a bug in ctp: {type(error).__name__}: {error}", hint="ctp --debug COMMAND shows where")
                _stop(console, bug, code=1)

    return wrapped


class _Terminated(BaseException):
    """SIGTERM came; like KeyboardInterrupt no Exception, so that nothing takes it for a failure of its own."""


@contextlib.contextmanager
def _sigterm_raises() -> Iterator[None]:
    """So that it is said, and what is open is closed. torchrun sends it to all that are left when a process ends."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(*_: object) -> None:
        _ignore_sigterm()  # once is enough: what closes is not to be torn apart
        raise _Terminated

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _ignore_sigterm() -> None:
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _terminated() -> CtpError:
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return CtpError("stopped by SIGTERM", hint=_GO_ON)
    return CtpError(
        "stopped by SIGTERM, which torchrun sends where another process of this job has ended",
        hint="look for its message or torchrun's report; the same command goes on where this one stopped",
    )


def _interrupted() -> CtpError:
    return CtpError("interrupted", hint=_GO_ON)


def follows() -> bool:
    """Whether this process was started beside a main one (torchrun, accelerate launch), which speaks for it."""
    return os.environ.get("RANK", "0") != "0"


def _stop(console: Console, error: CtpError, code: int | None = None) -> None:
    _ignore_sigterm()  # torchrun's may come while the message is written
    BarProgress.close_all()  # a bar left open would hide the cursor and draw over the message
    if not follows():
        console.error(error)
    raise typer.Exit(error.exit_code if code is None else code) from None


def _disk_is_full(error: BaseException | None) -> bool:
    """Also where a library wrapped the system's error (safetensors says it in words)."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if "No space left on device" in str(error) or "os error 28" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def note_without_effect(console: Console, *sections: Section | None) -> None:
    for section in sections:
        for line in section.without_effect() if section is not None else ():
            console.note(f"note: no effect: {line}")


def newest_or(kinds: tuple[str, ...], fallback: str, console: Console) -> str:
    """The newest artifact of these kinds in the current folder, else `fallback`; says which."""
    found = artifact.newest(kinds, Path.cwd())
    if found is not None:
        console.note(f"no MODEL given: taking the newest checkpoint here, {found.name}")
        return str(found)
    console.note(f"no MODEL given and no checkpoint of ctp's here: taking {fallback}")
    return fallback
