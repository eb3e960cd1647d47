"""Recipes: the shipped ones are valid, values are read as meant, defaults stand in one place."""

import inspect
from pathlib import Path

import pytest

from ctp_cli.errors import RecipeError
from ctp_cli.recipe import BenchSection, CompressSection, EvalSection, LearnSection, Recipe, build, load

RECIPES = Path(__file__).parent.parent / "recipes"


@pytest.mark.parametrize("path", sorted(RECIPES.rglob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_recipes_are_valid_and_say_how_to_run_them(path: Path) -> None:
    load(path)
    assert f"ctp run recipes/{path.relative_to(RECIPES)}" in path.read_text()


def test_overrides_are_yaml_and_reach_into_sections(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("output: x\ncompress: {bits: 4}\n")
    changed = load(recipe, ["compress.bits=3", "compress.sparsity='2:4'", "eval.ppl=[ptb, c4]", "learn.max_time=1.5h"])
    assert changed.compress == CompressSection(bits=3, sparsity="2:4")
    assert changed.eval is not None and changed.eval.ppl == ("ptb", "c4")
    assert changed.learn is not None and changed.learn.max_time == 5400


@pytest.mark.parametrize(
    ("given", "sparsity"), [("0.5", 0.5), (0.625, 0.625), ("2:4", "2:4"), ("8:16", "8:16"), (".75", 0.75)]
)
def test_sparsity(given: object, sparsity: object) -> None:
    assert build(CompressSection, {"sparsity": given}).sparsity == sparsity


@pytest.mark.parametrize("given", ["0", "1", "-0.1", "nan", "inf", "4:4", "0:4", "5:4", "1:100", "a:b", "0.5x", ""])
def test_no_sparsity(given: str) -> None:
    with pytest.raises(RecipeError):
        build(CompressSection, {"sparsity": given})


def test_every_problem_is_reported_at_once() -> None:
    with pytest.raises(RecipeError) as caught:
        build(LearnSection, {"tokens": 0, "learning_rate": -1, "sed": 1})
    for word in ("tokens", "learning_rate", "did you mean seed?"):
        assert word in caught.value.message


@pytest.mark.parametrize("section", [CompressSection, LearnSection, EvalSection, BenchSection])
def test_commands_state_no_defaults_of_their_own(section: type) -> None:
    from ctp_cli.commands import bench, compress, eval, learn

    command = {
        CompressSection: compress.compress,
        LearnSection: learn.learn,
        EvalSection: eval.evaluate,
        BenchSection: bench.bench,
    }[section]
    parameters = inspect.signature(command).parameters
    shared = set(section.model_fields) & set(parameters)  # type: ignore[attr-defined]
    assert len(shared) >= 3
    assert {name: parameters[name].default for name in shared} == dict.fromkeys(shared, None)


@pytest.mark.parametrize("value", ["!!bool 7", "!!timestamp soon", "!!int ''", "!!float ''", "!!binary é", "!!set 7"])
def test_values_that_are_not_what_their_tags_say(tmp_path: Path, value: str) -> None:
    (tmp_path / "r.yaml").write_text(f"model: x\nlearn: {{batch_size: {value}}}\n")
    with pytest.raises(RecipeError, match="not YAML"):
        load(tmp_path / "r.yaml")


def test_a_stage_without_what_it_needs_is_refused() -> None:
    for learn, evaluate in ((True, False), (False, True)):
        with pytest.raises(RecipeError, match="set bos in both"):
            build(Recipe, {"output": "x", "learn": {"bos": learn}, "eval": {"bos": evaluate}})
    with pytest.raises(RecipeError, match="stitch needs the prompt"):
        build(Recipe, {"output": "x", "compress": {"bits": 4}, "stitch": {}})
    prefix = {"output": "x", "learn": {"method": "kv-prefix"}}
    with pytest.raises(RecipeError, match=r"set stitch\.format to kv or peft"):
        build(Recipe, {**prefix, "stitch": {}})
    assert build(Recipe, {**prefix, "stitch": {"format": "peft"}}).stitch is not None


def test_a_seed_has_the_bounds_of_every_seed() -> None:
    for seed in (-1, 2**31):
        with pytest.raises(RecipeError, match="seed"):
            build(Recipe, {"output": "x", "learn": {}, "seed": seed})


def test_a_recipe_stitches_with_the_options_of_the_command(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("output: x\nlearn: {}\nstitch: {dtype: float16, vocab_multiple: 128}\n")
    section = load(tmp_path / "r.yaml", ["stitch.vocab_multiple=64"]).stitch
    assert section is not None and (section.dtype, section.vocab_multiple) == ("float16", 64)
    (tmp_path / "r.yaml").write_text("output: x\nlearn: {}\nstitch: {format: kv, vocab_multiple: 64}\n")
    with pytest.raises(RecipeError, match="stitch: vocab_multiple pads a vocabulary"):
        load(tmp_path / "r.yaml")
