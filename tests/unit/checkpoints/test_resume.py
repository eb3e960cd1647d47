"""Work that stops after some blocks goes on from there, and ends with the same bytes."""

import json
from pathlib import Path

import pytest
from compressed import StopAfter, Stopped, calibration_text, files_of, run
from tiny_models import tiny_model

from ctp_cli.errors import CtpError, OutputError
from ctp_cli.stages import passes

BLOCKS = 3


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("llama_tied_gqa", tmp_path_factory.mktemp("models") / "llama", num_hidden_layers=BLOCKS)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return calibration_text(tmp_path)


@pytest.fixture
def solved(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The blocks that were solved, rather than read back."""
    seen: list[int] = []
    original = passes.compress_block

    def counting(block, *args, **kwargs):  # type: ignore[no-untyped-def]
        seen.append(block.index)
        return original(block, *args, **kwargs)

    monkeypatch.setattr(passes, "compress_block", counting)
    return seen


@pytest.mark.parametrize("done", [0, 1, 2, 3])
@pytest.mark.parametrize(
    "settings",
    [
        {"format": "gptq"},
        {"format": "gptq", "symmetric": False, "bits": 3, "act_order": "column"},
        {"format": "dense"},
        {"format": "ctp"},
        {"target": "full"},
        {"tune_windows": 2, "tune": "scales", "format": "ctp"},
        {"tune_windows": 2, "bits": None, "format": "dense"},
    ],
    ids=["gptq", "gptq-asymmetric-3-bit-column", "dense", "ctp", "aiming-at-full", "tuned-scales", "tuned-pruned"],
)
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(
    model: Path, text: Path, tmp_path: Path, done: int, settings: dict[str, object], solved: list[int]
) -> None:
    run(model, tmp_path / "whole", text, **settings)
    solved.clear()
    with pytest.raises(Stopped):
        run(model, tmp_path / "out", text, progress=StopAfter(done), **settings)
    assert not (tmp_path / "out").exists()
    assert solved == list(range(done))
    listener = StopAfter(100)
    run(model, tmp_path / "out", text, progress=listener, **settings)
    assert solved == list(range(BLOCKS)), "finished blocks are read back, the others solved once"
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
    assert any("going on" in line for line in listener.lines)
    assert not (tmp_path / "out.partial").exists()
    layers = [json.loads((tmp_path / name / "ctp.json").read_text())["results"]["layers"] for name in ("out", "whole")]
    for ours, theirs in zip(*layers, strict=True):
        assert {**ours, "solve_seconds": 0} == {**theirs, "solve_seconds": 0}


# three blocks pruned, two windows of tuning weights, three blocks quantized, two windows of tuning scales
@pytest.mark.parametrize(("done", "solved_before"), [(1, 1), (4, 3), (5, 3), (7, 5), (9, 6)])
def test_pruning_tuning_quantizing_and_tuning_resumes_to_the_same_bytes(
    model: Path, text: Path, tmp_path: Path, done: int, solved_before: int, solved: list[int]
) -> None:
    settings = {"tune_windows": 2, "target": "full"}
    run(model, tmp_path / "whole", text, **settings)
    solved.clear()
    with pytest.raises(Stopped):
        run(model, tmp_path / "out", text, progress=StopAfter(done), **settings)
    assert len(solved) == solved_before
    run(model, tmp_path / "out", text, **settings)
    assert solved == [*range(BLOCKS), *range(BLOCKS)]
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


@pytest.mark.parametrize("moment", ["before the record of tuning", "between two shards that take their places"])
def test_a_run_that_dies_while_tuned_shards_are_put_in_place_is_made_whole(
    model: Path, text: Path, tmp_path: Path, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(model, tmp_path / "whole", text, tune_windows=2)
    moved: list[Path] = []
    with monkeypatch.context() as patch:
        if moment.startswith("before"):
            original = passes.write_json

            def write(path: Path, content: object) -> None:
                if path == tmp_path / "out.partial" / "tuned.json":
                    raise Stopped
                original(path, content)

            patch.setattr(passes, "write_json", write)
        else:
            replace = Path.replace

            def once(path: Path, target: Path) -> Path:
                if path.suffix == ".tuned" and moved:
                    raise Stopped
                moved.extend([path] if path.suffix == ".tuned" else [])
                return replace(path, target)

            patch.setattr(Path, "replace", once)
        with pytest.raises(Stopped):
            run(model, tmp_path / "out", text, tune_windows=2)
    assert bool(moved) == moment.startswith("between")
    assert list((tmp_path / "out.partial").glob("*.tuned"))
    run(model, tmp_path / "out", text, tune_windows=2)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_half_precision_resumes_to_the_same_bytes_too(text: Path, tmp_path: Path) -> None:
    import torch

    half = tiny_model("gpt2", tmp_path / "half", dtype=torch.bfloat16)  # transposed weights and biases
    run(half, tmp_path / "whole", text)
    with pytest.raises(Stopped):
        run(half, tmp_path / "out", text, progress=StopAfter(1))
    run(half, tmp_path / "out", text)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_other_settings_are_refused_with_what_differs(model: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        run(model, tmp_path / "out", text, progress=StopAfter(1))
    before = files_of(tmp_path / "out.partial")
    with pytest.raises(OutputError, match=r"compress\.bits was 4, is 3.*compress\.sparsity was 0\.5, is 0\.25"):
        run(model, tmp_path / "out", text, bits=3, sparsity=0.25)
    text.write_text(text.read_text(encoding="utf-8") + "another ending", encoding="utf-8")
    with pytest.raises(OutputError, match=r"calibration\.sha256 was [0-9a-f]+, is [0-9a-f]+") as caught:
        run(model, tmp_path / "out", text)
    assert "--force" in caught.value.hint
    assert files_of(tmp_path / "out.partial") == before
    run(model, tmp_path / "out", text, bits=3, force=True)
    assert json.loads((tmp_path / "out" / "quantize_config.json").read_text())["bits"] == 3


def test_another_model_of_the_same_name_is_refused(model: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        run(model, tmp_path / "out", text, progress=StopAfter(1))
    other = tiny_model("llama_tied_gqa", tmp_path / "other" / model.name, num_hidden_layers=BLOCKS, seed=1)
    with pytest.raises(OutputError, match=r"model\.sha256 was"):
        run(other, tmp_path / "out", text)


def test_an_error_before_anything_was_saved_leaves_no_folder(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: object, **kwargs: object) -> None:
        raise Stopped

    monkeypatch.setattr(passes.writer, "write_shard", fails)
    with pytest.raises(Stopped):
        run(model, tmp_path / "out", text)
    assert sorted(path.name for path in tmp_path.iterdir()) == [text.name]


def test_a_write_cut_short_leaves_no_shard_that_looks_done(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(model, tmp_path / "whole", text)
    original = passes.writer.save_file

    def cut_off(tensors, path, **kwargs):  # type: ignore[no-untyped-def]
        original(tensors, path, **kwargs)
        if "00003-of" in str(path):
            path.write_bytes(path.read_bytes()[:1000])
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(passes.writer, "save_file", cut_off)
    with pytest.raises(OSError, match="No space left"):
        run(model, tmp_path / "out", text)
    shards = sorted(path.name for path in (tmp_path / "out.partial").glob("*.safetensors*"))
    assert shards == ["model-00001-of-00004.safetensors", "model-00002-of-00004.safetensors"]
    monkeypatch.undo()
    run(model, tmp_path / "out", text)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


@pytest.mark.parametrize("shard", [1, 2, 3])
def test_a_damaged_shard_is_made_again_or_named_but_never_taken(
    model: Path, text: Path, tmp_path: Path, shard: int
) -> None:
    run(model, tmp_path / "whole", text)
    with pytest.raises(Stopped):
        run(model, tmp_path / "out", text, progress=StopAfter(2))
    damaged = tmp_path / "out.partial" / f"model-0000{shard}-of-00004.safetensors"
    damaged.write_bytes(damaged.read_bytes()[: damaged.stat().st_size // 2])
    try:
        run(model, tmp_path / "out", text)
    except CtpError as error:
        assert damaged.name in error.message
        assert error.hint
        assert not (tmp_path / "out").exists()
    else:
        assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
