"""What times of kernels, predictions and choices look like: as the rows of tables, and as one JSON document."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from ctp_kernels.profiling import Quartiles
from ctp_kernels.rooflines import GPU_BYTES_PER_S, LayerShape, Prediction, RooflineReport
from ctp_kernels.ways import Choice

COLUMNS = ("layer", "rows", "product", "way", "time, µs", "GB/s", "of copying")
PREDICTED_COLUMNS = ("layer", "weights", "MB", *(f"{gpu}, µs" for gpu in GPU_BYTES_PER_S))


def table_rows(report: RooflineReport) -> list[list[str]]:
    """One row per product, under COLUMNS."""
    return [
        [
            str(LayerShape(row.outputs, row.inputs)),
            str(row.rows),
            row.product,
            row.way or "-",
            _spread(row.time_us, row.interval_us),
            f"{row.gb_per_s:.2f}",
            f"{row.share_of_copy:.1%}",
        ]
        for row in report.rows
    ]


def caption(report: RooflineReport) -> str:
    """What one must know to read the table."""
    threads = f", {report.threads} threads" if report.device == "cpu" else ""
    copies = report.copy_gb_per_s
    spread = "95% intervals of them" if report.rows and report.rows[0].interval_us else "quartiles"
    lines = [
        f"{report.device}{threads}; medians ({spread}) of {report.rounds} rounds, products in turns. "
        "Layers are outputs x inputs, rows those of x. "
        f"GB/s: weights as they are stored, x and y, read or written once; copying reached {copies.median:.1f} "
        f"({copies.low:.1f} to {copies.high:.1f}). Weights in rotation, more than caches of "
        f"{report.cache_bytes / 1e6:.0f} MB hold unless said here. 4 bits, random weights.",
        *(f"{note}." for note in report.notes),
    ]
    return "\n".join(lines)


def predicted_rows(predictions: Sequence[Prediction]) -> list[list[str]]:
    """One row per product, under PREDICTED_COLUMNS."""
    return [
        [
            str(LayerShape(row.outputs, row.inputs)),
            row.product,
            f"{row.moved_bytes / 1e6:.3g}",
            *(f"{time:.3g}" for time in row.time_us.values()),
        ]
        for row in predictions
    ]


def predicted_caption() -> str:
    """What one must know to read the predictions."""
    speeds = ", ".join(f"{gpu} {speed / 1e12:g} TB/s" for gpu, speed in GPU_BYTES_PER_S.items())
    return f"A prediction, nothing was measured: bytes of a product with one row of x, divided by bandwidth ({speeds})."


def choice_lines(choices: Mapping[tuple[str, int, str], Choice]) -> list[str]:
    """The choices and their reasons in words; kinds of weights, numbers of rows and layers that share them together.

    choices: (kind, rows, layer) -> choice.
    """
    every = tuple(dict.fromkeys(layer for _, _, layer in choices))
    layers_of: dict[tuple[str, int, str], tuple[str, ...]] = {}
    for (kind, rows, layer), choice in choices.items():
        key = (kind, rows, str(choice))
        layers_of[key] = (*layers_of.get(key, ()), layer)
    rows_of: dict[tuple[str, tuple[str, ...], str], tuple[int, ...]] = {}
    for (kind, rows, text), layers in layers_of.items():
        rows_of[kind, layers, text] = (*rows_of.get((kind, layers, text), ()), rows)
    kinds_of: dict[tuple[tuple[int, ...], tuple[str, ...], str], tuple[str, ...]] = {}
    for (kind, layers, text), numbers in rows_of.items():
        kinds_of[numbers, layers, text] = (*kinds_of.get((numbers, layers, text), ()), kind)
    lines = []
    for (numbers, layers, text), kinds in kinds_of.items():
        which = "all layers" if layers == every else ", ".join(layers)
        lines.append(f"{', '.join(kinds)}; rows: {', '.join(map(str, numbers))}; {which}")
        lines += [f"    {line}" for line in text.splitlines()]
    return lines


def choice_document(choices: Mapping[tuple[str, int, str], Choice]) -> dict[str, Any]:
    """The choices as a JSON object."""
    return {
        "choices": [
            {"weights": kind, "rows": rows, "layer": layer, **asdict(choice)}
            for (kind, rows, layer), choice in choices.items()
        ]
    }


def _spread(quartiles: Quartiles, interval: tuple[float, float] | None) -> str:
    digits = 1 if quartiles.median < 100 else 0
    low, high = interval or (quartiles.low, quartiles.high)
    return f"{quartiles.median:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"
