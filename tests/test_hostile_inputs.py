"""A few mutants of `benchmarks/mutations.py`, and a case for each fault that it found."""

import gzip
import json
import random
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hostile import KINDS, Inputs, Mutant, judge, mutant
from test_bad_inputs import SMALL, ctp, damage, refused
from tiny_models import tiny_model

from ctp_cli.artifact import file_fingerprint
from ctp_cli.data.sources import load_text
from ctp_cli.errors import CtpError, InputError, RecipeError
from ctp_cli.files import read_json
from ctp_cli.models.loading import load_config, load_model, load_tokenizer, weight_files
from ctp_cli.recipe import load

HUGE = "1" + "0" * 5000


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return Inputs(tmp_path_factory.mktemp("hostile") / "inputs")


@pytest.mark.parametrize("kind", KINDS)
def test_mutants(kind: str, inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CTP_CACHE", str(inputs.cache))
    for index in range(12):
        place = tmp_path / str(index)
        place.mkdir()
        monkeypatch.chdir(place)
        made = mutant(kind, random.Random(f"0 {kind} {index}"), inputs, place)
        assert judge(made, place).fault is None, (index, made)


def test_what_is_left_behind_or_changed_is_a_fault(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ("eval", str(inputs.folder / "dense"), "--ppl", "none.txt")
    assert judge(Mutant(command, ""), tmp_path).fault is None

    def leaves(*_: object, **__: object) -> None:
        Path("out.partial").mkdir()
        raise InputError("refused, but not without a trace")

    monkeypatch.setattr("ctp_cli.stages.eval.evaluate", leaves)
    assert judge(Mutant(command, ""), tmp_path).fault == "left out.partial"


def recipe_error(path: Path, content: str) -> str:
    path.write_text(content)
    with pytest.raises(RecipeError) as caught:
        load(path)
    assert len(caught.value.message) < 10_000
    return caught.value.message


def test_recipes_that_are_small_and_stand_for_much(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    bomb = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 25))
    assert "*a0 stands for a list" in recipe_error(file, f"{bomb}output: x\neval: {{ppl: *a24}}\n")
    assert "write it out" in recipe_error(file, "output: x\neval: &e {seqlen: 16}\nbench: {<<: *e}\n")
    file.write_text("output: x\neval: {seqlen: &s 16}\nbench: {seqlen: *s}\n")
    assert load(file).bench.seqlen == 16  # type: ignore[union-attr]


def test_recipes_whose_message_would_be_endless(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    many = "".join(f"key{i}: {i}\n" for i in range(500))
    assert "and 481 problems more" in recipe_error(file, many)  # one more: no output
    assert "longer than" in recipe_error(file, "a: " + "x" * 300_000)
    assert "..." in recipe_error(file, f"output: x\nseed: '{'x' * 100_000}'\n")


def test_recipes_with_values_that_python_cannot_write(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    assert "64 bits" in recipe_error(file, f"output: x\nseed: 0x{'f' * 5000}\n")
    for text in ('"\\ud800"', '"a\\0b"'):
        assert "output" in recipe_error(file, f"output: {text}\neval: {{}}\n")


def test_numbers_of_thousands_of_digits_are_no_json(tmp_path: Path) -> None:
    for name, content in (("x.json", f'{{"a": {HUGE}}}'), ("x.jsonl", f'{{"text": "a", "n": {HUGE}}}\n')):
        (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=r"x\.json"):
        read_json(tmp_path / "x.json")
    with pytest.raises(InputError, match="line 1"):
        load_text(str(tmp_path / "x.jsonl"), default_part="test")


@pytest.mark.parametrize("line", [b'{"text": "%s"}\n', b" %s\n", b'{"text": "%s'])
def test_a_gzip_bomb_is_refused_early(line: bytes, tmp_path: Path) -> None:
    with gzip.open(tmp_path / "x.jsonl.gz", "wb", compresslevel=1) as bomb:
        for _ in range(100):
            bomb.write(line % (b" " * 1_000_000))
    with pytest.raises(InputError, match=r"unpacks to more|not JSON"):
        load_text(str(tmp_path / "x.jsonl.gz"), default_part="test")


def test_parquet_of_other_things_than_text(tmp_path: Path) -> None:
    one_text = pyarrow.array([0] * 3000, pyarrow.int32())
    for column, words in (
        (pyarrow.array([2**62], pyarrow.timestamp("us")), "holds timestamp"),
        (pyarrow.array([1, 2]), "holds int64"),
        (pyarrow.DictionaryArray.from_arrays(one_text, ["a" * 300_000]), "unpacks to more"),
    ):
        pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "x.parquet")
        with pytest.raises(InputError, match=words):
            load_text(str(tmp_path / "x.parquet"), default_part="test")
    packed = pyarrow.array(["one", "two"]).dictionary_encode()
    pyarrow.parquet.write_table(pyarrow.table({"text": packed}), tmp_path / "x.parquet")
    assert load_text(str(tmp_path / "x.parquet"), default_part="test").content == "one\n\ntwo"


def changed_config(folder: Path, **settings: object) -> Path:
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | settings))
    return folder


