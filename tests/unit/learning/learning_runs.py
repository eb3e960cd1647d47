"""Short runs of learning that tests compare: the same settings everywhere but for what a test changes."""

from pathlib import Path
from typing import Any

from ctp_cli.models.resolve import resolve_model
from ctp_cli.progress import SilentProgress
from ctp_cli.recipe import LearnSection
from ctp_cli.stages.learn import LearnReport, learn_prompt

SECTION: dict[str, Any] = {
    "tokens": 8, "steps": 12, "batch_size": 4, "seqlen": 48, "validate_every": 4, "validation_windows": 6,
    "text": "pydoc:train", "validation": "pydoc:validation", "learning_rate": 3e-2,
}  # fmt: skip


class StopAfter(SilentProgress):
    """Interrupts like Ctrl-C, after so many steps."""

    def __init__(self, steps: int) -> None:
        self.left, self.running = steps, False

    def start(self, description: str, total: int) -> None:
        self.running = description == "learn"

    def advance(self, units: int = 1, note: str = "") -> None:
        if self.running and note:
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt


def run(
    models: Path | list[Path], output: Path, progress: Any = None, *, force: bool = False, **changes: Any
) -> LearnReport:
    section = LearnSection(**(SECTION | changes))
    resolved = [resolve_model(str(path)) for path in (models if isinstance(models, list) else [models])]
    teacher = resolve_model(section.teacher) if section.teacher else None
    options: dict[str, Any] = {"teacher": teacher, "force": force, "progress": progress or SilentProgress()}
    return learn_prompt(section, models=resolved, output=output, **options)


class Listening(SilentProgress):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, line: str) -> None:
        self.said.append(line)
