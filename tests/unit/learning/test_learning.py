"""Learning a prompt: the loss and its gradient, the order of data, resuming, and that it helps."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from learning_runs import Listening, StopAfter, run
from tiny_models import VOCAB_SIZE, tiny_model

from ctp_cli.data.batches import batch_at
from ctp_cli.data.sources import load_text
from ctp_cli.data.windows import token_ids, windows
from ctp_cli.errors import CtpError, InputError, OutputError, RecipeError, UnsupportedModelError
from ctp_cli.evaluation.perplexity import compare, perplexity
from ctp_cli.models import head
from ctp_cli.models.head import Scorer, SoftTargets
from ctp_cli.models.loading import load_model, load_tokenizer
from ctp_cli.models.resolve import resolve_model
from ctp_cli.models.sharding import Frozen
from ctp_cli.prompts import training
from ctp_cli.prompts.file import load_prompt
from ctp_cli.prompts.losses import SoftPromptLoss
from ctp_cli.prompts.prefix import prefix_of
from ctp_cli.prompts.training import learning_rate_at
from ctp_cli.recipe import CompressSection, StitchSection
from ctp_cli.stages import learn as learn_stage
from ctp_cli.stages.compress import compress
from ctp_cli.stages.learn import LearnReport
from ctp_cli.stages.stitch import stitch


@pytest.mark.parametrize("family", ["llama", "llama_tied_gqa", "opt350", "gpt2", "gemma", "bloom", "gpt_neox", "phi"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_loss_and_gradient_equal_transformers(
    family: str, device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunked, prompt positions skipped, gradient made in the forward pass: against plain autograd on all logits."""
    if device == "cuda":  # the way of GPUs, taken here
        monkeypatch.setattr(SoftPromptLoss, "_behind_prefix", SoftPromptLoss._in_front)
    model = load_model(tiny_model(family, tmp_path / family))
    ids = torch.randint(5, 300, (3, 300), generator=torch.Generator().manual_seed(0))  # 897 positions: several chunks
    prompt = torch.randn(6, model.get_input_embeddings().weight.shape[1], generator=torch.Generator().manual_seed(1))
    module = SoftPromptLoss([Frozen(model)], prompt)
    loss = module(ids, 0, None)
    loss.backward()
    plain = prompt.clone().requires_grad_()
    text = model.get_input_embeddings()(ids)
    logits = model(inputs_embeds=torch.cat([plain[None].expand(3, -1, -1), text], 1), use_cache=False).logits
    expected = torch.nn.functional.cross_entropy(logits[:, 6:-1].flatten(0, 1).float(), ids[:, 1:].flatten())
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(module.prompt.grad, plain.grad, rtol=1e-3, atol=1e-6)
    assert [name for name, _ in module.named_parameters()] == ["prompt"]  # nothing else can be trained


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
    monkeypatch.setattr(head, "_CHUNK_BYTES", 100 * 4 * model.config.vocab_size)
    monkeypatch.setattr(torch.nn.functional, "linear", watch)
    ids = torch.randint(5, 300, (4, 200))
    scorer.nll(ids, input_ids=ids)
    assert largest == 100


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
    rates = [learning_rate_at(step, 100, peak=1.0, warmup_share=0.1) for step in range(101)]
    assert rates[9] == 1.0 and rates[0] == pytest.approx(0.1) and rates[100] == 0
    assert all(a < b for a, b in itertools.pairwise(rates[:10]))
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))


@pytest.mark.parametrize(("stop", "method"), [(1, "soft-prompt"), (5, "soft-prompt"), (11, "kv-prefix")])
def test_interrupted_learning_gives_the_same_bits(stop: int, method: str, compressed: Path, tmp_path: Path) -> None:
    whole = run(compressed, tmp_path / "whole", method=method)
    with pytest.raises(KeyboardInterrupt):
        run(compressed, tmp_path / "cut", StopAfter(stop), method=method)
    assert not (tmp_path / "cut").exists() and (tmp_path / "cut.partial").exists()
    resumed = run(compressed, tmp_path / "cut", method=method)
    assert resumed.prompt_file.read_bytes() == whole.prompt_file.read_bytes()
    assert resumed.history == whole.history
    assert not (tmp_path / "cut.partial").exists()


