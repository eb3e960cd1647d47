"""`ctp bench --kernels`, as a user types it, on the layers of small models."""

import json
from pathlib import Path

import pytest
import torch
from ctp_kernels import onnx_product, packed, rooflines, ways
from ctp_kernels.rooflines import KINDS, LayerShape
from ctp_kernels.ways import explain
from tiny_models import tiny_model
from typer.testing import CliRunner

from ctp_cli import artifact
from ctp_cli.app import app
from ctp_cli.benchmark.kernels import caption, choice_lines, table_rows
from ctp_cli.errors import InputError
from ctp_cli.progress import SILENT
from ctp_cli.stages import kernels as stage

LLAMA_LAYERS = {"64 x 64", "32 x 64", "128 x 64", "64 x 128"}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(rooflines, "cache_bytes", lambda device: 20_000)
    monkeypatch.setattr(rooflines, "_COPIED_BYTES", 1 << 16)
    monkeypatch.setattr(rooflines, "_SAMPLE_S", 0.0)
    monkeypatch.setattr(onnx_product, "available", lambda: False)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("llama_tied_gqa", tmp_path_factory.mktemp("models") / "tiny")


def test_an_artifact_with_times_figure_and_manifest(llama: Path) -> None:
    done = CliRunner().invoke(app, ["bench", str(llama), "--kernels", "--rounds", "2", "--device", "cpu"])
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines()[-1] == "tiny-kernels/kernels.png"
    assert Path("tiny-kernels/kernels.png").read_bytes().startswith(b"\x89PNG")
    written = json.loads(Path("tiny-kernels/kernels.json").read_text())
    assert {f"{row['outputs']} x {row['inputs']}" for row in written["rows"]} == LLAMA_LAYERS
    assert {row["rows"] for row in written["rows"]} == set(rooflines.BATCHES)
    assert len(written["rows"]) == 4 * (4 * (3 + 2 * len(KINDS)) + 1)  # torch.mv is for one row
    assert len(written["prediction, not measured"]) == 4 * (1 + len(KINDS))
    manifest = artifact.manifest_of(Path("tiny-kernels"), kind="kernel-benchmark")
    assert manifest["recipe"]["bench"]["rounds"] == 2
    assert manifest["inputs"]["model"]["config_sha256"] == artifact.file_fingerprint(llama / "config.json")
    assert "prediction for GPUs, not measured" in done.stdout
    assert "A prediction, nothing was measured" in " ".join(done.stdout.split())
    again = CliRunner().invoke(app, ["bench", str(llama), "--kernels"])
    assert again.exit_code == 2
    assert "exists" in again.stderr


