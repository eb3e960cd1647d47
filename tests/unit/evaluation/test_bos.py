"""`--bos`: the tokenizer's BOS before every window of evaluation and in every window of calibration."""

from pathlib import Path

import pytest
import torch
from tiny_models import tiny_model
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from ctp_cli.data.sources import load_text
from ctp_cli.errors import InputError
from ctp_cli.models.resolve import resolve_model
from ctp_cli.prompts.file import Prompt, PromptMetadata, save_prompt
from ctp_cli.recipe import CompressSection, EvalSection
from ctp_cli.stages import compress
from ctp_cli.stages.eval import Target, evaluate

WORDS = "A model that was trained behind one token does badly without it. " * 20


@pytest.fixture
def text(tmp_path: Path) -> str:
    (tmp_path / "words.txt").write_text(WORDS)
    return f"words={tmp_path / 'words.txt'}"


@pytest.mark.parametrize("family", ["llama_tied_gqa", "gemma", "opt"])
def test_windows_are_scored_behind_a_bos_that_is_not(family: str, text: str, tmp_path: Path) -> None:
    path = tiny_model(family, tmp_path / "model")
    tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModelForCausalLM.from_pretrained(path).eval()
    ids_NT = torch.tensor(tokenizer(WORDS, add_special_tokens=False)["input_ids"][: 4 * 24]).view(4, 24)
    with torch.no_grad():
        logits = model(functional.pad(ids_NT, (1, 0), value=tokenizer.bos_token_id)).logits[:, 1:-1]
    wanted = functional.cross_entropy(logits.flatten(0, 1).double(), ids_NT[:, 1:].flatten()).exp()
    scores = {}
    for bos in (True, False):
        section = EvalSection(ppl=(text,), seqlen=24, windows=4, bos=bos)
        (scores[bos],) = evaluate(section, targets=[Target("it", resolve_model(str(path)))]).scores
    counting = EvalSection(ppl=(text,), seqlen=24, windows=4, bos=True, convention="paper")
    (published,) = evaluate(counting, targets=[Target("it", resolve_model(str(path)))]).scores
    assert published.perplexity == scores[True].perplexity, "a BOS is no prompt"
    assert scores[True].perplexity == pytest.approx(float(wanted), rel=1e-5)
    assert scores[False].perplexity != pytest.approx(float(wanted), rel=1e-3)
    details = scores[True].details
    assert (details["bos"], details["prompt_tokens"], details["scored_tokens"]) == (True, 0, 4 * 23)


def test_a_prompt_learned_without_one_is_refused(text: str, tmp_path: Path) -> None:
    path = tiny_model("llama_tied_gqa", tmp_path / "model")
    prompt = tmp_path / "prompt.safetensors"
    save_prompt(prompt, Prompt(torch.zeros(3, AutoConfig.from_pretrained(path).hidden_size), PromptMetadata()))
    with pytest.raises(InputError, match="learned without a BOS"):
        evaluate(
            EvalSection(ppl=(text,), seqlen=24, windows=4, bos=True),
            targets=[Target("it", resolve_model(str(path)), prompt)],
        )


def test_a_tokenizer_without_one(text: str, tmp_path: Path) -> None:
    path = tiny_model("llama_tied_gqa", tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.bos_token = None
    tokenizer.save_pretrained(path)
    with pytest.raises(InputError, match="no BOS"):
        evaluate(
            EvalSection(ppl=(text,), seqlen=24, windows=4, bos=True), targets=[Target("it", resolve_model(str(path)))]
        )


def test_calibration_windows_begin_with_it(text: str, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model("llama_tied_gqa", tmp_path / "model"))
    section = CompressSection(bits=4, windows=3, seqlen=16, bos=True)
    found = compress._windows(section, load_text(text, default_part="train"), tokenizer)
    stream = torch.tensor(tokenizer(WORDS, add_special_tokens=False)["input_ids"][: 3 * 15]).view(3, 15)
    assert torch.equal(found, functional.pad(stream, (1, 0), value=tokenizer.bos_token_id))
