"""The figures show the numbers they are given, and are whole PNG files or not there at all."""

import subprocess
import sys

import matplotlib.image
import pytest
from ctp_kernels.profiling import LatencyReport, LatencyRow, PairedRatio, Quartiles, Sample

from ctp_cli.benchmark import figures


def latency_row(prompt_tokens, reused, first_ms, token_ms):
    def around(value):
        return Quartiles(value * 0.9, value, value * 1.2)

    return LatencyRow(
        prompt_tokens=prompt_tokens,
        prefix_reused=reused,
        first_token_ms=around(first_ms),
        per_token_ms=around(token_ms),
        first_token_ratio=PairedRatio.of([first_ms / 100]),
        per_token_ratio=PairedRatio.of([token_ms / 10]),
        peak_memory_bytes=3_400_000,
        prefix_bytes=1000 if reused else 0,
        samples=(Sample(first_ms, token_ms),),
    )


def latency_report():
    rows = [
        (0, False, 100, 10),
        (25, False, 103, 10.1),
        (25, True, 101, 10.2),
        (50, False, 108, 10.3),
        (50, True, 102, 10.4),
    ]
    return LatencyReport(
        rows=tuple(latency_row(*row) for row in rows),
        seqlen=1024,
        new_tokens=16,
        rounds=5,
        weight_bytes=269_000_000,
        memory_method="counted",
        device="cpu",
        dtype="bfloat16",
        threads=2,
    )


PERPLEXITIES = {
    "wikitext2": {"full": (20.0, 0.5), "compressed": (60.0, 2.0), "compressed + prompt": (30.0, 0.8)},
    "ptb": {"full": (45.0, 1.0), "compressed": (44.0, 1.0), "compressed + prompt": (43.0, 0.9)},
}


@pytest.fixture(name="drawn")
def _drawn(monkeypatch):
    """The figures as matplotlib objects; they are saved as well."""
    seen, save = [], figures._save
    monkeypatch.setattr(figures, "_save", lambda figure, path: (seen.append(figure), save(figure, path)))
    return seen


def _texts(axes):
    return [text.get_text() for text in axes.texts]


def test_latency_lines_start_at_no_prompt_and_show_medians(tmp_path, drawn):
    figures.latency_figure(latency_report(), tmp_path / "latency.png", title="Latency")
    first, further = drawn[0].axes
    computed, reused = first.lines
    assert computed.get_xydata().tolist() == [[0, 100], [25, 103], [50, 108]]
    assert reused.get_xydata().tolist() == [[0, 100], [25, 101], [50, 102]]
    assert further.lines[1].get_xydata().tolist() == [[0, 10], [25, 10.2], [50, 10.4]]
    assert _texts(first) == ["×1.02", "×1.08"]
    band = first.collections[1].get_paths()[0].get_extents()
    assert (band.y0, band.y1) == pytest.approx((100 * 0.9, 102 * 1.2))
    assert "(ms)" in first.get_ylabel() and "(ms)" in further.get_ylabel() and "(tokens)" in first.get_xlabel()
    assert first.get_ylim()[0] == 0


def test_recovery_bars_show_values_errors_and_the_share_won_back(tmp_path, drawn):
    figures.recovery_figure(PERPLEXITIES, tmp_path / "recovery.png", title="Recovery")
    (axes,) = drawn[0].axes
    heights = {
        bars.get_label(): [bar.get_height() for bar in bars] for bars in axes.containers if hasattr(bars, "patches")
    }
    assert heights == {"full": [20, 45], "compressed": [60, 44], "compressed + prompt": [30, 43]}
    # (60 - 30) / (60 - 20); ptb lost nothing, so no share of the loss can be named
    assert _texts(axes) == ["20.00", "45.00", "60.00", "44.00", "75%\nwon back\n30.00", "43.00"]
    errors = [bars.lines[2][0].get_segments() for bars in axes.containers if not hasattr(bars, "patches")]
    assert [[high - low for (_, low), (_, high) in each] for each in errors] == [
        pytest.approx(both) for both in ([1, 2], [4, 2], [1.6, 1.8])
    ]
    assert axes.get_yscale() == "linear"


def test_very_different_perplexities_get_a_log_axis(tmp_path, drawn):
    wide = {"ptb": {"full": (11.02, 0.1), "2 bit": (5883.13, 90.0), "2 bit + prompt": (19.52, 0.3)}}
    figures.recovery_figure(wide, tmp_path / "recovery.png", title="Recovery")
    assert drawn[0].axes[0].get_yscale() == "log" and "log" in drawn[0].axes[0].get_ylabel()


def test_learning_marks_the_best_step(tmp_path, drawn):
    figures.learning_figure([(0, 60.0), (50, 41.0), (100, 39.5), (150, 40.0)], tmp_path / "l.png", title="Learning")
    curve, best = drawn[0].axes[0].lines
    assert curve.get_xydata().tolist() == [[0, 60], [50, 41], [100, 39.5], [150, 40]]
    assert best.get_xydata().tolist() == [[100, 39.5]] and best.get_label() == "best: 39.50 at step 100"


@pytest.mark.parametrize(("given", "share"), [((20, 60, 30), 0.75), ((20, 60, 70), -0.25), ((20, 20, 19), None)])
def test_share_won_back(given, share):
    assert figures.share_won_back(*given) == share


@pytest.mark.parametrize(
    "draw",
    [
        lambda path: figures.latency_figure(latency_report(), path, title="Latency"),
        lambda path: figures.recovery_figure(PERPLEXITIES, path, title="Recovery"),
        lambda path: figures.learning_figure([(0, 60.0)], path, title="Learning"),
    ],
)
def test_a_readable_png_and_nothing_else_is_left(tmp_path, draw):
    path = tmp_path / "figure.any-suffix"
    draw(path)
    image = matplotlib.image.imread(path, format="png")
    assert image.shape[0] > 400 and image.shape[1] > 600 and image.std() > 0.02
    assert list(tmp_path.iterdir()) == [path]


def test_the_process_keeps_its_matplotlib_settings():
    code = "import sys, ctp_cli.benchmark.figures; print('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
