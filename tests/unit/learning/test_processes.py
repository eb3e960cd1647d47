"""Learning in several processes: the same prompt as in one, and the same bits when it goes on after a kill."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from ctp_cli.prompts.file import load_prompt

LEARN = ("--tokens", "8", "--steps", "48", "--batch-size", "4", "--seqlen", "48", "--validate-every", "4",
         "--validation-windows", "6", "--text", "pydoc:train", "--validation", "pydoc:validation", "--lr", "3e-2",
         "--device", "cpu", "-q")  # fmt: skip


def command(processes: int, model: Path, output: Path) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return [sys.executable, *(launcher if processes > 1 else ()), "-m", "ctp_cli", "learn", str(model), *LEARN,
            "-o", str(output)]  # fmt: skip


def _run(processes: int, model: Path, output: Path, *more: str) -> subprocess.CompletedProcess[str]:
    whole = [*command(processes, model, output), *more]
    return subprocess.run(whole, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.slow
def test_two_processes_learn_what_one_learns_and_go_on_after_a_kill(compressed: Path, tmp_path: Path) -> None:
    for processes in (1, 2):
        done = _run(processes, compressed, tmp_path / str(processes))
        assert done.returncode == 0, done.stderr
        # said once, by the main process
        assert done.stdout.count("learned 8 prompt tokens") == 1
        assert done.stdout.splitlines()[-1] == str(tmp_path / str(processes) / "prompt.safetensors")
    assert (load_prompt(tmp_path / "1").metadata.steps or 0) > 0  # or equal prompts would say nothing
    one, two = (load_prompt(tmp_path / name).embeddings for name in "12")
    # the same sums in another order, through 48 steps of AdamW
    torch.testing.assert_close(one, two, rtol=0, atol=2e-3)

    state = tmp_path / "cut.partial" / "state.safetensors"
    running = subprocess.Popen(command(2, compressed, tmp_path / "cut"), stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not state.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    # the workers have sessions of their own: found by the output they were given
    subprocess.run(["pkill", "-KILL", "-f", str(tmp_path / "cut")], check=True)
    running.wait()
    assert state.exists() and not (tmp_path / "cut").exists()
    done = _run(2, compressed, tmp_path / "cut")
    assert done.returncode == 0, done.stderr
    again, whole = ((tmp_path / name / "prompt.safetensors").read_bytes() for name in ("cut", "2"))
    assert again == whole


@pytest.mark.slow
def test_a_batch_that_cannot_be_shared_is_refused(compressed: Path, tmp_path: Path) -> None:
    done = _run(2, compressed, tmp_path / "no", "--batch-size", "3")
    assert done.returncode != 0
    assert done.stderr.count("3 sequences cannot be shared evenly by 2 processes") == 1
    assert not list(tmp_path.iterdir())
