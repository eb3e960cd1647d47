"""Perplexity against plain loops in float64, the published convention, and the oracle's numbers on real text."""

import math
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_model

from ctp_cli.errors import NotFiniteError
from ctp_cli.evaluation.perplexity import Perplexity, compare, perplexity
from ctp_cli.models.head import Scorer
from ctp_cli.models.loading import load_model
from ctp_cli.prompts.prefix import rows_prefix

FAMILIES = ["llama", "opt", "gpt2", "bloom", "gpt_neox", "gemma"]


def plain_nll(model, ids_NT, prompt_PD):
    """Token by token from full logits of [prompt, window] given as embeddings: nothing cached, nothing chunked."""
    sums = []
    for row in ids_NT:
        text = model.get_input_embeddings()(row)
        inputs = text if prompt_PD is None else torch.cat([prompt_PD.to(text.dtype), text])
        logits = model(inputs_embeds=inputs[None], use_cache=False).logits[0].double()
        logits = logits[0 if prompt_PD is None else prompt_PD.shape[0] :]
        total = 0.0
        for position in range(row.numel() - 1):
            total -= torch.log_softmax(logits[position], -1)[row[position + 1]].item()
        sums.append(total)
    return torch.tensor(sums, dtype=torch.float64)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("prompted", [False, True])
@torch.no_grad()
def test_equals_a_plain_loop(family: str, prompted: bool, tmp_path: Path) -> None:
    model = load_model(tiny_model(family, tmp_path / family))
    ids_NT = torch.randint(5, 300, (3, 24), generator=torch.Generator().manual_seed(1))
    width = model.get_input_embeddings().weight.shape[1]
    prompt = torch.randn(7, width, generator=torch.Generator().manual_seed(2)) if prompted else None
    prefix = None if prompt is None else rows_prefix(prompt, model)
    ours = perplexity(model, ids_NT, prefix=prefix, batch_size=2)
    # float32 forward passes that differ in batching and caching only
    torch.testing.assert_close(ours.window_nll_N, plain_nll(model, ids_NT, prompt), rtol=2e-5, atol=1e-4)
    assert ours.scored_tokens == 3 * 23


def test_true_value_ignores_the_prompt_and_the_published_one_counts_it() -> None:
    result = Perplexity(torch.full((4,), 2.0 * 1023, dtype=torch.float64), 1023, prompt_tokens=100)
    assert result.value() == pytest.approx(math.exp(2.0))
    assert result.value("paper") == pytest.approx(math.exp(2.0 * 1023 / 1123))
    # the correction of the published tables: exp(ln(published) * (n + 1023) / 1023)
    assert math.exp(math.log(result.value("paper")) * 1123 / 1023) == pytest.approx(result.value())


def test_conventions_agree_without_a_prompt() -> None:
    result = Perplexity(torch.tensor([100.0, 140.0], dtype=torch.float64), 63, prompt_tokens=0)
    assert result.value() == result.value("paper")


def test_standard_error_matches_a_simulation() -> None:
    generator = torch.Generator().manual_seed(0)
    draws = 3 + 0.2 * torch.randn(400, 30, generator=generator, dtype=torch.float64)
    values = torch.tensor([Perplexity(row * 100, 100, 0).value() for row in draws])
    claimed = torch.tensor([Perplexity(row * 100, 100, 0).standard_error for row in draws])
    # 400 repetitions estimate a standard deviation to about 4%
    assert claimed.mean().item() == pytest.approx(values.std().item(), rel=0.12)


def test_differences_are_paired() -> None:
    generator = torch.Generator().manual_seed(0)
    hard = 300 + 60 * torch.randn(20, generator=generator, dtype=torch.float64)
    a = Perplexity(hard, 100, 0)
    slightly_worse = Perplexity(hard + 1 + 0.1 * torch.randn(20, generator=generator, dtype=torch.float64), 100, 0)
    noise = Perplexity(hard + 5 * torch.randn(20, generator=generator, dtype=torch.float64), 100, 0)
    assert compare(a, slightly_worse).measurable  # although both spread far more than they differ
    assert not compare(a, noise).measurable


def test_soft_capped_logits_take_the_whole_forward(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, Gemma2Config

    config = Gemma2Config(
        vocab_size=300, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, final_logit_softcapping=1.0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    assert Scorer(model).head is None
    ids = torch.randint(5, 300, (2, 16))
    torch.testing.assert_close(perplexity(model, ids).window_nll_N, plain_nll(model, ids, None), rtol=2e-5, atol=1e-4)


@pytest.mark.slow
def test_full_model_on_the_published_protocol(shared_data: Path) -> None:
    """21.30 / 30.13 were measured by another program on the same model, windows and texts."""
    from ctp_cli.models.resolve import resolve_model
    from ctp_cli.recipe import EvalSection
    from ctp_cli.stages.eval import Target, evaluate

    torch.set_num_threads(2)
    texts = (f"wikitext2={shared_data}/wikitext2.test.txt", f"c4={shared_data}/c4.valid.jsonl")
    section = EvalSection(ppl=texts, windows=48)
    report = evaluate(section, targets=[Target("full", resolve_model("smollm2-135m"))])
    assert report.value("full", "wikitext2")[0] == pytest.approx(21.30, rel=1e-3)
    assert report.value("full", "c4")[0] == pytest.approx(30.13, rel=1e-3)


def test_more_tokens_than_positions_are_refused_with_the_length_that_fits(tmp_path: Path) -> None:
    from ctp_cli.errors import InputError

    model = load_model(tiny_model("gpt2", tmp_path / "m"))  # 512 learned positions
    prefix = rows_prefix(torch.zeros(20, 64), model)
    ids = torch.randint(5, 300, (2, 500))
    with pytest.raises(InputError, match="520 tokens, the model has 512") as caught:
        perplexity(model, ids, prefix=prefix)
    assert caught.value.hint == "use --seqlen 492 or less"
    assert perplexity(model, ids[:, :492], prefix=prefix).scored_tokens == 2 * 491


@pytest.mark.parametrize(("factor", "words"), [(1e6, "lose [0-9.e+]+ nats per token"), (float("inf"), "hold NaN")])
def test_outputs_that_no_perplexity_says(factor: float, words: str, tmp_path: Path) -> None:
    model = load_model(tiny_model("llama", tmp_path / "m"))
    model.get_output_embeddings().weight.data *= factor
    with pytest.raises(NotFiniteError, match=words):
        perplexity(model, torch.arange(5, 53).view(2, 24))
