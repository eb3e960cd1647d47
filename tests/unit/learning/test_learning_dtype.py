"""The dtype of the frozen model while a prompt is learned: how it is chosen, kept on resuming, and written down."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from learning_runs import Listening, StopAfter, run
from tiny_models import tiny_model

from ctp_cli import memory
from ctp_cli.errors import OutputError
from ctp_cli.models import precision
from ctp_cli.prompts.file import load_prompt


@pytest.fixture
def stored_in_16_bits(tmp_path: Path) -> Path:
    return tiny_model("llama_tied_gqa", tmp_path / "model", dtype=torch.bfloat16)


@pytest.fixture
def processor(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """One without 16-bit products and with as much free memory as the test says."""
    it = SimpleNamespace(available=1 << 30, slow=True)
    monkeypatch.setattr(precision, "is_slow", lambda x: it.slow and x.dtype != torch.float32)
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: it)
    return it


def _dtype_of(output: Path) -> str | None:
    written = json.loads((output / "ctp.json").read_text())["dtype"]
    assert load_prompt(output).metadata.dtype == written
    return str(written)


def test_auto_widens_where_that_is_faster_and_fits(
    stored_in_16_bits: Path, processor: SimpleNamespace, tmp_path: Path
) -> None:
    listening = Listening()
    auto = run(stored_in_16_bits, tmp_path / "auto", listening)
    wide = run(stored_in_16_bits, tmp_path / "wide", dtype="float32")
    stored = run(stored_in_16_bits, tmp_path / "stored", dtype="checkpoint")
    assert [_dtype_of(tmp_path / name) for name in ("auto", "wide", "stored")] == ["float32", "float32", "bfloat16"]
    assert auto.prompt_file.read_bytes() == wide.prompt_file.read_bytes()
    assert auto.history == wide.history != stored.history
    assert sum("weights are held in float32" in line for line in listening.said) == 1
    changes: dict[str, Any] = {"steps": 1, "validate_every": 1}
    AcceleratorState._reset_state()  # accelerate has one precision per process
    run(stored_in_16_bits, tmp_path / "mixed", mixed_precision="bf16", **changes)
    AcceleratorState._reset_state()
    processor.slow = False
    run(stored_in_16_bits, tmp_path / "fast", **changes)
    # 32 bits of each of 94,528 parameters are 378,112 bytes
    processor.slow, processor.available = True, 2 * 378_111
    run(stored_in_16_bits, tmp_path / "short", **changes)
    processor.available = 2 * 378_112
    run(stored_in_16_bits, tmp_path / "enough", **changes)
    found = [_dtype_of(tmp_path / name) for name in ("mixed", "fast", "short", "enough")]
    assert found == ["bfloat16", "bfloat16", "bfloat16", "float32"]


def test_a_checkpoint_in_float32_can_be_held_in_16_bits(tmp_path: Path) -> None:
    run(tiny_model("gpt2", tmp_path / "model"), tmp_path / "p", dtype="bfloat16", steps=1, validate_every=1)
    assert _dtype_of(tmp_path / "p") == "bfloat16"


def test_work_that_goes_on_keeps_the_dtype_chosen_when_it_began(
    stored_in_16_bits: Path, processor: SimpleNamespace, tmp_path: Path
) -> None:
    whole = run(stored_in_16_bits, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(stored_in_16_bits, tmp_path / "cut", StopAfter(5))
    with pytest.raises(OutputError, match=r"learn\.dtype was auto, is bfloat16"):
        run(stored_in_16_bits, tmp_path / "cut", dtype="bfloat16")
    processor.available = 0
    resumed = run(stored_in_16_bits, tmp_path / "cut")
    assert resumed.prompt_file.read_bytes() == whole.prompt_file.read_bytes()


def test_other_work_that_was_begun_decides_no_dtype(
    stored_in_16_bits: Path, processor: SimpleNamespace, tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(stored_in_16_bits, tmp_path / "cut", StopAfter(5), dtype="bfloat16")
    with pytest.raises(OutputError, match=r"learn\.dtype was bfloat16, is auto"):
        run(stored_in_16_bits, tmp_path / "cut")
    run(stored_in_16_bits, tmp_path / "cut", force=True, seed=5)
    assert _dtype_of(tmp_path / "cut") == "float32"
