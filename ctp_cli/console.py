"""The only module that prints. Results go to stdout; progress, notes, warnings and errors to stderr."""

import io
import json
import logging
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, ClassVar

from rich.console import Console as RichConsole
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress
from rich.table import Table

from ctp_cli.errors import CtpError

JSON_SCHEMA_VERSION = 1
_MESSAGE = 5000
"""Characters of an error that are printed at most."""


class Console:
    """Owns both streams. `quiet` keeps results and errors; `json_mode` makes stdout one JSON document."""

    def __init__(self, *, quiet: bool = False, json_mode: bool = False) -> None:
        self.quiet = quiet
        self.json_mode = json_mode
        self._out, self._err = _plain_console(sys.stdout), _plain_console(sys.stderr)

    def note(self, line: str) -> None:
        """One line about what is going on."""
        if not self.quiet:
            self._err.print(line)

    def next_step(self, *command: str | Path) -> None:
        """The command a user most likely wants to type now, its words as a shell takes them."""
        if not self.quiet:
            self._err.print(f"next: {shlex.join(map(str, command))}", style="dim")

    def warning(self, line: str) -> None:
        if not self.quiet:
            self._err.print(f"warning: {line}", style="yellow")

    def error(self, error: CtpError) -> None:
        self._err.print(f"error: {_plain(error.message)}", style="bold red")
        if error.hint:
            self._err.print(f"hint: {_plain(error.hint)}")

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "") -> None:
        """A result table on stdout; numbers arrive as text, already rounded by whoever knows their units."""
        if self.json_mode:
            return
        headed = any(columns)
        table = Table(
            title=title, title_justify="left", caption=caption or None, caption_justify="left", show_header=headed
        )
        for index, column in enumerate(columns):
            table.add_column(column, justify="right" if headed and index else "left", overflow="fold")
        for row in rows:
            table.add_row(*row)
        self._out.print(table, soft_wrap=False)

    def result(self, line: str) -> None:
        """One line of result on stdout, e.g. the path of what was made."""
        if not self.json_mode:
            self._out.print(line)

    def document(self, kind: str, payload: dict[str, Any]) -> None:
        """With --json, the one document of this command; otherwise nothing."""
        if self.json_mode:
            document = {"schema_version": JSON_SCHEMA_VERSION, "kind": kind, **payload}
            sys.stdout.write(json.dumps(document, indent=2, sort_keys=False) + "\n")

    def progress(self) -> "BarProgress | LineProgress":
        """A bar on a terminal, sparse lines elsewhere."""
        if self._err.is_terminal and not self.quiet:
            return BarProgress(self._err)
        return LineProgress(self)

    def configure_logging(self, *, verbose: bool, debug: bool) -> None:
        level = logging.DEBUG if debug else logging.INFO if verbose else logging.WARNING
        logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
        logging.getLogger("ctp_cli").setLevel(level)
        logging.getLogger("ctp_kernels").setLevel(level)


def _plain_console(file: IO[str]) -> RichConsole:
    """Names of folders and texts are shown as they are: `[x]` is no style, `:ok:` no emoji. What the stream's encoding
    does not have is written as its number: a result is not lost for a sign in its table.
    """
    if isinstance(file, io.TextIOWrapper) and file.errors == "strict":
        file.reconfigure(errors="backslashreplace")
    return RichConsole(file=file, highlight=False, soft_wrap=True, markup=False, emoji=False)


def _plain(message: str) -> str:
    """Messages quote files that anybody may have written: nothing in them commands the terminal or fills it."""
    cut = message if len(message) <= _MESSAGE else message[:_MESSAGE] + "..."
    return "".join(letter if letter.isprintable() or letter == "\n" else repr(letter)[1:-1] for letter in cut)


class BarProgress:
    """rich's progress bar with rate and time left."""

    _open: ClassVar[list["BarProgress"]] = []

    def __init__(self, console: RichConsole) -> None:
        self._console = console
        self._bar: RichProgress | None = None
        self._task: TaskID | None = None
        self._open.append(self)

    @classmethod
    def close_all(cls) -> None:
        for progress in cls._open:
            progress.finish()
        cls._open.clear()

    def start(self, description: str, total: int) -> None:
        self.finish()
        self._bar = RichProgress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            console=self._console,
            transient=True,
        )
        self._bar.start()
        self._task = self._bar.add_task(description, total=total, note="")

    def advance(self, units: int = 1, note: str = "") -> None:
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, advance=units, note=note)

    def finish(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = self._task = None

    def say(self, line: str) -> None:
        self._console.print(line)


class LineProgress:
    """For logs and pipes: a line every tenth of the way, never a carriage return."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._description, self._total, self._done, self._next = "", 0, 0, 0

    def start(self, description: str, total: int) -> None:
        self._description, self._total, self._done = description, total, 0
        self._next = max(1, total // 10)

    def advance(self, units: int = 1, note: str = "") -> None:
        self._done += units
        if self._done >= self._next:
            self._next = self._done + max(1, self._total // 10)
            self._console.note(f"{self._description}: {self._done}/{self._total}" + (f"  {note}" if note else ""))

    def finish(self) -> None: ...

    def say(self, line: str) -> None:
        self._console.note(line)


def size_text(size_bytes: float) -> str:
    """1536 -> '1.5 KB'; decimal units, as disks and model hubs count."""
    for unit in ("B", "KB", "MB", "GB"):
        if size_bytes < 1000:
            return f"{size_bytes:.0f} {unit}" if unit == "B" else f"{size_bytes:.1f} {unit}"
        size_bytes /= 1000
    return f"{size_bytes:.1f} TB"


def time_text(seconds: float) -> str:
    """75 -> '1 min 15 s'."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