def test_the_scale_of_float16_gradients_survives_an_interruption(
    compressed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU in float16, with a scale that grows every three steps."""
    real, scales = learn_stage.Accelerator, []

    def scaling(*given: Any, **options: Any) -> Any:
        accelerator = real(*given, **options)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=3)
        return accelerator

    update = training._Loop._update

    def watched(loop: Any, *rest: Any) -> float:
        scales.append(loop.accelerator.scaler.get_scale())
        return update(loop, *rest)

    monkeypatch.setattr(learn_stage, "Accelerator", scaling)
    monkeypatch.setattr(training._Loop, "_update", watched)
    whole = run(compressed, tmp_path / "whole")
    assert scales[::3] == [4.0, 8.0, 16.0, 32.0]
    with pytest.raises(KeyboardInterrupt):
        run(compressed, tmp_path / "cut", StopAfter(5))
    before, scales[:] = scales[:], []
    resumed = run(compressed, tmp_path / "cut")
    assert scales == before[12 - len(scales) : 12]
    assert resumed.prompt_file.read_bytes() == whole.prompt_file.read_bytes()


def test_other_settings_do_not_go_on_from_unfinished_work(compressed: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(compressed, tmp_path / "p", StopAfter(5))
    with pytest.raises(OutputError, match=r"learn\.seed was 0, is 1"):
        run(compressed, tmp_path / "p", seed=1)


@pytest.fixture(scope="module")
def ruined(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """87.5% + 3 bit, where even so small a model has lost a lot."""
    output = tmp_path_factory.mktemp("ruined") / "small"
    section = CompressSection(sparsity=0.875, bits=3, calibration="pydoc:train", windows=16, seqlen=128)
    compress(section, model=resolve_model(str(trained)), output=output)
    return output


@pytest.mark.parametrize("method", ["soft-prompt", "kv-prefix"])
def test_a_prompt_helps_on_text_that_did_not_choose_it(
    method: str, trained: Path, ruined: Path, tmp_path: Path
) -> None:
    changes = {"steps": 80, "batch_size": 8, "seqlen": 64, "validate_every": 20, "method": method}
    report = run(ruined, tmp_path / "p", **changes)
    prompt = load_prompt(report.prompt_file)
    assert prompt.metadata.kind == method and report.best_perplexity < report.start_perplexity
    text = load_text("pydoc:test", default_part="test")
    ids = windows(token_ids(text, load_tokenizer(trained)), 64, most=128, text=text)
    small = load_model(ruined)
    full, pruned = perplexity(load_model(trained), ids), perplexity(small, ids)
    prompted = perplexity(small, ids, prefix=prefix_of(prompt, small, name="small", bos_id=None))
    assert pruned.value() > 1.3 * full.value()
    difference = compare(pruned, prompted)
    assert difference.measurable and difference.mean < 0


def test_one_prompt_for_several_compressions(trained: Path, compressed: Path, ruined: Path, tmp_path: Path) -> None:
    """Steps take turns; perplexity is the geometric mean; the prompt says which compressions it was learned on."""
    both = run([compressed, ruined], tmp_path / "both", steps=4)
    alone = [run(path, tmp_path / path.name, steps=4) for path in (compressed, ruined)]
    expected = (alone[0].start_perplexity * alone[1].start_perplexity) ** 0.5
    assert both.start_perplexity == pytest.approx(expected, rel=1e-5)
    sparsities = [one["sparsity"] for one in json.loads(load_prompt(both.prompt_file).metadata.compression or "")]
    assert sparsities == [0.5, 0.875]
    learned = [load_prompt(report.prompt_file).embeddings for report in (both, *alone)]
    assert not torch.equal(learned[0], learned[1]) and not torch.equal(learned[0], learned[2])
    stranger = tiny_model("llama", tmp_path / "stranger")
    with pytest.raises(InputError, match="is no compression of the model that"):
        run([compressed, stranger], tmp_path / "no")
    assert not (tmp_path / "no").exists() and not (tmp_path / "no.partial").exists()


def test_learning_starts_where_it_is_told_to(compressed: Path, tmp_path: Path) -> None:
    def perplexity_of(**changes: Any) -> LearnReport:
        return run(compressed, tmp_path / str(len(list(tmp_path.iterdir()))), steps=4, **changes)

    first = perplexity_of()
    # the perplexity it ended with is the one the next starts from, as rows and as their keys and values
    for method in ("soft-prompt", "kv-prefix"):
        again = perplexity_of(init=str(first.prompt_file), method=method)
        assert again.start_perplexity == pytest.approx(first.best_perplexity, rel=1e-4)
    worded = perplexity_of(init="text:list of", learning_rate=1e-9)
    table = load_model(compressed).get_input_embeddings().weight
    ids = load_tokenizer(compressed)("list of", add_special_tokens=False)["input_ids"]
    assert len(ids) < 8
    expected = table[(ids * 8)[:8]].float()
    torch.testing.assert_close(load_prompt(worded.prompt_file).embeddings, expected, atol=1e-6, rtol=0)
    prefix = perplexity_of(method="kv-prefix")
    with pytest.raises(InputError, match="is a kv-prefix, which has no rows"):
        perplexity_of(init=str(prefix.prompt_file))
    with pytest.raises(InputError, match="has 8 tokens, asked for are 9"):
        perplexity_of(init=str(first.prompt_file), tokens=9)
    with pytest.raises(InputError, match="without words"):
        perplexity_of(init="text:")


def test_the_selection_text_must_be_another(compressed: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="text learned from"):
        run(compressed, tmp_path / "p", validation="pydoc:train")
    assert not list(tmp_path.iterdir())


def test_a_time_limit_becomes_a_number_of_steps(compressed: Path, tmp_path: Path) -> None:
    report = run(compressed, tmp_path / "p", steps=None, max_time=1.0)
    assert report.steps >= 1 and report.history[-1][0] == report.steps


def test_a_machine_that_gets_slower_or_faster_does_fewer_or_more_steps(
    compressed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock that runs as the test says: a step first takes 1 s, then 4 s, or a quarter of a second."""
    update = training._Loop._update
    for then, least, most in ((4.0, 20, 40), (0.25, 150, 250)):
        now = [0.0]
        monkeypatch.setattr(training.time, "perf_counter", lambda now=now: now[0])

        def slow(loop: Any, step: int, *rest: Any, now: list[float] = now, then: float = then) -> float:
            now[0] += 1.0 if step < 8 else then
            return update(loop, step, *rest)

        monkeypatch.setattr(training._Loop, "_update", slow)
        report = run(compressed, tmp_path / str(then), steps=None, max_time=60.0, patience=1000)
        assert report.seconds == pytest.approx(60.0, abs=2 * then)
        assert least <= report.steps <= most
    with_both = run(compressed, tmp_path / "both", steps=30, max_time=60.0, patience=1000)
    assert with_both.steps == 30
    # 8 fast steps and 12 slow ones with each of three rates, at a quarter of a second: 33 s of 60 are left
    searched = run(compressed, tmp_path / "searched", steps=None, max_time=60.0, patience=1000, learning_rate="auto")
    assert searched.seconds == pytest.approx(60.0 - 3 * (8 + 12 * 0.25), abs=1.0)


def test_a_teacher_s_targets_are_mixed_with_the_labels(tmp_path: Path) -> None:
    """Loss and gradient against plain autograd over all logits, with every token of the vocabulary kept."""
    student, teacher = (load_model(tiny_model(f, tmp_path / f)) for f in ("llama", "llama_tied_gqa"))
    ids = torch.randint(5, 300, (3, 200), generator=torch.Generator().manual_seed(0))
    prompt = torch.randn(6, student.get_input_embeddings().weight.shape[1], generator=torch.Generator().manual_seed(1))
    tokens, probabilities = Scorer(teacher).likeliest(ids, 320)
    module = SoftPromptLoss([Frozen(student)], prompt)
    loss = module(ids, 0, SoftTargets(tokens, probabilities, 0.3))
    loss.backward()
    plain = prompt.clone().requires_grad_()
    embedded = torch.cat([plain.expand(3, -1, -1), student.get_input_embeddings()(ids)], 1)
    logits = student(inputs_embeds=embedded, use_cache=False).logits[:, 6:-1].flatten(0, 1)
    wanted = teacher(ids).logits[:, :-1].flatten(0, 1).softmax(-1)
    cross_entropy = torch.nn.functional.cross_entropy
    expected = 0.7 * cross_entropy(logits, ids[:, 1:].flatten()) + 0.3 * cross_entropy(logits, wanted)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(module.prompt.grad, plain.grad, rtol=1e-3, atol=1e-6)
    top = Scorer(teacher).likeliest(ids, 5)
    assert torch.equal(top[0], wanted.topk(5).indices.view(3, 199, 5))


def test_the_teacher_is_asked_once_and_its_answers_are_gone_afterwards(
    trained: Path, compressed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    likeliest = Scorer.likeliest
    monkeypatch.setattr(
        Scorer, "likeliest", lambda self, ids, k, **more: asked.append(len(ids)) or likeliest(self, ids, k, **more)
    )
    changes = {"teacher": str(trained), "teacher_tokens": 8}
    whole = run(compressed, tmp_path / "whole", **changes)
    assert asked == [4] * 12 and {p.name for p in (tmp_path / "whole").iterdir()} == {
        "ctp.json", "learning.png", "prompt.safetensors",
    }  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        run(compressed, tmp_path / "cut", StopAfter(5), **changes)
    asked.clear()
    resumed = run(compressed, tmp_path / "cut", **changes)
    assert not asked and resumed.prompt_file.read_bytes() == whole.prompt_file.read_bytes()
    plain = run(compressed, tmp_path / "plain")
    assert plain.prompt_file.read_bytes() != whole.prompt_file.read_bytes()
    stranger = tiny_model("gpt2", tmp_path / "stranger")
    other = load_tokenizer(stranger)
    other.add_tokens(["other"])
    other.save_pretrained(stranger)
    with pytest.raises(InputError, match="has another tokenizer"):
        run(compressed, tmp_path / "no", teacher=str(stranger))


def test_a_tracker_gets_every_step(compressed: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    report = run(compressed, tmp_path / "p", tracker="tensorboard")
    (events,) = (tmp_path / "p" / "logs").rglob("events.*")
    held = EventAccumulator(str(events)).Reload()
    assert [event.step for event in held.Scalars("loss")] == list(range(1, 13))
    validations = [(event.step, event.value) for event in held.Scalars("validation_perplexity")]
    assert validations == [(step, pytest.approx(value)) for step, value in report.history[1:]]
    with pytest.raises(RecipeError, match="tensorbord is unknown"):
        run(compressed, tmp_path / "q", tracker="tensorbord")


def test_the_learning_rate_can_be_searched_for(compressed: Path, tmp_path: Path) -> None:
    """What wins the search is what would win it by hand, and the search leaves no trace in what is learned."""
    listening = Listening()
    found = run(compressed, tmp_path / "found", listening, learning_rate="auto")
    lines = [line.split() for line in listening.said if line.startswith("learning")]
    values = {float(words[2].rstrip(":")): float(words[5]) for words in lines}
    assert list(values) == [0.01, 0.003, 0.03]
    best = min(values, key=lambda rate: values[rate])
    assert json.loads((tmp_path / "found" / "ctp.json").read_text())["results"]["learning_rate"] == best
    by_hand = run(compressed, tmp_path / "by-hand", learning_rate=best)
    assert found.history == by_hand.history
    assert torch.equal(*(load_prompt(report.prompt_file).embeddings for report in (found, by_hand)))
    short = run(compressed, tmp_path / "short", learning_rate=best, steps=20, validate_every=20)
    assert short.history[-1][1] == pytest.approx(values[best], abs=1e-3)


def test_a_teacher_with_a_longer_table_is_asked_for_the_student_s_tokens(tmp_path: Path) -> None:
    model = tiny_model("llama", tmp_path / "model")
    teacher = tiny_model("llama", tmp_path / "teacher", vocab_size=VOCAB_SIZE + 64, seed=1)
    for count in (8, 1000):
        report = run(model, tmp_path / f"p{count}", teacher=str(teacher), teacher_tokens=count, steps=2)
        assert report.steps == 2


def test_one_optimizer_serves_a_search_timing_and_learning(
    compressed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """accelerate undoes the scaling of float16 gradients once for every optimizer that it was given."""
    prepared: list[Any] = []
    prepare = Accelerator.prepare_optimizer
    monkeypatch.setattr(
        Accelerator,
        "prepare_optimizer",
        lambda self, *args, **kwargs: prepared.append(args) or prepare(self, *args, **kwargs),
    )
    run(compressed, tmp_path / "p", learning_rate="auto", max_time=600.0)
    assert len(prepared) == 1


@pytest.mark.parametrize("method", ["soft-prompt", "kv-prefix"])
def test_what_is_at_fault_before_the_first_step_leaves_nothing(method: str, tmp_path: Path) -> None:
    model = tiny_model("opt", tmp_path / "model")
    with pytest.raises(CtpError):
        run(model, tmp_path / "p", seqlen=510, tracker="tensorboard", method=method, text="pydoc:train")
    assert not list(tmp_path.glob("p*"))


def test_a_prefix_longer_than_a_sliding_window_is_refused(tmp_path: Path) -> None:
    model = tiny_model("mistral", tmp_path / "model", sliding_window=16)
    with pytest.raises(UnsupportedModelError, match="cannot carry a kv-prefix of 20 tokens"):
        run(model, tmp_path / "p", method="kv-prefix", tokens=20)
    soft = run(model, tmp_path / "soft", tokens=20, steps=1).prompt_file
    with pytest.raises(UnsupportedModelError, match="cannot carry a kv-prefix of 20 tokens"):
        stitch(StitchSection(format="kv"), prompt_path=soft, model_path=model, output=tmp_path / "stitched")


def test_a_prefix_for_models_of_other_depths_is_refused(tmp_path: Path) -> None:
    models = [tiny_model("llama", tmp_path / str(depth), num_hidden_layers=depth) for depth in (2, 1)]
    weights = [load_model(path) for path in models]
    weights[1].set_input_embeddings(weights[0].get_input_embeddings())
    weights[1].save_pretrained(models[1])
    with pytest.raises(InputError, match="not shaped as those of the first model"):
        run(models, tmp_path / "p", method="kv-prefix")