def test_the_environment_s_say_on_a_way_is_explained(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen() -> dict[str, str]:
        found = stage.choices(stage.layer_shapes(llama), device="cpu")
        return {kind: choice.way for (kind, rows, shape), choice in found.items() if (rows, shape) == (1, "64 x 64")}

    monkeypatch.delenv("CTP_INT8_ACTIVATIONS", raising=False)
    monkeypatch.setattr(packed, "available", lambda: True)
    assert set(chosen().values()) == {"packed"}
    monkeypatch.setenv("CTP_INT8_ACTIVATIONS", "1")
    assert set(chosen().values()) == {"packed int8"}
    monkeypatch.setattr(packed, "available", lambda: False)
    monkeypatch.setattr(ways, "_against_int4", lambda parts, *_: "" if parts.mask is None else "a mask")
    monkeypatch.setenv("CTP_DENSE_CODES", "0")
    assert {kind for kind, way in chosen().items() if way == "int4"} == {"dense"}
    monkeypatch.setenv("CTP_DENSE_CODES", "1")
    assert set(chosen().values()) == {"int4"}


def test_json_is_one_document(llama: Path) -> None:
    done = CliRunner().invoke(app, ["bench", str(llama), "--kernels", "--rounds", "1", "--json", "--device", "cpu"])
    document = json.loads(done.stdout)
    assert (document["schema_version"], document["kind"], document["model"]) == (1, "kernel-bench", "tiny")
    assert document["rows"][0]["time_us"].keys() == {"low", "median", "high"}
    assert document["rows"][0]["interval_us"] is None, "two rounds are too few"


def test_explained_choices_are_those_of_dispatch(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CTP_DENSE_CODES", "0")
    done = CliRunner().invoke(app, ["bench", str(llama), "--kernels", "--explain", "--json", "--device", "cpu"])
    choices = json.loads(done.stdout)["choices"]
    assert {(c["weights"], c["rows"], c["layer"]) for c in choices} == {
        (kind, rows, layer) for kind in KINDS for rows in rooflines.BATCHES for layer in LLAMA_LAYERS
    }
    for choice in choices:
        shape = LayerShape(*map(int, choice["layer"].split(" x ")))
        parts = rooflines.random_layer(shape, choice["weights"], torch.Generator())
        wanted = explain(parts, device="cpu", dtype=torch.bfloat16, rows=choice["rows"])
        assert (choice["way"], choice["others"]) == (wanted.way, wanted.others)
    words = CliRunner().invoke(app, ["bench", str(llama), "--kernels", "--explain", "--device", "cpu"]).stdout
    assert "\n    packed: codes are decoded in registers" in words or "\n    dense: weights are made dense" in words
    assert "\n    not int4: takes 4 bits without a mask, not 4 bits with a mask" in words
    assert "with a code for every weight" not in words
    monkeypatch.setenv("CTP_DENSE_CODES", "1")
    words = CliRunner().invoke(app, ["bench", str(llama), "--kernels", "--explain", "--device", "cpu"]).stdout
    assert ", with a code for every weight: " in words
    assert not list(Path.cwd().iterdir()), "nothing is measured, nothing written"


def test_choices_that_differ_are_not_merged() -> None:
    one, other = (explain(rooflines.described(LayerShape(64, 64), k), device="cpu", dtype=torch.float32, rows=1)
                  for k in ("dense", "2:4"))  # fmt: skip
    choices = {("dense", m, layer): one for m in (1, 4) for layer in ("a", "b")}
    choices |= {("2:4", m, "a"): other for m in (1, 4)} | {("8:16", m, "a"): other for m in (1, 4)}
    heads = [line for line in choice_lines(choices) if not line.startswith(" ")]
    assert heads == ["dense; rows: 1, 4; all layers", "2:4, 8:16; rows: 1, 4; a"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_tuning_without_a_gpu_is_refused_and_leaves_nothing(llama: Path) -> None:
    done = CliRunner().invoke(app, ["bench", str(llama), "--kernels", "--tune"])
    assert done.exit_code == 2
    assert "--tune needs a GPU" in done.stderr
    assert not list(Path.cwd().iterdir())


def test_tuning_takes_every_layer_in_every_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    tuned: list[tuple[str, int, int]] = []

    def record(weights, *, batches, on_layer):  # type: ignore[no-untyped-def]
        assert batches == rooflines.BATCHES
        for weight in weights:
            tuned.append((weight.layout, weight.outputs, weight.inputs))
            on_layer(weight.layout)
        return Path("gpu.json")

    monkeypatch.setattr(stage, "tune", record)
    stage._tune([LayerShape(64, 64), LayerShape(32, 64)], "cpu", torch.Generator(), SILENT)
    assert tuned == [(layout, outputs, 64) for outputs in (64, 32) for layout in ("dense", "8:16", "bitmap")]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--tune"], "--tune: only with --kernels"),
        (["--explain"], "--explain: only with --kernels"),
        (["--kernels", "--prompt-len", "3"], "--prompt-len: not with --kernels"),
        (["--kernels", "--max-latency-ms", "3"], "--max-latency-ms: not with --kernels"),
    ],
)
def test_options_that_do_not_go_together(options: list[str], said: str) -> None:
    done = CliRunner().invoke(app, ["bench", *options])
    assert done.exit_code == 2
    assert said in done.stderr


def test_shapes_are_those_of_the_model_whatever_way_it_stores_them(tmp_path: Path) -> None:
    gpt2 = tiny_model("gpt2", tmp_path / "gpt2")
    shapes = stage.layer_shapes(gpt2)
    assert set(shapes) == {LayerShape(192, 64), LayerShape(64, 64), LayerShape(256, 64), LayerShape(64, 256)}
    assert len(shapes) == 4
    assert stage.layer_shapes(None) == rooflines.SHAPES
    config = json.loads((gpt2 / "config.json").read_text())
    (gpt2 / "config.json").write_text(json.dumps({**config, "n_embd": 40}))
    with pytest.raises(InputError, match="120 x 40"):
        stage.layer_shapes(gpt2)


def test_times_carry_the_intervals_of_their_medians(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rooflines, "_SAMPLE_S", 1e-5)
    report = rooflines.measure([LayerShape(64, 64)], device="cpu", generator=torch.Generator(), batches=(1,), rounds=6)
    for row, cells in zip(report.rows, table_rows(report), strict=True):
        assert row.interval_us is not None
        low, high = row.interval_us  # of six values the least and the largest
        assert low <= row.time_us.low <= row.time_us.median <= row.time_us.high <= high
        assert any(f"({low:.1f} to {high:.1f})" in cell or f"({low:.0f} to {high:.0f})" in cell for cell in cells)
    assert "95% intervals" in caption(report)
    report = rooflines.measure([LayerShape(64, 64)], device="cpu", generator=torch.Generator(), batches=(1,), rounds=2)
    assert "medians (quartiles)" in caption(report)
