"""What is shown is what was meant: names as they are, commands a shell takes, defaults, settings without effect."""

import io
import re
import shlex
import sys
from pathlib import Path

import pytest
from rich.console import Console as RichConsole
from tiny_models import tiny_model
from typer.testing import CliRunner, Result

from ctp_cli.app import app
from ctp_cli.artifact import refuse_existing, workspace
from ctp_cli.commands.eval import _prompt_name
from ctp_cli.console import BarProgress, Console, _plain_console
from ctp_cli.errors import InputError, OutputError
from ctp_cli.recipe import CompressSection, LearnSection

SMALL = ("--calibration", "pydoc", "--windows", 2, "--seqlen", 32)


def ctp(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def model(place: Path) -> Path:
    return tiny_model("llama", place / "model")


def test_names_in_tables_and_bars_are_neither_styles_nor_emoji(capsys: pytest.CaptureFixture[str]) -> None:
    name = "a[b] [/c] :ok:d"
    console = Console()
    console.table(name, ("", name), [(name, "1")], caption=name)
    console.result(name)
    shown = capsys.readouterr().out
    assert shown.count(name) == 5, shown
    bar = BarProgress(_plain_console(io.StringIO()))
    bar.start(name, 2)
    bar.advance(note=name)
    assert bar._bar is not None
    wide = RichConsole(file=io.StringIO(), width=200)
    wide.print(bar._bar.get_renderable())
    bar.finish()
    assert wide.file.getvalue().count(name) == 2  # type: ignore[attr-defined]


def test_a_result_reaches_a_stream_that_lacks_its_signs(monkeypatch: pytest.MonkeyPatch) -> None:
    for encoding in ("ascii", "latin-1"):
        raw = io.BytesIO()
        monkeypatch.setattr("sys.stdout", io.TextIOWrapper(raw, encoding=encoding))
        console = Console()
        console.table("perplexity", ("", "\N{GREEK SMALL LETTER PI}"), [("a", "1.00 ± 0.50")])
        console.result("runs/\N{GREEK SMALL LETTER PI}")
        sys.stdout.flush()
        assert "1.00 ± 0.50".encode(encoding, "backslashreplace") in raw.getvalue()
        assert b"runs/\\u03c0" in raw.getvalue()


def test_the_next_command_is_one_that_a_shell_takes(model: Path, place: Path) -> None:
    result = ctp("compress", model, "--bits", 4, *SMALL, "-o", "of mine (1)")
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("next: ")]
    assert shlex.split(line) == ["next:", "ctp", "learn", "of mine (1)", "--max-time", "10m"]


def test_a_prompt_is_called_after_its_folder_also_where_that_has_a_dot(place: Path) -> None:
    folder = place / "runs" / "llama-3.1-prompt8"
    folder.mkdir(parents=True)
    (folder / "prompt.safetensors").touch()
    (place / "copied.safetensors").touch()
    for given in (folder, folder / "prompt.safetensors", Path("runs/llama-3.1-prompt8")):
        assert _prompt_name(given) == "llama-3.1-prompt8"
    assert _prompt_name(Path("copied.safetensors")) == "copied"


def test_no_force_replaces_what_is_read(place: Path) -> None:
    with workspace(place / "made", kind="k", identity={}) as space:
        (space.path / "inner").mkdir()
        space.finish({})
    refuse_existing(place / "made", force=True)
    for read in (Path("made"), Path("made/inner"), Path("made/../made/prompt.safetensors")):
        with pytest.raises(OutputError, match="to be read"):
            refuse_existing(place / "made", None, read, force=True)


def test_an_evaluation_and_a_stitched_checkpoint_spare_their_inputs(model: Path, place: Path) -> None:
    assert ctp("compress", model, "--bits", 4, *SMALL, "-o", "small").exit_code == 0
    learning = ("--steps", 1, "--tokens", 4, "--batch-size", 2, "--seqlen", 32, "--text", "pydoc")
    assert ctp("learn", "small", *learning, "-o", "prompt").exit_code == 0
    scoring = ("--ppl", "pydoc", "--seqlen", 32, "--windows", 2, "--force")
    for command in (
        ("eval", model, "small", *scoring, "-o", "small"),
        ("eval", model, "--prompt", "prompt", *scoring, "-o", "prompt"),
        ("stitch", "prompt", "small", "-o", "prompt", "--force"),
        ("bench", "small", "--prompt", "prompt", "-o", "prompt", "--force"),
        ("learn", model, *learning, "--init", "prompt", "-o", "prompt", "--force"),
        ("learn", model, *learning, "--teacher", "small", "-o", "small", "--force"),
    ):
        result = ctp(*command)
        assert result.exit_code == 2 and "to be read" in result.stderr, (command, result.output)


