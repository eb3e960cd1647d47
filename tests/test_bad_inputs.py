"""What a user gets wrong: exit code 2, a message that says what to do, no traceback, nothing left behind."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import SafetensorError
from safetensors.torch import load as load_file_bytes
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model, tiny_tokenizer
from typer.testing import CliRunner, Result

from ctp_cli.app import app


def ctp(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refused(result: Result, *words: str, code: int = 2) -> None:
    assert result.exit_code == code, result.output
    assert "error: " in result.stderr and "Traceback" not in result.output
    assert not result.stdout.strip()
    for word in words:
        assert word in result.stderr, result.stderr


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_model("llama", tmp_path / "model")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text("a small text that is long enough for windows of eight tokens " * 60)
    return file


SMALL = ("--windows", 4, "--seqlen", 32)

COMPRESS_CASES = {
    "nothing to do": ([], ["nothing to do", "sparsity"]),
    "sparsity too large": (["--sparsity", "1.5"], ["fraction"]),
    "sparsity negative": (["--sparsity=-0.5"], ["between 0 and 1"]),
    "sparsity a word": (["--sparsity", "half"], ["0.5", "2:4"]),
    "n above m": (["--sparsity", "4:2"], ["n < m"]),
    "bits out of range": (["--bits", "5"], ["2, 3, 4 or 8"]),
    "group that does not divide": (
        ["--bits", "4", "--group-size", "48"],
        ["48", "q_proj", "64 divides those of every layer"],
    ),
    "m that does not divide": (["--sparsity", "2:7"], ["does not divide", "q_proj", "8 divides those"]),
    "more memory than there is": (["--bits", "4", "--max-memory", "9" * 400 + "GB"], ["more than any machine has"]),
    "unknown act order": (["--bits", "4", "--act-order", "sideways"], ["'none', 'column', 'group' or 'static'"]),
    "gptq without bits": (["--sparsity", "0.5", "--format", "gptq"], ["gptq", "give bits"]),
    "several formats, dense first": (["--bits", "4", "--format", "dense,gptq"], ["the first must be", "dense last"]),
    "several formats, one unknown": (["--bits", "4", "--format", "gptq,awq"], ["format", "'gptq'", "awq"]),
    "scattered groups in compressed-tensors": (
        ["--bits", "4", "--format", "compressed-tensors", "--act-order", "column"],
        ["no scattered groups", "act_order group"],
    ),
    "dampening": (["--bits", "4", "--dampening", "2"], ["dampening", "less than 1"]),
    "full target without true-sequential": (
        ["--bits", "4", "--target", "full", "--no-true-sequential"],
        ["target full", "use target layer"],
    ),
    "tuning scattered groups": (
        ["--bits", "4", "--tune-windows", "2", "--act-order", "column"],
        ["neighbouring inputs", "act_order group"],
    ),
    "n:m that differs over depth": (["--sparsity", "2:4", "--allocation", "owl"], ["allocation owl", "a fraction"]),
    "an allocation of nothing": (["--bits", "4", "--allocation", "owl"], ["allocation owl", "a fraction"]),
    "memory without a unit": (["--bits", "4", "--max-memory", "4"], ["max_memory", "500MB, 4GB"]),
    "memory in another unit": (["--bits", "4", "--max-memory", "4 parsecs"], ["max_memory", "500MB, 4GB"]),
    "no memory": (["--bits", "4", "--max-memory", "0GB"], ["max_memory", "greater than 0"]),
    "too little memory": (["--bits", "4", "--max-memory", "1MB"], ["max_memory", "0.00 GB are too little", "needed"]),
    "too little memory for whole models": (
        ["--bits", "4", "--tune-windows", "2", "--max-memory", "1MB"],
        ["too little", "loads two models whole"],
    ),
    "two problems at once": (["--bits", "7", "--sparsity", "3.5"], ["bits", "sparsity"]),
    "unknown device": (["--bits", "4", "--device", "abacus"], ["not a torch device"]),
}


@pytest.mark.parametrize(("options", "words"), COMPRESS_CASES.values(), ids=COMPRESS_CASES.keys())
def test_compress_options(options: list[str], words: list[str], model: Path, place: Path, text: Path) -> None:
    refused(ctp("compress", model, *options, "--calibration", text, *SMALL), *words)
    assert not list(place.iterdir())


def write_gzip_garbage(path: Path) -> None:
    path.write_bytes(b"not a gzip file")


def damage(path: Path, how: Callable[[bytes], bytes]) -> None:
    path.write_bytes(how(path.read_bytes()))


TEXT_CASES: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "missing": ("none.txt", lambda path: None, "no such text file"),
    "empty": ("empty.txt", lambda path: path.write_text("  \n"), "is empty"),
    "too short": ("short.txt", lambda path: path.write_text("five words are too few"), "too short"),
    "not UTF-8": ("latin.txt", lambda path: path.write_bytes(b"\xff\xfe\xe9" * 100), "UTF-8"),
    "not JSON": ("bad.jsonl", lambda path: path.write_text('{"text": "fine"}\n{oops\n'), "line 2"),
    "no such column": ("other.jsonl", lambda path: path.write_text('{"body": "x"}\n'), "no text in column 'text'"),
    "not gzip": ("rows.jsonl.gz", write_gzip_garbage, "cannot be read"),
    "not parquet": ("rows.parquet", lambda path: path.write_bytes(b"PAR1garbage"), "column"),
    "a name nobody knows": ("wikitext3", lambda path: None, "unknown text"),
}


@pytest.mark.parametrize(("name", "make", "word"), TEXT_CASES.values(), ids=TEXT_CASES.keys())
def test_texts(name: str, make: Callable[[Path], object], word: str, model: Path, place: Path, tmp_path: Path) -> None:
    path = tmp_path / name
    make(path)
    spec = path if "." in name else name
    refused(ctp("compress", model, "--bits", 4, "--calibration", spec, *SMALL), word)
    refused(ctp("eval", model, "--ppl", spec, "--seqlen", 32), word)
    assert not list(place.iterdir())


@pytest.mark.parametrize("how", ["whole", "streamed", "teacher"])
def test_a_late_token_beyond_the_table(how: str, model: Path, place: Path, tmp_path: Path) -> None:
    """A whole text is refused before learning; of a stream nobody knows before its turn comes."""
    small = tiny_model("llama", tmp_path / "small", vocab_size=319)
    tokenizer = tiny_tokenizer(bos=False)
    common, last = "0123456789 " * 12 + "0", tokenizer.decode([319])
    assert tokenizer(common + last)["input_ids"].index(319) > 100
    (tmp_path / "text.txt").write_text(common + last)
    (tmp_path / "valid.txt").write_text("9876543210 " * 20)
    command = ["learn", model if how == "teacher" else small, "--text", tmp_path / "text.txt"]
    command += ["--validation", tmp_path / "valid.txt", "--tokens", 2, "--batch-size", 2, "--seqlen", 8]
    command += ["--steps", 100, "--validate-every", 1, "--validation-windows", 2, "-o", "p"]
    command += [] if how == "whole" else ["--stream", "--shuffle-buffer", 4]
    command += ["--teacher", small] if how == "teacher" else []
    result = ctp(*command)
    refused(result, "token id 319", "319 embeddings", "is the tokenizer that of this model?")
    assert ("step 1:" in result.stderr) == (how == "streamed")
    assert not list(place.iterdir())


def test_half_precision_that_the_processor_has_not(model: Path, place: Path, text: Path) -> None:
    refused(ctp("learn", model, "--text", text, "--mixed-precision", "fp16", "--device", "cpu"), "fp16 needs a GPU")
    assert not list(place.iterdir())


def test_a_learning_rate_beyond_float32(model: Path, place: Path, text: Path) -> None:
    refused(ctp("learn", model, "--text", text, "--lr", "1e38"), "learning_rate", "less than or equal to 1000000")
    assert not list(place.iterdir())


def test_no_network(place: Path, model: Path) -> None:
    refused(ctp("eval", model, "--ppl", "wikitext2"), "cannot be loaded from the Hugging Face hub", "pydoc")
    refused(ctp("compress", "nobody/nothing", "--bits", 4), "cannot be reached", "smollm2-135m")
    assert not list(place.iterdir())


def test_unknown_models(place: Path, tmp_path: Path) -> None:
    refused(ctp("compress", "smollm2-135n", "--bits", 4), "unknown model", "did you mean smollm2-135m")
    (tmp_path / "empty").mkdir()
    refused(ctp("compress", tmp_path / "empty", "--bits", 4), "no config.json")
    (tmp_path / "strange").mkdir()
    (tmp_path / "strange" / "config.json").write_text('{"model_type": "never-heard-of"}')
    refused(ctp("compress", tmp_path / "strange", "--bits", 4), "config.json is not usable")


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "truncated": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "header cut": lambda content: content[:100],
    "header claims terabytes": lambda content: (1 << 45).to_bytes(8, "little") + content[8:],
    "header is noise": lambda content: content[:8] + os.urandom(64) + content[72:],
}


@pytest.mark.parametrize("how", DAMAGES.values(), ids=DAMAGES.keys())
def test_damaged_weights(how: Callable[[bytes], bytes], model: Path, place: Path, text: Path) -> None:
    damage(model / "model.safetensors", how)
    refused(ctp("compress", model, "--bits", 4, "--calibration", text, *SMALL), "damaged or cut off")
    refused(ctp("eval", model, "--ppl", text, "--seqlen", 32), "damaged or cut off")
    assert not list(place.iterdir())


def test_a_pickle_is_never_opened(model: Path, place: Path, text: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    refused(ctp("compress", model, "--bits", 4, "--calibration", text, *SMALL), "no model.safetensors", "pickle")


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_a_missing_tensor_and_one_of_another_shape(name: str, model: Path, place: Path, text: Path) -> None:
    state = load_file(model / "model.safetensors")
    for changed, words in (
        ({}, f"1 tensors are missing ({name}"),
        ({name: state[name][:-1].clone()}, "cannot be loaded"),
    ):
        rest = {key: tensor for key, tensor in state.items() if key != name}
        save_file(rest | changed, model / "model.safetensors", metadata={"format": "pt"})
        refused(ctp("compress", model, "--bits", 4, "--calibration", text, *SMALL), words)
    assert not list(place.iterdir())


def test_a_missing_shard(model: Path, place: Path, text: Path) -> None:
    state = load_file(model / "model.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(state, "model-00001-of-00001.safetensors")}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    (model / "model.safetensors").unlink()
    refused(ctp("compress", model, "--bits", 4, "--calibration", text, *SMALL), "is missing")


def test_prompts(model: Path, place: Path, text: Path, tmp_path: Path) -> None:
    import torch

    for name, tensors, word in (
        ("wide", {"prompt_embeddings": torch.zeros(4, 65)}, "65 wide"),
        ("flat", {"prompt_embeddings": torch.zeros(64)}, "prompt_embeddings"),
        ("other", {"weights": torch.zeros(4, 64)}, "prompt_embeddings"),
        ("nan", {"prompt_embeddings": torch.full((4, 64), float("nan"))}, "NaN"),
    ):
        path = tmp_path / f"{name}.safetensors"
        save_file(tensors, path)
        refused(ctp("stitch", path, model), word)
        refused(ctp("eval", model, "--prompt", path, "--ppl", text, "--seqlen", 32), word)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes((tmp_path / "wide.safetensors").read_bytes()[:-40])
    refused(ctp("stitch", cut, model), "cut.safetensors")
    refused(ctp("stitch", tmp_path / "none.safetensors", model), "no such file")
    assert not list(place.iterdir())


def test_existing_output_is_kept(model: Path, place: Path, text: Path) -> None:
    (place / "taken").mkdir()
    (place / "taken" / "precious").write_text("keep me")
    for command in (
        ("compress", model, "--bits", 4, "--calibration", text),
        ("learn", model, "--text", text, "--steps", 1),
        ("bench", model),
        ("eval", model, "--ppl", text),
    ):
        refused(ctp(*command, "-o", "taken"), "taken exists", "--force")
    assert (place / "taken" / "precious").read_text() == "keep me"


def test_recipes_report_all_problems_at_once(place: Path) -> None:
    recipe = place / "r.yaml"
    recipe.write_text(
        "output: x\ncompres: {bits: 4}\ncompress: {bits: 5, sparsty: 0.5}\nlearn: {steps: many, max_time: 3 weeks}\n"
    )
    words = ("did you mean compress?", "did you mean sparsity?", "compress.bits", "learn.steps", "learn.max_time")
    refused(ctp("run", recipe), *words)
    recipe.write_text("output: x\ncompress: {sparsity: 2:4}\n")  # YAML reads 2:4 as 124
    refused(ctp("run", recipe), "write '2:4'")
    for content, word in (("just text", "mapping"), ("a: [b", "not YAML"), ("output: x", "nothing to do")):
        recipe.write_text(content)
        refused(ctp("run", recipe), word)
    refused(ctp("run", place / "none.yaml"), "cannot be read")
    recipe.write_text("output: x\ncompress: {bits: 4}\n")
    refused(ctp("run", recipe, "--set", "compress.bits"), "section.key=value")
    refused(ctp("run", recipe, "--set", "compress.bitz=3"), "did you mean bits?")
    assert [path.name for path in place.iterdir()] == ["r.yaml"]


def test_a_yaml_tag_runs_nothing(place: Path) -> None:
    (place / "r.yaml").write_text("output: !!python/object/apply:os.system ['touch pwned']\n")
    refused(ctp("run", place / "r.yaml"), "not YAML")
    assert not (place / "pwned").exists()


def test_a_model_compressed_already(compressed: Path, place: Path, text: Path) -> None:
    refused(ctp("compress", compressed, "--bits", 4, "--calibration", text, *SMALL), "already quantized")
    refused(ctp("compress", compressed, "--bits", 4, "--calibration", text, *SMALL, "--dry-run"), "already quantized")


def test_usage_errors_exit_with_2(place: Path) -> None:
    assert ctp("compress", "--no-such-option").exit_code == 2
    assert ctp("stitch").exit_code == 2
    assert ctp("fly").exit_code == 2


def test_a_full_disk_is_resumable(model: Path, place: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The third shard does not fit; with room again the same command goes on and the result is the usual one."""
    from ctp_cli.checkpoints import writer

    command = ("compress", model, "--bits", 4, "--group-size", 32, "--calibration", text, *SMALL)
    assert ctp(*command, "-o", "whole").exit_code == 0
    original, written = writer.save_file, []

    def full_after_two(tensors, path, metadata=None):  # type: ignore[no-untyped-def]
        written.append(path)
        if len(written) == 3:  # half of it arrives, then the system's error as safetensors words it
            path.write_bytes(b"half")
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        original(tensors, path, metadata=metadata)

    monkeypatch.setattr(writer, "save_file", full_after_two)
    refused(ctp(*command, "-o", "cut"), "disk is full", "it goes on", code=3)
    monkeypatch.setattr(writer, "save_file", original)
    assert not Path("cut").exists() and not list(Path("cut.partial").glob("*.writing"))
    result = ctp(*command, "-o", "cut")
    assert result.exit_code == 0 and "going on" in result.stderr
    for file in Path("whole").glob("*.safetensors"):
        assert (Path("cut") / file.name).read_bytes() == file.read_bytes()
    shutil.rmtree("cut")


