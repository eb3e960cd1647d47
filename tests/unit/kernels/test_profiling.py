"""What is timed is what is said: the right runs, in turns, on unchanged models. No timing is asserted."""

import math
import statistics

import pytest
import torch
import transformers
from ctp_kernels import memory, profiling
from ctp_kernels.profiling import (
    Configuration,
    PairedRatio,
    Quartiles,
    measure_latency,
    median_interval,
    random_prompt,
)

WIDTH = 16


@pytest.fixture(autouse=True)
def _one_thread():
    """On matrices this small, threads only wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _llama():
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=WIDTH, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    return transformers.AutoModelForCausalLM.from_config(config).float().eval()


def _measure(model, prompt_PD=None, **given):
    settings = {"prompt_lengths": (4, 0), "seqlen": 6, "new_tokens": 3, "rounds": 3} | given
    prompt_PD = torch.randn(8, model.get_input_embeddings().weight.shape[1]) if prompt_PD is None else prompt_PD
    return measure_latency(model, prompt_PD, generator=torch.Generator().manual_seed(0), **settings)


class _Forwards:
    """Records what goes through the model: positions already in the cache, new positions, logits made."""

    def __init__(self, model):
        self.seen, self.made = [], []
        model.register_forward_pre_hook(self._before, with_kwargs=True)
        model.register_forward_hook(lambda _model, _args, output: self.made.append(output.logits.shape[1]))

    def _before(self, _model, _args, kwargs):
        cache = kwargs.get("cache", kwargs.get("past_key_values"))
        inputs = kwargs["input_ids"] if "input_ids" in kwargs else kwargs["inputs_embeds"]
        self.seen.append((cache.get_seq_length() if cache else 0, inputs.shape[1]))


def test_each_run_feeds_the_prompt_or_its_cache_then_one_token_at_a_time():
    model = _llama()
    forwards = _Forwards(model)
    _measure(model, rounds=1)
    without, computed, reused = (
        [(0, 6), (6, 1), (7, 1)],
        [(0, 10), (10, 1), (11, 1)],
        [(4, 6), (10, 1), (11, 1)],
    )
    prefix, first_use, warm_up, one_round = (
        [(0, 4)],
        without,
        without + computed + reused,
        without + computed + reused,
    )
    assert forwards.seen == prefix + first_use + warm_up + one_round
    assert set(forwards.made) == {1}, "the head ran on more than the last position"


def test_greedy_tokens_are_those_of_generate(monkeypatch):
    model, prompt_PD = _llama(), torch.randn(4, WIDTH)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    chosen = []
    original = profiling._Bench._next

    def recording(self, **inputs):
        token_11, cache = original(self, **inputs)
        chosen.append(token_11.item())
        return token_11, cache

    monkeypatch.setattr(profiling._Bench, "_next", recording)
    _measure(model, prompt_PD, rounds=1, new_tokens=5)
    text_1T = torch.randint(50, (6,), generator=torch.Generator().manual_seed(0))[None]
    inputs = torch.cat([prompt_PD[None], model.get_input_embeddings()(text_1T)], dim=1)
    # a random model may well choose the token that ends a text
    model.generation_config.eos_token_id = None
    expected = model.generate(inputs_embeds=inputs, max_new_tokens=5, do_sample=False)[0].tolist()
    runs = [chosen[i : i + 5] for i in range(0, len(chosen), 5)]
    assert runs[-2] == expected, "the prompt run through the model"
    assert runs[-1] == expected, "the prompt's keys and values reused"


def test_configurations_take_turns_and_every_run_is_reported():
    turns = []
    report = _measure(_llama(), prompt_lengths=(2, 4, 2), on_run=turns.append)
    none, *others = profiling.configurations((2, 4))
    assert none == Configuration(0, False)
    assert others == [Configuration(p, reused) for p in (2, 4) for reused in (False, True)]
    rounds = [turns[i : i + 5] for i in range(0, len(turns), 5)]
    assert len(rounds) == 4  # the untimed one and three timed ones
    assert all(set(each) == {none, *others} for each in rounds)
    assert rounds[1] == [none, *others] and rounds[2] == [*others, none]
    assert [(row.prompt_tokens, row.prefix_reused) for row in report.rows] == [
        (t.prompt_tokens, t.prefix_reused) for t in (none, *others)
    ]


def test_ratios_pair_runs_of_the_same_round():
    report = _measure(_llama(), rounds=5)
    without = report.rows[0]
    assert without.first_token_ratio == without.per_token_ratio == PairedRatio(1, 1, 1, None, None)
    for row in report.rows:
        assert len(row.samples) == 5 and all(s.first_token_ms > 0 and s.per_token_ms > 0 for s in row.samples)
        ratios = [s.first_token_ms / w.first_token_ms for s, w in zip(row.samples, without.samples, strict=True)]
        assert row.first_token_ratio.median == statistics.median(ratios)
        assert row.per_token_ms.low <= row.per_token_ms.median <= row.per_token_ms.high


def test_quartiles_agree_with_torch():
    values = [3.0, 1.0, 4.0, 1.5, 9.0, 2.6]
    expected = torch.quantile(torch.tensor(values, dtype=torch.float64), torch.tensor([0.25, 0.5, 0.75]).double())
    torch.testing.assert_close(torch.tensor([*vars(Quartiles.of(values)).values()], dtype=torch.float64), expected)
    assert Quartiles.of([2.0]) == Quartiles(2.0, 2.0, 2.0)


def test_only_reused_prefixes_are_kept_and_weights_are_counted_once():
    model = _llama()
    model.lm_head.weight = model.model.embed_tokens.weight
    report = _measure(model)
    # 2 layers, keys and values, 4 positions, 16 wide, 4 bytes
    assert [row.prefix_bytes for row in report.rows] == [0, 0, 2 * 2 * 4 * WIDTH * 4]
    assert report.weight_bytes == 4 * sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prompt_lengths": (9,)}, "9 tokens asked for, prompt_embeddings has 8 rows"),
        ({"prompt_lengths": (-1,)}, "-1 is negative"),
        ({"seqlen": 0}, "seqlen: needs at least 1"),
        ({"new_tokens": 1}, "new_tokens: needs at least 2"),
        ({"rounds": 0}, "rounds: needs at least 1"),
        ({"prompt_PD": torch.zeros(8, 5)}, r"expected shape \(prompt tokens, 16\)"),
    ],
)
def test_numbers_that_do_not_go_together_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        _measure(_llama(), **given)


def test_training_mode_is_refused():
    with pytest.raises(ValueError, match="training mode"):
        _measure(_llama().train())


@pytest.mark.parametrize(
    "config",
    [
        transformers.GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=20),
        transformers.OPTConfig(
            vocab_size=50,
            hidden_size=16,
            ffn_dim=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            word_embed_proj_dim=16,
            max_position_embeddings=20,
        ),
    ],
    ids=["gpt2", "opt"],
)
def test_learned_positions_may_be_used_up_but_not_exceeded(config):
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    _measure(model, seqlen=14, rounds=1)  # 4 + 14 + 3 - 1: the last new token is never fed back
    with pytest.raises(ValueError, match="20 learned positions; a prompt of 4, 15 text tokens and 3 new ones need 21"):
        _measure(model, seqlen=15, rounds=1)


def test_random_prompt_rows_are_token_embeddings_and_the_same_for_a_seed():
    model = _llama()
    rows = random_prompt(model, 5, torch.Generator().manual_seed(3))
    table = model.get_input_embeddings().weight
    assert rows.shape == (5, WIDTH)
    assert all((row == table).all(1).any() for row in rows)
    assert torch.equal(rows, random_prompt(model, 5, torch.Generator().manual_seed(3)))


@pytest.mark.skipif(not memory._STATUS.exists(), reason="needs /proc")
@pytest.mark.parametrize("resettable", [True, False])
def test_peak_memory_sees_what_was_freed_before_the_end(monkeypatch, resettable):
    if not resettable:
        monkeypatch.setattr(memory, "_reset_high_water", lambda: False)
    size = 64 << 20
    with memory.watch_peak(torch.device("cpu")) as peak:
        block = torch.ones(size, dtype=torch.uint8)
        if not resettable:
            for _ in range(20):  # time for the sampling thread to look
                block.add_(1)
        del block
    with memory.watch_peak(torch.device("cpu")) as small:
        math.sqrt(2)
    assert 0.9 * size < peak.growth_bytes < 1.5 * size
    assert small.growth_bytes < 0.1 * size, "the earlier peak was not forgotten"
    assert ("sampled" in peak.method) or resettable


@pytest.mark.parametrize("rounds, place", [(6, 1), (9, 2), (15, 4), (20, 6), (25, 8), (50, 18)])
def test_the_interval_of_a_median_is_that_of_the_sign_test(rounds, place):
    # ranks as published tables of the sign test at 95% have them
    values = [float(i) for i in range(1, rounds + 1)]
    assert median_interval(values[::-1]) == (place, rounds + 1 - place)


def test_few_rounds_have_no_interval():
    assert median_interval([1.0, 2.0, 3.0, 4.0, 5.0]) is None
    ratio = PairedRatio.of([1.0, 2.0, 3.0])
    assert (ratio.median, ratio.confidence_low, ratio.confidence_high) == (2.0, None, None)
