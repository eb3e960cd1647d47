"""`ctp bench` from a checkpoint folder to a finished artifact."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from ctp_cli import artifact, recipe
from ctp_cli.errors import GateFailedError, InputError, OutputError, RecipeError
from ctp_cli.progress import SilentProgress
from ctp_cli.stages import bench as stage

WIDTH = 16
SECTION = recipe.BenchSection(prompt_len=(0, 3, 5), seqlen=8, new_tokens=2, rounds=2)


@pytest.fixture(name="checkpoint", scope="module")
def _checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny-gpt2"
    config = transformers.GPT2Config(vocab_size=40, n_embd=WIDTH, n_layer=1, n_head=2, n_positions=32)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


class _Listening(SilentProgress):
    def __init__(self):
        self.lines, self.total, self.done = [], 0, 0

    def start(self, _description, total):
        self.total = total

    def advance(self, units=1, note=""):
        self.done += units

    def say(self, line):
        self.lines.append(line)


def _bench(checkpoint, output, section=SECTION, **given):
    settings = {"prompt_path": None, "device": "cpu", "force": False} | given
    return stage.bench(section, model_path=checkpoint, output=output, **settings)


def _prompt_file(path, rows, width=WIDTH):
    save_file({"prompt_embeddings": torch.randn(rows, width)}, path)
    return path


def test_an_artifact_with_numbers_figure_and_manifest(checkpoint, tmp_path):
    progress = _Listening()
    report = _bench(checkpoint, tmp_path / "out", progress=progress)
    assert report.output == tmp_path / "out"
    assert progress.done == progress.total == 5 * 3  # five configurations, untimed once and timed twice
    written = json.loads((tmp_path / "out/latency.json").read_text())
    assert written == json.loads(json.dumps(report.document))
    assert [(r["prompt_tokens"], r["prefix_reused"]) for r in written["rows"]] == [
        (0, False),
        (3, False),
        (3, True),
        (5, False),
        (5, True),
    ]
    assert written["checkpoint_bytes"] == (checkpoint / "model.safetensors").stat().st_size
    assert (tmp_path / "out/latency.png").read_bytes().startswith(b"\x89PNG")
    manifest = artifact.manifest_of(tmp_path / "out", kind="benchmark")
    assert manifest["recipe"]["bench"]["rounds"] == 2
    assert manifest["inputs"]["model"]["sha256"] == artifact.folder_fingerprint(checkpoint)
    assert {p.name for p in tmp_path.iterdir()} == {"out"}


@pytest.mark.parametrize(
    ("rows", "said"), [(9, "(9 rows)"), (5, "(5 rows)"), (4, "(4 rows), then 1 random token embeddings")]
)
def test_the_prompt_file_is_used_and_filled_up_with_random_rows(checkpoint, tmp_path, monkeypatch, rows, said):
    used, measure = [], stage.measure_latency

    def recording(model, prompt_PD, **given):
        used.append(prompt_PD)
        return measure(model, prompt_PD, **given)

    monkeypatch.setattr(stage, "measure_latency", recording)
    folder = tmp_path / "learned"
    folder.mkdir()
    file = _prompt_file(folder / "prompt.safetensors", rows)
    report = _bench(checkpoint, tmp_path / "out", prompt_path=folder)
    (prompt_PD,) = used
    assert torch.equal(prompt_PD[:rows], load_file(file)["prompt_embeddings"]) and len(prompt_PD) >= 5
    assert report.document["prompt"].endswith(said)


def test_without_a_prompt_file_random_rows_are_named_as_such(checkpoint, tmp_path):
    progress = _Listening()
    report = _bench(checkpoint, tmp_path / "out", progress=progress)
    assert report.document["prompt"].startswith("random token embeddings")
    assert any("random token embeddings" in line for line in progress.lines)


def test_a_prompt_of_another_width_is_refused_and_leaves_nothing(checkpoint, tmp_path):
    prompt = _prompt_file(tmp_path / "p.safetensors", 5, width=12)
    with pytest.raises(InputError, match="12 wide, the model's token embeddings are 16"):
        _bench(checkpoint, tmp_path / "out", prompt_path=prompt)
    assert {p.name for p in tmp_path.iterdir()} == {"p.safetensors"}


def test_too_few_positions_are_the_recipes_mistake(checkpoint, tmp_path):
    section = SECTION.model_copy(update={"seqlen": 40})
    with pytest.raises(RecipeError, match="32 learned positions; a prompt of 5, 40 text tokens and 2 new ones need 46"):
        _bench(checkpoint, tmp_path / "out", section)
    assert not list(tmp_path.iterdir())


def test_an_output_is_not_overwritten_without_force(checkpoint, tmp_path):
    _bench(checkpoint, tmp_path / "out")
    with pytest.raises(OutputError, match="exists"):
        _bench(checkpoint, tmp_path / "out")
    assert _bench(checkpoint, tmp_path / "out", force=True).output.joinpath("latency.json").exists()


def test_the_gate_fails_only_above_the_limit(checkpoint, tmp_path):
    report = _bench(checkpoint, tmp_path / "out")
    slowest = max(row.per_token_ms.median for row in report.latency.rows)
    stage.check_gate(SECTION, report)
    stage.check_gate(SECTION.model_copy(update={"max_latency_ms": slowest}), report)
    with pytest.raises(GateFailedError, match="above max_latency_ms"):
        stage.check_gate(SECTION.model_copy(update={"max_latency_ms": slowest * 0.999}), report)


@pytest.mark.parametrize("device", ["abacus", "cuda"])
def test_a_device_that_is_not_there_is_refused(checkpoint, tmp_path, device):
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("there is one here")
    with pytest.raises(RecipeError, match="device"):
        _bench(checkpoint, tmp_path / "out", device=device)
