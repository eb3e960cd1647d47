"""`ctp learn --bos`: what is learned stands behind the tokenizer's BOS, wherever it goes afterwards."""

from pathlib import Path

import pytest
import torch
from learning_runs import SECTION, run
from tiny_models import tiny_model
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ctp_cli.data.sources import load_text
from ctp_cli.errors import InputError
from ctp_cli.models.resolve import resolve_model
from ctp_cli.models.sharding import Frozen
from ctp_cli.prompts.file import load_prompt
from ctp_cli.prompts.teacher import Teacher
from ctp_cli.recipe import EvalSection, StitchSection
from ctp_cli.stages.eval import Target, evaluate
from ctp_cli.stages.stitch import stitch

FAMILIES = ["llama_tied_gqa", "gemma", "opt"]
WINDOWS, LENGTH = SECTION["validation_windows"], SECTION["seqlen"]


def loaded(path: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    return AutoModelForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)


@torch.no_grad()
def plain_perplexity(path: Path, rows_PD: Tensor | None) -> float:
    """Of the validation text behind [BOS, rows], by transformers alone."""
    model, tokenizer = loaded(path)
    text = load_text(SECTION["validation"], default_part="validation").content
    ids_NT = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"][: WINDOWS * LENGTH]).view(WINDOWS, -1)
    embed = model.get_input_embeddings()
    before = embed(torch.tensor([tokenizer.bos_token_id]))
    if rows_PD is not None:
        before = torch.cat([before, rows_PD])
    inputs = torch.cat([before.expand(WINDOWS, -1, -1), embed(ids_NT)], 1)
    logits = model(inputs_embeds=inputs).logits[:, -LENGTH:-1]
    return float(functional.cross_entropy(logits.flatten(0, 1).double(), ids_NT[:, 1:].flatten()).exp())


def scored(path: Path, prompt: Path | None, *, bos: bool = True) -> float:
    section = EvalSection(ppl=(SECTION["validation"],), seqlen=LENGTH, windows=WINDOWS, bos=bos)
    (score,) = evaluate(section, targets=[Target("it", resolve_model(str(path)), prompt)]).scores
    assert score.details["prompt_tokens"] == (8 if prompt or "stitched" in path.name else 0), "a BOS is no prompt"
    return score.perplexity


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_is_learned_chosen_evaluated_and_stitched_behind_a_bos(family: str, tmp_path: Path) -> None:
    path = tiny_model(family, tmp_path / "model")
    report = run(path, tmp_path / "prompt", bos=True)
    prompt = load_prompt(tmp_path / "prompt")
    assert prompt.metadata.layout == "bos-prompt-text"
    assert prompt.num_virtual_tokens == 8
    assert report.best_step > 0, "nothing was learned: the test shows little"
    assert report.unprompted_perplexity == pytest.approx(plain_perplexity(path, None), rel=1e-5)
    wanted = plain_perplexity(path, prompt.embeddings)
    assert report.best_perplexity == pytest.approx(wanted, rel=1e-5)
    assert scored(path, tmp_path / "prompt") == pytest.approx(wanted, rel=1e-5)
    with pytest.raises(InputError, match="learned behind a BOS"):
        scored(path, tmp_path / "prompt", bos=False)
    for format in ("vocab", "kv"):
        made = stitch(
            StitchSection(format=format),
            prompt_path=tmp_path / "prompt",
            model_path=path,
            output=tmp_path / f"stitched-{format}",
        )
        assert made.layout == "bos-prompt-text", "or the command that is proposed next lacks --bos"
    assert scored(tmp_path / "stitched-vocab", None) == pytest.approx(wanted, rel=1e-5)
    assert scored(path, tmp_path / "stitched-kv") == pytest.approx(wanted, rel=1e-5)
    _, tokenizer = loaded(tmp_path / "stitched-vocab")
    assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    with pytest.raises(InputError, match="learned behind a BOS"):
        scored(tmp_path / "stitched-vocab", None, bos=False)


def test_another_bos_is_refused(tmp_path: Path) -> None:
    path = tiny_model("llama_tied_gqa", tmp_path / "model")
    run(path, tmp_path / "prompt", bos=True, steps=1)
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.bos_token = tokenizer.convert_ids_to_tokens(7)
    tokenizer.save_pretrained(path)
    with pytest.raises(InputError, match="behind token 1 as BOS, here that is 7"):
        scored(path, tmp_path / "prompt")
    tokenizer.bos_token = None
    tokenizer.save_pretrained(path)
    with pytest.raises(InputError, match="no BOS"):
        run(path, tmp_path / "no", bos=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prefix_begins_with_the_bos_s_keys_and_values(family: str, tmp_path: Path) -> None:
    path = tiny_model(family, tmp_path / "model")
    model, tokenizer = loaded(path)
    words = tokenizer("seven or more words to start from", add_special_tokens=False)["input_ids"][:7]
    report = run(
        path, tmp_path / "prefix", bos=True, method="kv-prefix", init="text:seven or more words to start from", steps=4
    )
    with torch.no_grad():
        start = plain_perplexity(path, model.get_input_embeddings()(torch.tensor(words)))
    assert report.start_perplexity == pytest.approx(start, rel=1e-5)
    assert load_prompt(tmp_path / "prefix").num_virtual_tokens == 8
    assert scored_prefix(path, tmp_path / "prefix") == pytest.approx(report.best_perplexity, rel=1e-5)
    # and one that starts from a prompt starts where that is
    soft = run(path, tmp_path / "soft", bos=True, tokens=7)
    from_soft = run(path, tmp_path / "from", bos=True, method="kv-prefix", init=str(tmp_path / "soft"), steps=4)
    assert from_soft.start_perplexity == pytest.approx(soft.best_perplexity, rel=1e-5)
    with pytest.raises(InputError, match="has 8 tokens, asked for are 9"):
        run(path, tmp_path / "no", bos=True, method="kv-prefix", init=str(tmp_path / "soft"), tokens=9)
    with pytest.raises(InputError, match="learned behind a BOS"):
        run(path, tmp_path / "no", method="kv-prefix", init=str(tmp_path / "soft"))


def scored_prefix(path: Path, prefix: Path) -> float:
    section = EvalSection(ppl=(SECTION["validation"],), seqlen=LENGTH, windows=WINDOWS, bos=True)
    (score,) = evaluate(section, targets=[Target("it", resolve_model(str(path)), prefix)]).scores
    assert score.details["prompt_tokens"] == 7
    return score.perplexity


@pytest.mark.parametrize("family", FAMILIES)
def test_a_teacher_reads_the_text_behind_a_bos(family: str, tmp_path: Path) -> None:
    model, tokenizer = loaded(tiny_model(family, tmp_path / "model"))
    ids_BT = torch.randint(5, 300, (2, 12), generator=torch.Generator().manual_seed(3))
    teacher = Teacher(lambda: Frozen(model), tmp_path, 0.5, 4, bos_id=tokenizer.bos_token_id)
    teacher.prepare(lambda _: ids_BT, 1, writes=True)
    with torch.no_grad():
        logits = model(functional.pad(ids_BT, (1, 0), value=tokenizer.bos_token_id)).logits[:, 1:-1]
        without = model(ids_BT).logits[:, :-1]
    wanted = logits.softmax(-1).topk(4).values
    assert (wanted - without.softmax(-1).topk(4).values).abs().max() > 1e-3, "a BOS changes nothing: the test is blind"
    torch.testing.assert_close(teacher.at(0)["probabilities"].float(), wanted, rtol=1e-2, atol=1e-4)
