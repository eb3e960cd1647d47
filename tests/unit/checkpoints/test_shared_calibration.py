"""Calibration shared by several processes: the checkpoint that one makes, but for the order of sums."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from ctp_cli.artifact import manifest_of
from ctp_cli.models.loading import load_model

COMPRESS = ("--sparsity", "0.5", "--bits", "4", "--group-size", "32", "--calibration", "pydoc:train", "--windows", "9",
            "--seqlen", "128", "--device", "cpu")  # fmt: skip


def _command(processes: int, model: Path, output: Path, *more: str) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return [sys.executable, *(launcher if processes > 1 else ()), "-m", "ctp_cli", "compress", str(model), *COMPRESS,
            *more, "-o", str(output)]  # fmt: skip


def _run(*given: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(_command(*given), capture_output=True, text=True, timeout=300, check=False)  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [(), ("--target", "full"), ("--no-true-sequential", "--pruner", "sparsegpt"), ("--allocation", "owl")],
)
def test_two_processes_make_the_checkpoint_of_one(trained: Path, tmp_path: Path, more: tuple[str, ...]) -> None:
    for processes in (1, 2):
        done = _run(processes, trained, tmp_path / str(processes), *more)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("compressed ") == 1  # said once, by the main process
    manifests = [manifest_of(tmp_path / name) or {} for name in "12"]
    assert [m["processes"] for m in manifests] == [1, 2]
    sparsities = [m["results"]["block_sparsities"] for m in manifests]
    assert sparsities[0] == (pytest.approx(sparsities[1], abs=1e-4) if "owl" in more else None)
    layers = [m["results"]["layers"] for m in manifests]
    for alone, shared in zip(*layers, strict=True):
        assert alone["calibration_tokens"] == shared["calibration_tokens"] == 9 * 128
        assert shared["relative_error"] == pytest.approx(alone["relative_error"], rel=0.05)
    # Sums in another order: a code or a place in the mask that was nearly even may go the other way, later ones follow
    # it, and later layers see other inputs. Where all inputs are still the same, hardly any does.
    one, two = (dict(load_model(tmp_path / name).named_parameters()) for name in "12")
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        first = f"model.layers.0.self_attn.{name}.weight"
        assert torch.isclose(one[first], two[first], rtol=1e-4, atol=0).float().mean() > 0.99, first


@pytest.mark.slow
def test_a_dead_process_ends_the_job_which_goes_on_afterwards(trained: Path, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert _run(2, trained, whole).returncode == 0
    running = subprocess.Popen(_command(2, trained, cut), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "cut.partial").glob("*.layers")) and time.monotonic() < deadline:
        time.sleep(0.01)
    followers = subprocess.run(["pgrep", "-f", f"ctp_cli.*{cut}$"], capture_output=True, text=True, check=True)
    ranks = {pid: Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") for pid in followers.stdout.split()}
    victim = next(pid for pid, variables in ranks.items() if b"RANK=1" in variables)
    subprocess.run(["kill", "-KILL", victim], check=True)
    _, said = running.communicate(timeout=120)
    assert running.returncode != 0 and not cut.exists()
    assert said.count("another process of this job has ended") == 1
    done = _run(2, trained, cut)
    assert done.returncode == 0, done.stderr
    for file in whole.glob("*.safetensors"):
        assert file.read_bytes() == (cut / file.name).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "message"),
    [(("--windows", "1"), "1 windows cannot be shared by 2 processes"), (("--tune-windows", "4"), "one process")],
)
def test_what_cannot_be_shared_is_refused(trained: Path, tmp_path: Path, more: tuple[str, ...], message: str) -> None:
    done = _run(2, trained, tmp_path / "no", *more)
    assert done.returncode != 0
    assert done.stderr.count(message) == 1
    assert not list(tmp_path.iterdir())


def test_one_process_alone_needs_no_others() -> None:
    from ctp_cli.models.processes import ALONE

    tensor = torch.arange(3.0)
    ALONE.add_up(tensor)
    ALONE.tell(tensor)
    assert torch.equal(tensor, torch.arange(3.0)) and ALONE.total(5) == ALONE.told(5) == 5 and ALONE.is_main
