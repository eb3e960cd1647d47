"""What a latency report looks like: as the rows of a table, and as one JSON document."""

from dataclasses import asdict
from typing import Any

from ctp_kernels.profiling import CONFIDENCE, LatencyReport, LatencyRow, PairedRatio, Quartiles

COLUMNS = (
    "prompt tokens",
    "prompt's keys and values",
    "first token, ms",
    "to no prompt",
    "per token, ms",
    "to no prompt",
    "memory, MB",
)


def table_rows(report: LatencyReport) -> list[list[str]]:
    """One row per configuration, under COLUMNS; times as median (first to third quartile), ratios as median
    [confidence interval].
    """
    return [
        [
            str(row.prompt_tokens),
            way(row),
            _spread(row.first_token_ms, 1),
            _ratio(row, row.first_token_ratio),
            _spread(row.per_token_ms, 2),
            _ratio(row, row.per_token_ratio),
            "-" if row.peak_memory_bytes is None else f"{row.peak_memory_bytes / 1e6:.1f}",
        ]
        for row in report.rows
    ]


def way(row: LatencyRow) -> str:
    """How the prompt's keys and values came about, in a word."""
    if not row.prompt_tokens:
        return "-"
    return "reused" if row.prefix_reused else "computed"


def caption(report: LatencyReport) -> str:
    """What one must know to read the table."""
    threads = f", {report.threads} threads" if report.device == "cpu" else ""
    return (
        f"{report.seqlen} text tokens, {report.new_tokens} generated, batch size 1, "
        f"{report.dtype} on {report.device}{threads}; "
        f"median (quartiles) of {report.rounds} rounds; ratios within each round, {_interval(report)}. "
        f"Memory beyond the {report.weight_bytes / 1e6:.1f} MB of weights: {report.memory_method}."
    )


def document(report: LatencyReport) -> dict[str, Any]:
    """The report as a JSON object, every timed run included."""
    return asdict(report)


def highest_per_token_ms(report: LatencyReport) -> float:
    """The largest median time per token of any configuration: what `max_latency_ms` is held against."""
    return max(row.per_token_ms.median for row in report.rows)


def _spread(quartiles: Quartiles, digits: int) -> str:
    return f"{quartiles.median:.{digits}f} ({quartiles.low:.{digits}f} to {quartiles.high:.{digits}f})"


def _interval(report: LatencyReport) -> str:
    if any(row.first_token_ratio.confidence_low is None for row in report.rows):
        return f"too few for a {CONFIDENCE:.0%} confidence interval, which takes 6 rounds"
    return f"[{CONFIDENCE:.0%} confidence interval of the median, between order statistics]"


def _ratio(row: LatencyRow, ratio: PairedRatio) -> str:
    if not row.prompt_tokens:
        return "1"
    if ratio.confidence_low is None:
        return _spread(ratio, 3)
    return f"{ratio.median:.3f} [{ratio.confidence_low:.3f} to {ratio.confidence_high:.3f}]"
