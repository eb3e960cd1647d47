"""The tables of `run.py`: what every reader made of every checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def print_table(title: str, readings: list[dict[str, Any]], beside: Mapping[tuple[str, str], str]) -> None:
    """Checkpoints down, readers across, the largest logit difference in between; then failures in full.

    `beside`: what else belongs in the table, by the checkpoint's name and the column, which is an environment (the text
    goes to all of its readers) or a column of its own.
    """
    if not readings:
        return
    columns = {reading["reader"]: reading["environment"] for reading in readings}
    print(title)
    print_readers(readings)
    table: dict[str, dict[str, str]] = {}
    for reading in readings:
        table.setdefault(row_name(reading["checkpoint"]), {})[reading["reader"]] = cell(reading)
    own = dict.fromkeys(column for _, column in beside if column not in columns.values())
    rows = [["checkpoint", *own, *columns]]
    for name, cells in table.items():
        found = [beside.get((name, column), "") for column in own]
        found += [cells.get(reader) or beside.get((name, columns[reader]), "") for reader in columns]
        rows.append([name, *found])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())
    for reading in readings:
        if not reading["passed"]:
            name = row_name(reading["checkpoint"])
            print(f"FAILED {name}: {reading['reader']}: {reading['error'] or json.dumps(reading)}")
    print(flush=True)


def print_readers(readings: list[dict[str, Any]]) -> None:
    """A line for every reader, and one for everything that was not its own."""
    lines = {}
    for reading in readings:
        facts = ", ".join(f"{package} {version}" for package, version in reading["versions"].items())
        lines[f"{reading['reader']}: {facts}"] = None
    lines |= {f"* {reading['reader']}: {reading['note']}": None for reading in readings if reading["note"]}
    print(*lines, sep="\n")


def cell(reading: dict[str, Any]) -> str:
    """The largest logit difference of one reading, or that it failed; a star where not all was the reader's own."""
    if reading["error"]:
        return "FAILED: no logits"
    verdict = "" if reading["passed"] else "FAILED: "
    star = " *" if reading["note"] else ""
    return f"{verdict}{reading['max_abs_diff']:.1e} of {reading['max_abs_logit']:.1f}{star}"


def row_name(checkpoint: str | Path) -> str:
    """Of a checkpoint's row: the last two parts of its path."""
    return "/".join(Path(checkpoint).parts[-2:])