def test_several_formats_are_named_each_once(model: Path, place: Path) -> None:
    for formats in ("gptq,gptq", "ctp,auto", "auto,gptq"):
        result = ctp("compress", model, "--bits", 4, *SMALL, "--format", formats)
        assert result.exit_code == 2 and "each is named, once" in result.stderr
    assert [path.name for path in place.iterdir()] == ["model"]
    planned = ctp("compress", model, "--bits", 4, *SMALL, "--format", "gptq, ctp", "--dry-run", "-o", "w4")
    assert planned.exit_code == 0 and "w4-ctp" in planned.stdout


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"bits": 4}, []),
        ({"sparsity": 0.5, "rounds": 5}, []),
        ({"sparsity": 0.5, "rounds": 5, "pruner": "wanda"}, ["rounds without pruner alternating"]),
        ({"bits": 4, "rounds": 5, "tune": "scales"}, ["rounds without sparsity", "tune without tune_windows"]),
        ({"bits": 4, "refine": 7, "quantizer": "rtn"}, ["refine without quantizer gptq"]),
        (
            {"sparsity": 0.5, "symmetric": False, "group_size": 64},
            ["group_size without bits", "symmetric without bits"],
        ),
        ({"sparsity": 0.5, "act_order": "none"}, ["act_order without quantizer gptq or pruner sparsegpt"]),
        ({"sparsity": 0.5, "act_order": "none", "pruner": "sparsegpt"}, []),
    ],
)
def test_what_was_asked_for_in_vain_is_known(settings: dict[str, object], said: list[str]) -> None:
    assert CompressSection.model_validate(settings).without_effect() == said


def test_what_was_asked_for_in_vain_is_said(model: Path, place: Path) -> None:
    assert LearnSection(teacher_share=0.2).without_effect() == ["teacher_share without teacher"]
    assert LearnSection(teacher_share=0.2, teacher="m").without_effect() == []
    asked = ctp("compress", model, "--bits", 4, *SMALL, "--rounds", 9, "--dry-run")
    assert "no effect: rounds without sparsity" in asked.stderr
    Path("r.yaml").write_text(f"model: {model}\noutput: out\ncompress: {{bits: 4, rounds: 9, calibration: pydoc}}")
    assert "no effect: rounds without sparsity" in ctp("run", "r.yaml", "--dry-run").stderr
    refused = ctp("bench", "--kernels", "--explain", "-o", "there")
    assert refused.exit_code == 2 and "--output: not with --explain" in refused.stderr


def test_a_recipe_whose_last_text_is_missing_is_refused_before_the_first_stage(model: Path, place: Path) -> None:
    recipe = place / "r.yaml"
    for text in ("held=nothere.txt", "nothere.jsonl:body", "pydoc:tset", "nothere"):
        recipe.write_text(
            f"model: {model}\noutput: out\ncompress: {{bits: 4, calibration: pydoc}}\neval: {{ppl: ['{text}']}}"
        )
        result = ctp("run", recipe, "--dry-run")
        assert result.exit_code == 2 and text.removeprefix("held=").split(":")[0] in result.stderr


def test_a_changed_text_is_another_input_also_behind_an_equals_sign(model: Path, place: Path) -> None:
    from ctp_cli.runner import _text_key

    (place / "k=v").mkdir()
    text = place / "k=v" / "t.txt"
    keys = set()
    for content in ("one", "two"):
        text.write_text(content)
        keys.add(_text_key("./k=v/t.txt"))
    assert len(keys) == 2


def test_a_cache_that_cannot_be_written_is_said(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ctp_cli.models.embedded import embedded_model

    (place / "file").touch()
    for cache in ("file", "/proc/nowhere"):
        monkeypatch.setenv("CTP_CACHE", cache)
        with pytest.raises(InputError, match="nothing can be written there"):
            embedded_model()


@pytest.mark.parametrize("command", ["compress", "learn", "eval", "bench", "stitch"])
def test_help_says_the_defaults_of_the_recipe(command: str) -> None:
    from ctp_cli import recipe

    help_lines = CliRunner().invoke(app, [command, "-h"], env={"COLUMNS": "400"}).stdout.splitlines()
    rows = {word: line for line in help_lines if line.startswith("│") for word in re.split("[ ,]+", line)}
    fields = getattr(recipe, f"{command.capitalize()}Section").model_fields
    checked = 0
    for name, field in fields.items():
        row = rows.get(f"--{name.replace('_', '-')}")
        if row is not None and isinstance(field.default, int | float | str) and not isinstance(field.default, bool):
            assert f"[default: ({field.default})]" in row
            checked += 1
    assert checked >= 2