@pytest.mark.parametrize("form", ["gptq", "compressed-tensors", "ctp"])
def test_conversions(form: str, model: Path, place: Path, text: Path, tmp_path: Path) -> None:
    refused(ctp("convert", model, "--format", "ctp"), "not quantized", "ctp compress")
    small = tmp_path / "small"
    made = ctp("compress", model, "--bits", 4, "--format", form, "--calibration", text, *SMALL, "-o", small)
    assert made.exit_code == 0, made.output
    assert "--format" in ctp("convert", small, "--format", "awq").stderr
    refused(ctp("convert", small, "--format", "dense", "-o", small), "is what is to be read")
    shard = sorted(small.glob("*-00002-of-*.safetensors"))[0]
    content = shard.read_bytes()
    for how in DAMAGES.values():
        shard.write_bytes(how(content))
        refused(ctp("convert", small, "--format", "dense"), shard.name)
        refused(ctp("eval", small, "--ppl", text, "--seqlen", 32), shard.name)
    tensors = load_file_bytes(content)
    part = next(name for name in tensors if name.endswith(("qweight", "codes", "weight_packed")))
    tensors[part] = tensors[part][:-1].clone()
    save_file(tensors, shard, metadata={"format": "pt"})
    layer = part.rpartition(".")[0]
    for command in (["convert", small, "--format", "dense"], ["eval", small, "--ppl", text, "--seqlen", 32]):
        refused(ctp(*command), layer, "do not go together")
    shard.unlink()
    refused(ctp("convert", small, "--format", "dense"), shard.name)
    shard.write_bytes(content)
    config = small / "config.json"
    config.write_text(config.read_text().replace('"quant_method": "', '"quant_method": "un'))
    refused(ctp("eval", small, "--ppl", text, "--seqlen", 32), "un" + form)
    assert not list(place.iterdir())
