"""Blocks that are pruned to different sparsities: what is in the checkpoint, and work that goes on."""

import json
from pathlib import Path

import pytest
from compressed import StopAfter, Stopped, calibration_text, files_of, run, stored_tensors
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model

from ctp_cli.errors import OutputError
from ctp_cli.models.blocks import find_blocks
from ctp_cli.models.loading import dense_skeleton, load_config
from ctp_cli.recipe import CompressSection
from ctp_cli.stages import passes
from ctp_cli.stages.estimate import Estimate, estimate
from ctp_cli.stages.plan import Job

BLOCKS = 3
OWL = {"allocation": "owl", "sparsity": 0.7}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its second block has four strong inputs, too many for outliers: they raise its mean."""
    path = tiny_model("llama_tied_gqa", tmp_path_factory.mktemp("models") / "llama", num_hidden_layers=BLOCKS)
    tensors = load_file(path / "model.safetensors")
    for name in ("q_proj", "k_proj"):
        tensors[f"model.layers.1.self_attn.{name}.weight"][:, :4] *= 30
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return calibration_text(tmp_path)


def zeros_of_blocks(folder: Path) -> list[tuple[int, int]]:
    """Zeros and weights of each block's linear layers, counted in the file."""
    counts = [(0, 0)] * BLOCKS
    for name, tensor in stored_tensors(folder).items():
        if name.startswith("model.layers.") and tensor.dim() == 2:
            block = int(name.split(".")[2])
            zeros, weights = counts[block]
            counts[block] = (zeros + int((tensor == 0).sum()), weights + tensor.numel())
    return counts


@pytest.mark.parametrize("pruner", ["alternating", "sparsegpt", "wanda", "magnitude"])
def test_blocks_differ_and_the_whole_is_as_sparse_as_asked(
    pruner: str, model: Path, text: Path, tmp_path: Path
) -> None:
    report = run(model, tmp_path / "out", text, bits=None, format="dense", pruner=pruner, **OWL)
    wanted = json.loads((tmp_path / "out" / "ctp.json").read_text())["results"]["block_sparsities"]
    assert report.block_sparsities == tuple(wanted)
    counts = zeros_of_blocks(tmp_path / "out")
    shares = [zeros / weights for zeros, weights in counts]
    # a row of 64 inputs loses a whole number of them
    assert shares == pytest.approx(wanted, abs=0.5 / 64)
    assert sum(z for z, _ in counts) / sum(w for _, w in counts) == pytest.approx(0.7, abs=0.5 / 64)
    assert max(shares) - min(shares) == pytest.approx(0.16, abs=1 / 64)
    assert max(range(BLOCKS), key=shares.__getitem__) == 1
    assert not list((tmp_path / "out").glob("sparsities*"))


def test_uniform_says_nothing_of_blocks(model: Path, text: Path, tmp_path: Path) -> None:
    assert run(model, tmp_path / "out", text).block_sparsities is None


# outliers of three blocks, three blocks pruned (and quantized); tuned: then two windows, three blocks, two windows
@pytest.mark.parametrize(
    ("done", "settings"),
    [
        (2, {}),
        (3, {}),
        (4, {}),
        (5, {"max_memory": "in files"}),
        (2, {"tune_windows": 2}),
        (5, {"tune_windows": 2}),
        (8, {"tune_windows": 2}),
        (9, {"tune_windows": 2}),
    ],
)
def test_it_goes_on_to_the_same_bytes_and_measures_once(
    done: int, settings: dict[str, object], model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if settings.get("max_memory"):
        monkeypatch.setattr(Estimate, "in_memory_bytes", property(lambda self: 10**15))
        settings = {"max_memory": "100GB"}
    run(model, tmp_path / "whole", text, **OWL, **settings)
    with pytest.raises(Stopped):
        run(model, tmp_path / "out", text, progress=StopAfter(done), **OWL, **settings)
    measured: list[int] = []
    original = passes.outlier_share

    def counting(block, *args):  # type: ignore[no-untyped-def]
        measured.append(block.index)
        return original(block, *args)

    monkeypatch.setattr(passes, "outlier_share", counting)
    run(model, tmp_path / "out", text, **OWL, **settings)
    assert measured == ([] if done > BLOCKS else list(range(BLOCKS)))
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
    wanted = [
        json.loads((tmp_path / x / "ctp.json").read_text())["results"]["block_sparsities"] for x in ("out", "whole")
    ]
    assert wanted[0] == wanted[1]


def test_another_allocation_is_other_work(model: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        run(model, tmp_path / "out", text, progress=StopAfter(1), sparsity=0.7)
    with pytest.raises(OutputError, match=r"compress\.allocation was uniform, is owl"):
        run(model, tmp_path / "out", text, **OWL)


def test_the_estimate_counts_the_pass_that_finds_outliers(model: Path) -> None:
    network, _ = dense_skeleton(load_config(model))
    blocks = find_blocks(network)
    sections = [CompressSection(sparsity=0.7, seqlen=32, allocation=how) for how in ("uniform", "owl")]
    even, owl = (
        estimate(Job.plan(section, network, blocks), network, blocks, windows=64, device="cpu") for section in sections
    )
    weights = sum(layer.weight_OI.numel() for block in blocks for layer in block.layers)
    assert owl.operations - even.operations == 2 * weights * 8 * 32
    assert 2 * owl.reads_bytes == 3 * even.reads_bytes
    assert owl.checkpoint_bytes == even.checkpoint_bytes
