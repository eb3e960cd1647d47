"""The table and the JSON document say what was measured."""

import json
from dataclasses import replace

from ctp_kernels.profiling import LatencyReport, LatencyRow, PairedRatio, Quartiles, Sample

from ctp_cli.benchmark import latency


def _row(prompt_tokens, reused, memory):
    return LatencyRow(
        prompt_tokens=prompt_tokens,
        prefix_reused=reused,
        first_token_ms=Quartiles(95.04, 100.06, 110.0),
        per_token_ms=Quartiles(9.5, 10.125, 11.0 + prompt_tokens),
        first_token_ratio=PairedRatio(1.0, 1.0824, 1.1, 0.9876, 1.1234),
        per_token_ratio=PairedRatio(0.99, 1.0, 1.01, 0.98, 1.02),
        peak_memory_bytes=memory,
        prefix_bytes=0,
        samples=(Sample(100.06, 10.125),),
    )


REPORT = LatencyReport(
    rows=(_row(0, False, 1_250_000), _row(25, False, 3_400_000), _row(25, True, None)),
    seqlen=1024,
    new_tokens=16,
    rounds=7,
    weight_bytes=269_000_000,
    memory_method="counted",
    device="cpu",
    dtype="bfloat16",
    threads=2,
)


def test_rows_carry_median_and_quartiles_and_no_ratio_for_the_baseline():
    none, computed, reused = latency.table_rows(REPORT)
    assert none == ["0", "-", "100.1 (95.0 to 110.0)", "1", "10.12 (9.50 to 11.00)", "1", "1.2"]
    assert computed[1:4] == ["computed", "100.1 (95.0 to 110.0)", "1.082 [0.988 to 1.123]"]
    assert (reused[1], reused[-1]) == ("reused", "-")
    assert all(len(row) == len(latency.COLUMNS) for row in latency.table_rows(REPORT))


def test_the_caption_names_conditions_and_how_memory_was_measured():
    text = latency.caption(REPORT)
    for part in (
        "1024 text tokens",
        "16 generated",
        "bfloat16 on cpu, 2 threads",
        "7 rounds",
        "95% confidence interval of the median, between order statistics",
        "269.0 MB",
        "counted",
    ):
        assert part in text


def test_too_few_rounds_for_an_interval_are_said():
    ratio = PairedRatio.of([1.1, 1.0, 1.2, 1.3, 1.4])
    rows = [replace(row, first_token_ratio=ratio) for row in REPORT.rows]
    few = replace(REPORT, rows=tuple(rows), rounds=5)
    assert latency.table_rows(few)[1][3] == "1.200 (1.100 to 1.300)"
    assert "5 rounds; ratios within each round, too few for a 95% confidence interval" in latency.caption(few)


def test_the_document_survives_json_with_every_run_in_it():
    document = json.loads(json.dumps(latency.document(REPORT)))
    assert document["rows"][1]["first_token_ms"] == {"low": 95.04, "median": 100.06, "high": 110.0}
    ratio = {"low": 1.0, "median": 1.0824, "high": 1.1, "confidence_low": 0.9876, "confidence_high": 1.1234}
    assert document["rows"][1]["first_token_ratio"] == ratio
    assert document["rows"][2]["samples"] == [{"first_token_ms": 100.06, "per_token_ms": 10.125}]
    assert document["rows"][2]["peak_memory_bytes"] is None


def test_the_gate_looks_at_the_slowest_configuration():
    assert latency.highest_per_token_ms(REPORT) == 10.125
