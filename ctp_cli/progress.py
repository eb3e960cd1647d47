"""Progress is injected: library loops report to this protocol and never know who listens."""

from typing import Protocol


class Progress(Protocol):
    """One running piece of work: announced, advanced, annotated, closed."""

    def start(self, description: str, total: int) -> None:
        """Begin a task of `total` units; a task still open is closed first."""

    def advance(self, units: int = 1, note: str = "") -> None:
        """`units` more are done; `note` is a short live remark such as a loss."""

    def finish(self) -> None:
        """The task is over, whether or not every unit was advanced."""

    def say(self, line: str) -> None:
        """A line worth keeping, e.g. one validation result."""


class SilentProgress:
    """The default: nobody listens."""

    def start(self, description: str, total: int) -> None: ...

    def advance(self, units: int = 1, note: str = "") -> None: ...

    def finish(self) -> None: ...

    def say(self, line: str) -> None: ...


SILENT = SilentProgress()
