"""The figures: latency against prompt length, perplexity won back, the course of learning, and times of kernels.

Drawn on matplotlib's Figure directly: pyplot would choose a backend for the whole process. Colours are
Okabe and Ito's, told apart by colour-blind readers; markers, hatches and labels say the same without
colour.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ctp_kernels.profiling import LatencyReport, LatencyRow, Quartiles
from ctp_kernels.rooflines import LayerShape, RooflineReport
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from ctp_cli.files import whole_file

BLUE, VERMILLION, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#8C8C8C"
_BAR_STYLES = (
    (GREY, ""),
    (VERMILLION, "//"),
    (BLUE, "\\\\"),
    (GREEN, ".."),
    ("#E69F00", "xx"),
    ("#CC79A7", "--"),
)
_LATENCY_STYLES: dict[bool, dict[str, Any]] = {  # by whether the prefix was reused
    False: {"color": VERMILLION, "marker": "o", "linestyle": "-", "label": "prompt computed each time"},
    True: {"color": BLUE, "marker": "s", "linestyle": "--", "label": "prompt's keys and values reused"},
}
_MARKERS = "osD^vXP*<>"
_DPI = 150
_MOST_LENGTH_TICKS = 6  # so few measured lengths can all be written below the axis
_LOG_SPAN = 12.0  # past this ratio of the largest to the smallest bar, the small ones vanish on a linear axis


def latency_figure(report: LatencyReport, path: Path, *, title: str) -> None:
    """Write a PNG: time to the first token and per further one against prompt length, with quartile bands."""
    figure = Figure(figsize=(9.6, 4.2), layout="constrained")
    first, further = figure.subplots(1, 2)
    lines = [
        (style, [row for row in report.rows if row.prefix_reused == reused or not row.prompt_tokens])
        for reused, style in _LATENCY_STYLES.items()
    ]
    lengths = [row.prompt_tokens for row in lines[0][1]]
    for axes, attribute in ((first, "first_token"), (further, "per_token")):
        for style, rows in lines:
            _latency_line(axes, rows, attribute, style)
        axes.set_ylim(0, axes.get_ylim()[1] * 1.05)
        axes.set_xlabel("prompt length (tokens)")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        if len(lengths) <= _MOST_LENGTH_TICKS:
            axes.set_xticks(lengths)
        if lengths[-1]:
            axes.set_xlim(right=lengths[-1] * 1.18)  # room for the ratios
            _ratio_notes(axes, [(style, rows[-1]) for style, rows in lines], attribute)
        _plain(axes)
    first.set_ylabel(f"time to first token (ms), {report.seqlen} text tokens")
    further.set_ylabel("time per further token (ms)")
    figure.legend(
        *first.get_legend_handles_labels(),
        title=f"median and quartiles of {report.rounds} rounds; × is the median ratio to no prompt",
        title_fontsize=8,
        loc="outside lower center",
        ncols=2,
        frameon=False,
    )
    figure.suptitle(title)
    _save(figure, path)


def recovery_figure(perplexities: Mapping[str, Mapping[str, tuple[float, float]]], path: Path, *, title: str) -> None:
    """Write a PNG: perplexity bars per text, and the share of the lost perplexity that was won back.

    perplexities: text -> label -> (perplexity, standard error). In each text the first label is the full
    model and the second the compressed one; every further one is marked with `share_won_back`. All texts
    have the same labels.
    """
    texts, labels = list(perplexities), list(next(iter(perplexities.values())))
    figure = Figure(figsize=(max(5.0, 1.6 + 0.8 * len(texts) * len(labels)), 4.4), layout="constrained")
    axes = figure.subplots()
    width = 0.84 / len(labels)
    values = [value for bars in perplexities.values() for value, _ in bars.values()]
    for index, label in enumerate(labels):
        colour, hatch = _BAR_STYLES[index % len(_BAR_STYLES)]
        places = [t + (index - (len(labels) - 1) / 2) * width for t in range(len(texts))]
        pairs = [perplexities[text][label] for text in texts]
        heights, errors = [p for p, _ in pairs], [e for _, e in pairs]
        axes.bar(
            places,
            heights,
            width * 0.92,
            color=colour,
            hatch=hatch,
            edgecolor="white",
            linewidth=0,
            label=label,
        )
        axes.errorbar(places, heights, yerr=errors, fmt="none", ecolor="black", elinewidth=1, capsize=3)
        for place, text, height, error in zip(places, texts, heights, errors, strict=True):
            note = _bar_note(perplexities[text], labels, index)
            axes.annotate(
                note,
                (place, height + error),
                (0, 3),
                textcoords="offset points",
                ha="center",
                va="bottom",
                fontsize=8,
            )
    _perplexity_scale(axes, values)
    axes.set_xticks(range(len(texts)), texts)
    axes.tick_params(axis="x", length=0)
    _plain(axes)
    figure.legend(loc="outside lower center", ncols=2 if len(labels) == 4 else 3, frameon=False)
    figure.suptitle(title)
    _save(figure, path)


def learning_figure(points: Sequence[tuple[int, float]], path: Path, *, title: str) -> None:
    """Write a PNG: validation perplexity against the step, the best one marked.

    points: (step, perplexity), at least one.
    """
    steps, values = zip(*points, strict=True)
    best = min(range(len(values)), key=values.__getitem__)
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, values, color=BLUE, marker="o" if len(points) <= 40 else None, markersize=4)
    axes.plot(
        [steps[best]],
        [values[best]],
        linestyle="none",
        marker="*",
        markersize=14,
        color=VERMILLION,
        markeredgecolor="white",
        label=f"best: {values[best]:.2f} at step {steps[best]:,}",
    )
    axes.margins(y=0.12)
    axes.set_xlabel("step")
    axes.set_ylabel("validation perplexity")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
    axes.legend(loc="upper right", frameon=False)
    _plain(axes)
    figure.suptitle(title)
    _save(figure, path)


def kernels_figure(report: RooflineReport, path: Path, *, title: str) -> None:
    """Write a PNG: time against rows of x, a panel for each layer shape and a line with quartiles for each product."""
    shapes = list(dict.fromkeys((row.outputs, row.inputs) for row in report.rows))
    products = list(dict.fromkeys(row.product for row in report.rows))
    columns = min(3, len(shapes))
    lines = -(-len(shapes) // columns)
    figure = Figure(figsize=(max(6.4, 4.2 * columns), 3.4 * lines + 0.9), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).flatten()
    for axes, shape in zip(panels, shapes, strict=False):
        for index, product in enumerate(products):
            rows = [row for row in report.rows if (row.outputs, row.inputs) == shape and row.product == product]
            if not rows:
                continue
            spreads = [row.time_us for row in rows]
            below, above = [s.median - s.low for s in spreads], [s.high - s.median for s in spreads]
            axes.errorbar(
                [row.rows for row in rows],
                [s.median for s in spreads],
                yerr=[below, above],
                color=_BAR_STYLES[index % len(_BAR_STYLES)][0],
                marker=_MARKERS[index % len(_MARKERS)],
                linestyle="-" if product.startswith("ours") else ":",
                markersize=5,
                capsize=2,
                label=product,
            )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(sorted({row.rows for row in report.rows}))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda rows, _: f"{rows:g}"))
        axes.set_xlabel("rows of x")
        axes.set_ylabel("time (µs)")
        axes.set_title(str(LayerShape(*shape)), fontsize=10)
        _plain(axes)
    for axes in panels[len(shapes) :]:
        axes.set_visible(False)
    handles = {
        label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        list(handles.values()),
        list(handles),
        title=f"median and quartiles of {report.rounds} rounds; layers are outputs x inputs",
        title_fontsize=8,
        loc="outside lower center",
        ncols=4,
        frameon=False,
        fontsize=8,
    )
    figure.suptitle(title)
    _save(figure, path)


def share_won_back(full: float, compressed: float, prompted: float) -> float | None:
    """How much of the perplexity lost to compression came back: 1 is all of it. None if nothing was lost."""
    return (compressed - prompted) / (compressed - full) if compressed > full else None


def _latency_line(axes: Axes, rows: Sequence[LatencyRow], attribute: str, style: Mapping[str, Any]) -> None:
    spreads: list[Quartiles] = [getattr(row, f"{attribute}_ms") for row in rows]
    lengths = [row.prompt_tokens for row in rows]
    low, high = [s.low for s in spreads], [s.high for s in spreads]
    axes.fill_between(lengths, low, high, color=style["color"], alpha=0.18, linewidth=0)
    axes.plot(lengths, [s.median for s in spreads], markersize=5, **style)


def _ratio_notes(axes: Axes, ends: Sequence[tuple[Mapping[str, Any], LatencyRow]], attribute: str) -> None:
    """Right of the lines' ends; the upper line's note grows upwards, so that close ends stay readable."""
    lowest_first = sorted(ends, key=lambda end: getattr(end[1], f"{attribute}_ms").median)
    for (style, row), alignment in zip(lowest_first, ("top", "bottom"), strict=True):
        axes.annotate(
            f"×{getattr(row, f'{attribute}_ratio').median:.2f}",
            (row.prompt_tokens, getattr(row, f"{attribute}_ms").median),
            (7, 0),
            textcoords="offset points",
            va=alignment,
            color=style["color"],
            fontsize=9,
        )


def _bar_note(bars: Mapping[str, tuple[float, float]], labels: Sequence[str], index: int) -> str:
    value = bars[labels[index]][0]
    text = f"{value:.2f}" if value < 100 else f"{value:.1f}" if value < 1000 else f"{value:,.0f}"
    if index < 2:
        return text
    share = share_won_back(bars[labels[0]][0], bars[labels[1]][0], value)
    if share is None:
        return text
    # almost all is not all
    return f"{share:.1%}\nwon back\n{text}" if 0.99 <= share < 1 else f"{share:.0%}\nwon back\n{text}"


def _perplexity_scale(axes: Axes, values: Sequence[float]) -> None:
    if max(values) / min(values) > _LOG_SPAN:
        axes.set_yscale("log")
        axes.set_ylim(min(values) / 2, max(values) * 4)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_ylabel("perplexity (log scale)")
    else:
        axes.set_ylim(0, axes.get_ylim()[1] * 1.12)
        axes.set_ylabel("perplexity")


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)


def _save(figure: Figure, path: Path) -> None:
    with whole_file(path) as beside:  # its name ends in .writing, from which no format could be guessed
        figure.savefig(beside, format="png", dpi=_DPI)
