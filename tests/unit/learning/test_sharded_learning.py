"""A frozen model sharded over processes: the prompt of whole models, in half the memory, resumable and stoppable."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from learning_runs import run
from safetensors.torch import load_file
from sharded_runs import cases
from test_processes import command

from ctp_cli.errors import RecipeError


def _torchrun(script: Path, *arguments: Path) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [*launcher, str(script), *map(str, arguments)], capture_output=True, text=True, timeout=600, check=False
    )


@pytest.mark.slow
def test_a_sharded_model_gives_the_same_bits_in_half_the_memory(
    trained: Path, compressed: Path, tmp_path: Path
) -> None:
    done = _torchrun(Path(__file__).with_name("sharded_runs.py"), trained, compressed, tmp_path)
    assert done.returncode == 0, done.stderr
    for name, (model, changes) in cases(trained, compressed).items():
        whole, sharded = (tmp_path / where / name for where in ("whole", "sharded"))
        held = [json.loads((p / "ctp.json").read_text())["weight_bytes_per_process"] for p in (whole, sharded)]
        assert 0.5 <= held[1] / held[0] < 0.51  # rows that cannot be halved are padded
        assert (whole / "prompt.safetensors").read_bytes() == (sharded / "prompt.safetensors").read_bytes()
        if changes.get("dtype") == "bfloat16":
            continue  # halves of a batch are rounded otherwise than all of it, by more than a tolerance would say
        alone = run(model, tmp_path / "alone" / name, **changes).prompt_file
        found, expected = (next(iter(load_file(file).values())) for file in (sharded / "prompt.safetensors", alone))
        # each process means over its own two sequences: the same sums in another order
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def _workers(launcher: int) -> list[int]:
    """The processes that torchrun started, in the order of their ranks."""
    found = {}
    for status in Path("/proc").glob("[0-9]*/environ"):
        try:
            variables = dict(v.split("=", 1) for v in status.read_text().split("\0") if "=" in v)
            parent = int(status.with_name("stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, UnicodeDecodeError):
            continue
        if parent == launcher and "RANK" in variables:
            found[int(variables["RANK"])] = int(status.parent.name)
    return [found[rank] for rank in sorted(found)]


@pytest.mark.slow
def test_a_killed_process_ends_the_job_with_one_message_and_it_goes_on(trained: Path, tmp_path: Path) -> None:
    output = tmp_path / "cut"
    running = subprocess.Popen([*command(2, trained, output), "--shard"], stderr=subprocess.PIPE, text=True)
    state = tmp_path / "cut.partial" / "state.safetensors"
    deadline = time.monotonic() + 240
    while not state.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(_workers(running.pid)[1], signal.SIGKILL)
    stderr = running.communicate(timeout=120)[1]
    assert running.returncode != 0 and state.exists() and not output.exists()
    assert stderr.count("error:") == 1 and "another process of this job has ended" in stderr, stderr
    assert "a bug in ctp" not in stderr
    whole = subprocess.run([*command(2, trained, tmp_path / "whole"), "--shard"], capture_output=True, check=False)
    done = subprocess.run([*command(2, trained, output), "--shard"], capture_output=True, text=True, check=False)
    assert done.returncode == whole.returncode == 0, done.stderr
    again, expected = ((folder / "prompt.safetensors").read_bytes() for folder in (output, tmp_path / "whole"))
    assert again == expected


def test_one_process_cannot_shard(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"learn\.shard: this is one process") as caught:
        run(trained, tmp_path / "p", shard=True)
    assert "--nproc-per-node 2" in caught.value.hint
    assert not list(tmp_path.iterdir())