def test_what_libraries_raise_as_bare_exceptions(tmp_path: Path) -> None:
    model = changed_config(tiny_model("llama", tmp_path / "m"), vocab_size="many")
    with pytest.raises(InputError, match=r"config\.json is not usable"):
        load_config(model)
    damage(model / "tokenizer.json", lambda content: content.replace(b'"type": "BPE"', b'"type": "XYZ"'))
    with pytest.raises(InputError, match="tokenizer cannot be loaded"):
        load_tokenizer(model)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_hidden_layers": 2**31}, "more than 1024"),
        ({"text_config": {"n_layer": 2**40}}, "more than 1024"),
        ({"intermediate_size": 2**20}, "parameters, the weight files hold"),
        ({"hidden_size": 2**62}, "no model can be made"),
        ({"num_attention_heads": -1}, "no model can be made"),
    ],
)
def test_sizes_that_fill_the_memory(settings: dict[str, object], words: str, tmp_path: Path) -> None:
    with pytest.raises(CtpError, match=words):
        load_model(changed_config(tiny_model("llama", tmp_path / "m"), **settings))


def test_a_model_without_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = changed_config(tiny_model("llama", tmp_path / "m"), num_hidden_layers=0)
    refused(ctp("compress", model, "--bits", 4, "--calibration", "pydoc", *SMALL, "--dry-run"), "num_hidden_layers=0")


def test_a_limit_of_tokens_that_is_no_number(tmp_path: Path) -> None:
    model = tiny_model("llama", tmp_path / "m")
    config = model / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_max_length": [512]}))
    with pytest.raises(InputError, match="model_max_length"):
        load_tokenizer(model)


def test_a_damaged_manifest_is_refused_before_anything_is_measured(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = tiny_model("llama", tmp_path / "m")
    (model / "ctp.json").write_text('{"kind": ')
    text = inputs.folder / "text.txt"
    refused(ctp("eval", model, "--ppl", text, "--windows", 2, "--seqlen", 16, "-o", "out"), "ctp.json")
    assert not list(tmp_path.glob("out*"))


def test_links_that_lead_nowhere(inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for target in ("nowhere", "link", "/dev/zero"):
        (tmp_path / "link").unlink(missing_ok=True)
        (tmp_path / "link").symlink_to(target)
        with pytest.raises(InputError, match="link"):
            file_fingerprint(tmp_path / "link")
    model = tiny_model("llama", tmp_path / "m", hidden_size=32, intermediate_size=64, bos=False)
    (model / "notes.txt").symlink_to("nowhere")
    refused(ctp("stitch", inputs.folder / "soft.safetensors", model), "notes.txt: cannot be read")


def test_an_index_that_names_a_tensor_its_file_lacks(inputs: Inputs, tmp_path: Path) -> None:
    import shutil

    for name, command in (("stitched", ["unstitch"]), ("gptq", ["convert", "--format", "dense"])):
        model = shutil.copytree(inputs.folder / name, tmp_path / name)
        for file in model.glob("*.safetensors"):
            damage(file, lambda content: content.replace(b'"lm_head.weight"', b'"lm_head.wrongs"'))
            damage(file, lambda content: content.replace(b"0.self_attn.q_proj.scales", b"0.self_attn.q_proj.scalez"))
        refused(ctp(*command, model, "-o", tmp_path / "out"), "does not contain tensor")
        assert not (tmp_path / "out").exists()


def test_messages_command_no_terminal(tmp_path: Path) -> None:
    model = changed_config(tiny_model("llama", tmp_path / "m"), quantization_config={"quant_method": "\x1b[2J"})
    result = ctp("eval", model, "--ppl", "pydoc", *SMALL)
    assert result.exit_code == 2 and "\x1b" not in result.stderr


@pytest.mark.parametrize("name", ["a" * 300, "model\0.safetensors", "../model.safetensors", 3])
def test_an_index_names_files_beside_it(name: object, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    with pytest.raises(InputError, match="no usable weight_map"):
        weight_files(tmp_path)
