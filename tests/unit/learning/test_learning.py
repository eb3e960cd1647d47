"""Learning a prompt: the loss and its gradient, the order of data, resuming, and that it helps."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_model

from ctp_cli.data.sources import load_text
from ctp_cli.data.windows import token_ids, windows
from ctp_cli.errors import InputError, OutputError
from ctp_cli.models.head import Scorer
from ctp_cli.models.loading import load_model, load_tokenizer
from ctp_cli.models.resolve import resolve_model
from ctp_cli.progress import SilentProgress
from ctp_cli.prompts.file import load_prompt
from ctp_cli.prompts.training import LearningSettings, PromptedLoss, batch_at, learning_rate_at
from ctp_cli.recipe import LearnSection
from ctp_cli.stages.learn import LearnReport, learn_prompt

SECTION: dict[str, Any] = {
    "tokens": 8, "steps": 12, "batch_size": 4, "seqlen": 48, "validate_every": 4, "validation_windows": 6,
    "text": "pydoc:train", "validation": "pydoc:validation", "learning_rate": 3e-2,
}  # fmt: skip


@pytest.mark.parametrize("family", ["llama", "opt350", "gpt2", "gemma"])
def test_loss_and_gradient_equal_transformers(family: str, tmp_path: Path) -> None:
    """Chunked, prompt positions skipped, gradient made in the forward pass: against plain autograd on all logits."""
    model = load_model(tiny_model(family, tmp_path / family))
    ids = torch.randint(5, 300, (3, 300), generator=torch.Generator().manual_seed(0))  # 897 positions: several chunks
    prompt = torch.randn(6, model.get_input_embeddings().weight.shape[1], generator=torch.Generator().manual_seed(1))
    module = PromptedLoss(model, prompt)
    loss = module(ids)
    loss.backward()
    plain = prompt.clone().requires_grad_()
    text = model.get_input_embeddings()(ids)
    logits = model(inputs_embeds=torch.cat([plain[None].expand(3, -1, -1), text], 1), use_cache=False).logits
    expected = torch.nn.functional.cross_entropy(logits[:, 6:-1].flatten(0, 1).float(), ids[:, 1:].flatten())
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(module.prompt_PD.grad, plain.grad, rtol=1e-3, atol=1e-6)
    assert [name for name, _ in module.named_parameters()] == ["prompt_PD"]  # nothing else can be trained


def test_all_logits_are_never_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(tiny_model("llama", tmp_path / "m"))
    largest = 0
    original = torch.nn.functional.linear

    def watch(x: torch.Tensor, weight: torch.Tensor, *rest: Any) -> torch.Tensor:
        nonlocal largest
        if weight is model.get_output_embeddings().weight:
            largest = max(largest, x.shape[0])
        return original(x, weight, *rest)

    scorer = Scorer(model)
    monkeypatch.setattr(torch.nn.functional, "linear", watch)
    ids = torch.randint(5, 300, (4, 200))
    scorer.nll(ids, input_ids=ids)
    assert 0 < largest <= 256 < 4 * 199


def test_an_epoch_takes_every_window_once_and_the_next_another_order() -> None:
    ids = torch.arange(1000)
    epochs = []
    for epoch in range(2):
        rows = torch.cat([batch_at(ids, 10, step=epoch * 33 + i, batch_size=3, seed=5) for i in range(33)])
        starts = rows[:, 0].tolist()
        assert len(set(starts)) == 99 and len({start % 10 for start in starts}) == 1
        assert torch.equal(rows, rows[:, :1] + torch.arange(10))
        epochs.append(starts)
    assert epochs[0] != epochs[1]
    assert torch.equal(batch_at(ids, 10, step=7, batch_size=3, seed=5), batch_at(ids, 10, step=7, batch_size=3, seed=5))
    assert not torch.equal(
        batch_at(ids, 10, step=7, batch_size=3, seed=5), batch_at(ids, 10, step=7, batch_size=3, seed=6)
    )


def test_learning_rate_rises_then_falls_to_zero() -> None:
    settings = LearningSettings(100, 1, 1, 1.0, 0.1, 1.0, 0.0, 10, 10, 0)
    rates = [learning_rate_at(step, 100, settings) for step in range(101)]
    assert rates[9] == 1.0 and rates[0] == pytest.approx(0.1) and rates[100] == 0
    assert all(a < b for a, b in itertools.pairwise(rates[:10]))
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))


class StopAfter(SilentProgress):
    """Interrupts like Ctrl-C, after so many steps."""

    def __init__(self, steps: int) -> None:
        self.left, self.running = steps, False

    def start(self, description: str, total: int) -> None:
        self.running = description == "learn"

    def advance(self, units: int = 1, note: str = "") -> None:
        if self.running and note:
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt


def run(model: Path, output: Path, progress: Any = None, **changes: Any) -> LearnReport:
    section = LearnSection(**(SECTION | changes))
    return learn_prompt(section, model=resolve_model(str(model)), output=output, progress=progress or SilentProgress())


@pytest.mark.parametrize("stop", [1, 5, 11])
def test_interrupted_learning_gives_the_same_bits(stop: int, compressed: Path, tmp_path: Path) -> None:
    whole = run(compressed, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(compressed, tmp_path / "cut", StopAfter(stop))
    assert not (tmp_path / "cut").exists() and (tmp_path / "cut.partial").exists()
    resumed = run(compressed, tmp_path / "cut")
    assert resumed.prompt_file.read_bytes() == whole.prompt_file.read_bytes()
    assert resumed.history == whole.history
    assert not (tmp_path / "cut.partial").exists()


def test_other_settings_do_not_go_on_from_unfinished_work(compressed: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(compressed, tmp_path / "p", StopAfter(5))
    with pytest.raises(OutputError, match=r"learn\.seed was 0, is 1"):
        run(compressed, tmp_path / "p", seed=1)


def test_a_prompt_helps_on_text_that_did_not_choose_it(trained: Path, tmp_path: Path) -> None:
    """At 87.5% + 3 bit, where even so small a model has lost a lot."""
    from ctp_cli.evaluation.perplexity import compare, perplexity
    from ctp_cli.recipe import CompressSection
    from ctp_cli.stages.compress import compress

    section = CompressSection(sparsity=0.875, bits=3, calibration="pydoc:train", windows=16, seqlen=128)
    compress(section, model=resolve_model(str(trained)), output=tmp_path / "small")
    report = run(tmp_path / "small", tmp_path / "p", steps=80, batch_size=8, seqlen=64, validate_every=20)
    prompt = load_prompt(report.prompt_file).embeddings
    assert prompt.dtype == torch.float32 and report.best_perplexity < report.start_perplexity
    text = load_text("pydoc:test", default_part="test")
    ids = windows(token_ids(text, load_tokenizer(trained)), 64, most=128, text=text)
    small = load_model(tmp_path / "small")
    full, pruned = perplexity(load_model(trained), ids), perplexity(small, ids)
    prompted = perplexity(small, ids, prompt_PD=prompt)
    assert pruned.value() > 1.3 * full.value()
    difference = compare(pruned, prompted)
    assert difference.measurable and difference.mean < 0


def test_the_selection_text_must_be_another(compressed: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="text learned from"):
        run(compressed, tmp_path / "p", validation="pydoc:train")
    assert not list(tmp_path.iterdir())


def test_a_time_limit_becomes_a_number_of_steps(compressed: Path, tmp_path: Path) -> None:
    report = run(compressed, tmp_path / "p", steps=None, max_time=1.0)
    assert report.steps >= 1 and report.history[-1][0] == report.steps
