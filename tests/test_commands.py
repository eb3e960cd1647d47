"""The five commands and `run`, as a user types them, on a small model that really was trained."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import typer
from safetensors.torch import load_file
from tiny_models import tiny_model
from typer.testing import CliRunner, Result

from ctp_cli.app import app
from ctp_cli.commands.common import reports_errors
from ctp_cli.models.loading import load_model


def ctp(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


RECIPE = """
model: {model}
output: out
compress: {{sparsity: 0.5, bits: 4, calibration: "pydoc:train", windows: 8, seqlen: 128}}
learn: {{tokens: 8, steps: 20, batch_size: 4, seqlen: 48, validate_every: 10, validation_windows: 4,
        text: "pydoc:train", validation: "pydoc:validation", learning_rate: 0.03}}
stitch: {{}}
eval: {{ppl: ["pydoc:test"], seqlen: 128, windows: 16}}
bench: {{prompt_len: [0, 8], seqlen: 32, new_tokens: 3, rounds: 2}}
"""


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix in {".safetensors", ".json"} and path.name not in {"ctp.json", "latency.json"}
    }


def test_the_five_commands_one_after_the_other(trained: Path, place: Path) -> None:
    """Each takes what the one before it made, by default, and its last line of stdout is a path that exists."""
    text = ("--calibration", "pydoc:train", "--windows", 8, "--seqlen", 128)
    made = ctp("compress", trained, "--sparsity", 0.5, "--bits", 4, *text).stdout.splitlines()[-1]
    assert made == "small-s50-w4"
    learned = ctp("learn", "--steps", 6, "--tokens", 8, "--batch-size", 2, "--seqlen", 48, "--validate-every", 3,
                  "--text", "pydoc:train", "--validation", "pydoc:validation", "--validation-windows", 4)  # fmt: skip
    prompt = Path(learned.stdout.splitlines()[-1])
    assert "taking the newest checkpoint here, small-s50-w4" in learned.stderr
    stitched = Path(ctp("stitch", prompt, "small-s50-w4").stdout.splitlines()[-1])
    scoring = ("--ppl", "pydoc:test", "--seqlen", 128, "--windows", 6, "--json")
    shown = ctp("eval", "small-s50-w4", "--prompt", prompt, *scoring)
    shutil.copy(prompt, "copied.safetensors")  # no folder to be named after
    assert "small-s50-w4 + copied" in ctp("eval", "small-s50-w4", "--prompt", "copied.safetensors", *scoring).stdout
    document = json.loads(shown.stdout)
    assert document["kind"] == "eval" and document["schema_version"] == 1
    by_prompt = document["scores"][1]["perplexity"]
    again = ctp("eval", stitched, *scoring)
    # the stitched checkpoint carries the same prompt
    assert json.loads(again.stdout)["scores"][0]["perplexity"] == pytest.approx(by_prompt, rel=1e-3)
    figure = ctp("bench", "--prompt-len", "0,8", "--seqlen", 32, "--rounds", 2, "--new-tokens", 3).stdout
    assert Path(figure.splitlines()[-1]).is_file()


def test_a_recipe_runs_once_and_then_knows_its_own(trained: Path, place: Path) -> None:
    recipe = place / "r.yaml"
    recipe.write_text(RECIPE.format(model=trained))
    first = ctp("run", recipe)
    for name in ("compressed", "prompt", "stitched", "evaluation", "report", "benchmark"):
        assert (place / "out" / name / "ctp.json").is_file()
    assert "won back" in first.stdout and (place / "out" / "report" / "recovery.png").is_file()
    before = {path: path.stat().st_mtime_ns for path in (place / "out").rglob("*")}
    second = ctp("run", recipe)
    assert second.stdout.count("already made") == 6
    assert before == {path: path.stat().st_mtime_ns for path in (place / "out").rglob("*")}
    # other settings do not pass for the same, and nothing is overwritten
    changed = CliRunner().invoke(app, ["run", str(recipe), "--set", "learn.seed=1"])
    assert changed.exit_code == 2 and "made with other settings" in changed.stderr
    assert before == {path: path.stat().st_mtime_ns for path in (place / "out").rglob("*")}


def made_now(*arguments: object) -> list[str]:
    """Stages that `ctp run` did not leave as they were."""
    steps = json.loads(ctp("run", *arguments, "--json").stdout)["steps"]
    return [name for name, _, how in steps if how == "made now"]


def test_what_a_recipe_makes_again(trained: Path, place: Path) -> None:
    recipe = place / "r.yaml"
    recipe.write_text(RECIPE.format(model=trained))
    ctp("run", recipe)
    assert made_now(recipe, "--redo", "eval") == ["evaluation", "report"]
    assert made_now(recipe, "--redo", "learn") == ["prompt", "stitched", "evaluation", "report", "benchmark"]
    assert made_now(recipe, "--redo", "stitch", "--redo", "bench") == ["stitched", "benchmark"]
    assert made_now(recipe) == []
    shutil.rmtree(place / "out" / "prompt")  # made again, it is another one for those that use it
    assert made_now(recipe) == ["prompt", "stitched", "evaluation", "report", "benchmark"]
    # as after an interruption behind that stage
    shutil.rmtree(place / "out" / "prompt")
    first_part = RECIPE.format(model=trained).split("stitch:")[0]
    (place / "first.yaml").write_text(first_part)
    ctp("run", "first.yaml")
    assert made_now(recipe) == ["stitched", "evaluation", "report", "benchmark"]
    # what other settings do not change stays
    assert made_now(recipe, "--set", "stitch.vocab_multiple=16", "--force") == ["stitched"]
    unknown = CliRunner().invoke(app, ["run", str(recipe), "--redo", "report"])
    assert unknown.exit_code == 2 and "it has compress, learn, stitch, eval, bench" in unknown.stderr


def test_a_recipe_makes_the_same_bytes_again(trained: Path, place: Path) -> None:
    recipe = place / "r.yaml"
    recipe.write_text(RECIPE.format(model=trained))
    ctp("run", recipe)
    ctp("run", recipe, "--set", "output=twin")
    ours, twin = files(place / "out"), files(place / "twin")
    assert ours.keys() == twin.keys() and len(ours) > 10
    assert [name for name in ours if ours[name] != twin[name] and "adapter_config" not in name] == []


def test_wait_for_no_weights_in_a_dry_run(trained: Path, place: Path) -> None:
    recipe = place / "r.yaml"
    recipe.write_text(RECIPE.format(model=trained))
    assert ctp("run", recipe, "--dry-run").stdout.count("to be made") == 6
    steps = json.loads(ctp("run", recipe, "--dry-run", "--json").stdout)["steps"]
    for stage in [stage for stage, *_ in steps]:  # as they can be made again
        ctp("run", recipe, "--redo", stage, "--dry-run")
    plan = json.loads(
        ctp("compress", trained, "--bits", 4, "--calibration", "pydoc:train", "--dry-run", "--json").stdout
    )
    assert plan["linear_layers"] == 21 and plan["windows"] > 0
    estimates = ("checkpoint_bytes", "memory_bytes", "disk_bytes", "seconds")
    assert all(isinstance(plan[name], int | float) and plan[name] > 0 for name in estimates)
    assert [path.name for path in place.iterdir()] == ["r.yaml"]


def test_gates_exit_with_4_after_finishing(trained: Path, place: Path) -> None:
    result = CliRunner().invoke(
        app, ["eval", str(trained), "--ppl", "pydoc:test", "--seqlen", "64", "--windows", "4", "--max-ppl", "1.5"]
    )
    assert result.exit_code == 4 and "max_ppl" in result.stderr and "pydoc:test" in result.stdout


def test_two_processes_do_not_make_the_same_thing(trained: Path, place: Path) -> None:
    from ctp_cli.artifact import workspace
    from ctp_cli.errors import OutputError

    with workspace(place / "x", kind="k", identity={"a": 1}) as space:
        (space.path / "work").write_text("begun")
        with pytest.raises(OutputError, match="another ctp process"), workspace(place / "x", kind="k", identity={}):
            pass


@pytest.mark.slow
@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGINT])
def test_killed_at_any_moment_a_recipe_goes_on_to_the_same_bytes(sign: int, trained: Path, place: Path) -> None:
    """Kill `ctp run` later and later until it gets through; compare with an uninterrupted run."""
    recipe = place / "r.yaml"
    recipe.write_text(RECIPE.format(model=trained))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "ctp_cli", "run", str(recipe), "--set", "output=killed"]
    for attempt in range(40):
        process = subprocess.Popen(
            command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
        )
        try:
            process.wait(timeout=4 + attempt * 1.1)
            break
        except subprocess.TimeoutExpired:
            process.send_signal(sign)
            _, errors = process.communicate()
            begun, ended = "already made" in errors or "making" in errors, "in all" in errors
            if sign == signal.SIGINT and begun and not ended:  # not while Python itself starts or stops
                assert process.returncode == 130 and "run the same command again" in errors, errors
        for manifest in (place / "killed").glob("*/ctp.json"):
            if manifest.parent.suffix != ".partial":
                json.loads(manifest.read_text())
                for weights in manifest.parent.glob("*.safetensors"):
                    load_file(weights)
        time.sleep(0.1)
    else:
        pytest.fail("it never got through")
    assert process.returncode == 0 and attempt > 0
    ctp("run", recipe)
    assert files(place / "killed") == files(place / "out")
    assert not list((place / "killed").glob("*.partial"))


def test_several_formats_hold_the_same_codes(trained: Path, place: Path) -> None:
    text = ("--calibration", "pydoc:train", "--windows", 4, "--seqlen", 64)
    formats = ("--bits", 4, "--sparsity", 0.5, "--format", "gptq,ctp,dense", "-o", "out")
    result = ctp("compress", trained, *formats, *text)
    assert result.stdout.splitlines()[-3:] == ["out", "out-ctp", "out-dense"]
    weights = [load_model(place / name).state_dict() for name in ("out", "out-ctp", "out-dense")]
    for other in weights[1:]:
        assert all(torch.equal(weights[0][name], other[name]) for name in weights[0])
    manifests = [json.loads((place / name / "ctp.json").read_text()) for name in ("out", "out-ctp", "out-dense")]
    assert [manifest["format"] for manifest in manifests] == ["gptq", "ctp", "dense"]

    refused = ctp("compress", trained, *formats, *text, code=2)
    assert "out-ctp exists" in refused.stderr
    shutil.rmtree(place / "out-dense")  # as after an interruption before the last format
    refused = ctp("compress", trained, *formats, *text, "--group-size", 32, code=2)
    assert "exists" in refused.stderr
    Path("other.txt").write_text("Another text, long enough for a few windows of sixty-four tokens each. " * 40)
    refused = ctp("compress", trained, *formats, "--calibration", "other.txt", *text[2:], code=2)
    assert "exists" in refused.stderr
    assert "would compress" in ctp("compress", trained, *formats, *text, "--dry-run").stdout
    again = ctp("compress", trained, *formats, *text)
    assert again.stdout.splitlines()[-3:] == ["out", "out-ctp", "out-dense"]
    assert "made already" in again.stderr
    assert json.loads((place / "out" / "ctp.json").read_text()) == manifests[0]
    dense = load_model(place / "out-dense").state_dict()
    assert all(torch.equal(weights[2][name], dense[name]) for name in dense)


def test_a_format_that_does_not_fit_is_refused_before_the_work(trained: Path, place: Path) -> None:
    model = tiny_model("llama", place / "odd", hidden_size=40, intermediate_size=104, head_dim=8, num_attention_heads=5)
    text = ("--calibration", "pydoc:train", "--windows", 4, "--seqlen", 64)
    asked = ("--bits", 4, "--group-size", "row", "--format", "ctp,gptq", "-o", "out")
    for more in ((), ("--dry-run",)):
        refused = ctp("compress", model, *asked, *text, *more, code=2)
        assert "no multiple of 32, which format gptq needs" in refused.stderr
    assert not list(place.glob("out*"))


def test_a_dry_run_refuses_what_the_command_would(trained: Path, place: Path) -> None:
    text = ("--calibration", "pydoc:train", "--windows", 4, "--seqlen", 64)
    (place / "out.partial").mkdir()
    (place / "out.partial" / "notes.txt").write_text("mine")
    for more in ((), ("--dry-run",)):
        refused = ctp("compress", trained, "--bits", 4, *text, "-o", "out", *more, code=2)
        assert "out.partial is there and was not made by ctp" in refused.stderr


def test_a_text_too_short_for_what_was_asked_is_said(trained: Path, place: Path) -> None:
    Path("short.txt").write_text("A text that is long enough for a few windows of sixty-four tokens each. " * 12)
    said = ctp("compress", trained, "--bits", 4, "--calibration", "short.txt", "--windows", 16, "--seqlen", 64,
               "--tune-windows", 8, "-o", "out").stderr  # fmt: skip
    assert "windows of the 24 that were asked for; tuning sees" in said


def test_a_kv_prefix_from_learning_to_evaluation(trained: Path, place: Path) -> None:
    settings = ("--steps", 6, "--tokens", 8, "--batch-size", 2, "--seqlen", 48, "--validate-every", 3,
                "--text", "pydoc:train", "--validation", "pydoc:validation", "--validation-windows", 4)  # fmt: skip
    learned = ctp("learn", trained, "--method", "kv-prefix", *settings)
    assert learned.stdout.splitlines()[-1] == "small-prefix8/prompt.safetensors"
    assert f"ctp stitch small-prefix8/prompt.safetensors {trained} --format kv" in learned.stderr
    stitched = ctp("stitch", "small-prefix8", trained, "--format", "kv").stdout.splitlines()[-1]
    scoring = ("--ppl", "pydoc:test", "--seqlen", 64, "--windows", 6, "--json")
    scores = [
        json.loads(ctp("eval", trained, "--prompt", p, *scoring).stdout)["scores"] for p in ("small-prefix8", stitched)
    ]
    plain, prompted = scores[0]
    assert prompted["prompt_tokens"] == 8 and prompted["perplexity"] != plain["perplexity"]
    assert scores[1][1]["perplexity"] == prompted["perplexity"]
    refused = CliRunner().invoke(app, ["bench", str(trained), "--prompt", "small-prefix8"])
    assert refused.exit_code == 2 and "a kv-prefix, and bench times prompts" in refused.stderr
    recipe = place / "r.yaml"
    recipe.write_text(RECIPE.format(model=trained))
    ctp("run", recipe, "--set", "learn.method=kv-prefix", "--set", "stitch.format=kv")
    assert {"stitched", "benchmark"} < {path.name for path in (place / "out").iterdir()}


def test_sigterm_is_said_and_leaves_no_trace(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = []

    @reports_errors
    def command() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        finally:
            closed.append(True)

    before = signal.getsignal(signal.SIGTERM)
    for processes, said in (("1", "run the same command again"), ("2", "another process of this job has ended")):
        monkeypatch.setenv("WORLD_SIZE", processes)
        with pytest.raises(typer.Exit) as caught:
            command()
        errors = " ".join(capsys.readouterr().err.split())
        assert caught.value.exit_code == 143 and errors.count("error:") == 1 and said in errors
    assert closed == [True, True] and signal.getsignal(signal.SIGTERM) is before
