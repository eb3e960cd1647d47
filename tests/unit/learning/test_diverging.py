"""Learning that ends in NaN, or starts where nothing can be learned: said, and nothing is left to go on from."""

import dataclasses
from pathlib import Path

import pytest
import torch
from learning_runs import Listening, run
from tiny_models import tiny_model

from ctp_cli.errors import InputError, NotFiniteError
from ctp_cli.prompts.file import AnyPrompt, Prompt, load_prompt, save_prompt

METHODS = ["soft-prompt", "kv-prefix"]


@pytest.fixture
def half(tmp_path: Path) -> Path:
    """A model in float16, which holds nothing above 65,504."""
    return tiny_model("llama", tmp_path / "half", dtype=torch.float16)


def scaled(prompt: AnyPrompt, factor: float) -> AnyPrompt:
    if isinstance(prompt, Prompt):
        return dataclasses.replace(prompt, embeddings=prompt.embeddings * factor)
    # one layer's values are enough
    key_values = prompt.key_values.clone()
    key_values[1, 1] *= factor
    return dataclasses.replace(prompt, key_values=key_values)


@pytest.mark.parametrize("method", METHODS)
def test_an_earlier_prompt_that_is_far_too_large_is_refused(method: str, tmp_path: Path) -> None:
    model = tiny_model("gemma", tmp_path / "model")  # its rows are not what stands in its table
    settings = {"method": method, "steps": 1}
    usual = load_prompt(run(model, tmp_path / "usual", **settings).prompt_file)
    file = tmp_path / "scaled.safetensors"
    for factor in (1e5, 1e30):
        save_prompt(file, scaled(usual, factor))
        with pytest.raises(InputError, match=r"scaled\.safetensors: its values are up to .* times as large") as error:
            run(model, tmp_path / "new", init=str(file), **settings)
        # the largest of some hundred random values is a few times their root mean square
        named = float(error.value.message.split("up to ")[1].split(" ")[0])
        assert 1.5 < named / factor < 8, error.value.message
        assert not list(tmp_path.glob("new*"))
    save_prompt(file, scaled(usual, 100.0))
    run(model, tmp_path / "new", init=str(file), **settings)


def test_rows_are_measured_before_they_become_keys_and_values(tmp_path: Path) -> None:
    """The norm in front of every layer hides how large they are."""
    model = tiny_model("llama", tmp_path / "model")
    rows = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    save_prompt(tmp_path / "rows.safetensors", Prompt(rows * 1e30))
    with pytest.raises(InputError, match="as the model's own embeddings"):
        run(model, tmp_path / "new", init=str(tmp_path / "rows.safetensors"), method="kv-prefix")


@pytest.mark.parametrize("init", [None, "text:be brief"])
def test_tokens_that_have_no_row(init: str | None, tmp_path: Path) -> None:
    model = tiny_model("llama", tmp_path / "model", vocab_size=16)
    with pytest.raises(InputError, match=r"the text holds token id [0-9]+, the model has 16 embeddings"):
        run(model, tmp_path / "new", init=init, method="kv-prefix")


@pytest.mark.parametrize("method", METHODS)
def test_learning_that_diverges_leaves_nothing(method: str, half: Path, tmp_path: Path) -> None:
    settings = {"method": method, "dtype": "checkpoint", "learning_rate": 1e6}
    with pytest.raises(NotFiniteError, match=r"after step [123] with learning rate 1e\+06 the prompt") as error:
        run(half, tmp_path / "p", **settings)
    assert error.value.exit_code == 2 and error.value.hint == "use a lower --lr"
    assert [path.name for path in tmp_path.iterdir()] == ["half"]


def test_where_the_validation_finds_it(half: Path, tmp_path: Path) -> None:
    """A prompt that is finite, and that the model cannot bear."""
    with pytest.raises(NotFiniteError, match=r"after step 1 with learning rate 1e\+06 the model's outputs hold NaN"):
        run(half, tmp_path / "p", dtype="checkpoint", learning_rate=1e6, validate_every=1)
    assert not list(tmp_path.glob("p*"))


def test_a_start_that_the_model_cannot_bear(half: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctp_cli.stages.start._LARGEST_RATIO", 1e30)
    save_prompt(tmp_path / "big.safetensors", Prompt(torch.full((8, 64), 1e6)))
    with pytest.raises(NotFiniteError, match="with the prompt that learning starts from the model's outputs hold NaN"):
        run(half, tmp_path / "p", dtype="checkpoint", init=str(tmp_path / "big.safetensors"))
    assert not list(tmp_path.glob("p*"))


def test_the_search_for_a_rate_survives_rates_that_diverge(
    half: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ctp_cli.stages.learn._LEARNING_RATES", {"soft-prompt": 1e6})
    listening = Listening()
    with pytest.raises(NotFiniteError, match="learning diverged"):
        run(half, tmp_path / "all", listening, dtype="checkpoint", learning_rate="auto")
    assert sum("validation perplexity inf" in line for line in listening.said) == 3
