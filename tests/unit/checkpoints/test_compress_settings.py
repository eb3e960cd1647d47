"""Settings of a compression run that change what is stored, on one family, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from compressed import block_linears, calibration_text, run, stored_tensors
from tiny_models import VOCAB_SIZE, tiny_model
from transformers import AutoModelForCausalLM

from ctp_cli.checkpoints.hidden_states import load_hidden_states
from ctp_cli.data.sources import load_text
from ctp_cli.data.windows import token_ids, windows
from ctp_cli.errors import CtpError, InputError, OutputError, RecipeError, SolverError
from ctp_cli.models.blocks import find_blocks
from ctp_cli.models.loading import load_model, load_tokenizer


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("llama_tied_gqa", tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return calibration_text(tmp_path)


def logits(model: torch.nn.Module) -> torch.Tensor:
    ids = torch.randint(3, VOCAB_SIZE, (2, 20), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        return model(ids).logits.float()


@pytest.mark.parametrize(
    "settings",
    [
        {"bits": 2, "symmetric": False},
        {"bits": 3},
        {"bits": 3, "symmetric": False, "sparsity": "2:4"},
        {"bits": 8, "symmetric": False, "group_size": "row"},
        {"bits": 4, "act_order": "column", "symmetric": False},
        {"bits": 4, "act_order": "static"},
        {"bits": 4, "act_order": "static", "group_size": "row"},
        {"bits": 4, "sparsity": None, "quantizer": "rtn"},
        {"bits": 4, "pruner": "wanda", "act_order": "none", "true_sequential": False, "target": "layer"},
    ],
    ids=lambda settings: "-".join(f"{key}={value}" for key, value in settings.items()),
)
def test_both_formats_hold_the_same_model(llama: Path, text: Path, tmp_path: Path, settings: dict[str, object]) -> None:
    run(llama, tmp_path / "dense", text, format="dense", **settings)
    run(llama, tmp_path / "gptq", text, format="gptq", **settings)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()
    # the same codes and float16-exact scales; float32 products of them are made in the same way
    torch.testing.assert_close(logits(load_model(tmp_path / "gptq")), logits(dense), rtol=1e-5, atol=1e-5)
    stored = json.loads((tmp_path / "gptq" / "quantize_config.json").read_text())
    assert stored["bits"] == settings["bits"]
    assert stored["sym"] == settings.get("symmetric", True)
    assert stored["desc_act"] == (settings.get("act_order") == "column")
    # scales fitted before the first input is taken; one group for all inputs is fitted at their first, like any other
    assert stored["static_groups"] == (settings.get("act_order") == "static" and "group_size" not in settings)
    assert stored["group_size"] == (-1 if settings.get("group_size") == "row" else 32)


@pytest.mark.parametrize(("sparsity", "kept", "of"), [("2:4", 2, 4), (0.75, 16, 64)])
def test_a_mask_stays_while_weights_are_tuned_for_and_aim_at_the_full_model(
    llama: Path, text: Path, tmp_path: Path, sparsity: str | float, kept: int, of: int
) -> None:
    run(llama, tmp_path / "it", text, format="dense", sparsity=sparsity, tune_windows=2, target="full")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "it")
    for name in block_linears(model):
        weight_OI = model.get_submodule(name).weight
        if of == 4:
            assert ((weight_OI.view(-1, of) != 0).sum(1) <= kept).all(), name
        assert (weight_OI != 0).float().mean() <= kept / of, name


def test_pruning_alone_can_aim_at_the_full_model(llama: Path, text: Path, tmp_path: Path) -> None:
    for target in ("full", "layer"):
        run(llama, tmp_path / target, text, format="dense", bits=None, target=target)
    full, layer = (stored_tensors(tmp_path / target) for target in ("full", "layer"))
    name = next(name for name in full if name.endswith("1.mlp.down_proj.weight"))
    assert not torch.equal(full[name], layer[name])


@pytest.mark.parametrize("tuned", [{}, {"tune_windows": 4}, {"tune_windows": 4, "tune": "scales"}], ids=str)
def test_hidden_states_that_are_kept_are_those_of_the_finished_checkpoint(
    llama: Path, text: Path, tmp_path: Path, tuned: dict[str, object]
) -> None:
    run(llama, tmp_path / "it", text, format="dense", **{"tune_learning_rate": 0.05, **tuned} if tuned else {})
    kept_ND, model = load_hidden_states(tmp_path / "it"), load_model(tmp_path / "it")
    given = load_text(str(text), default_part="train")
    ids_NT = windows(token_ids(given, load_tokenizer(llama)), 32, most=4, text=given)
    seen: list[torch.Tensor] = []
    blocks = find_blocks(model)
    blocks[-1].module.register_forward_hook(lambda block, args, output: seen.append(output))
    with torch.no_grad():
        model(ids_NT)
    there_ND = (seen[0] if isinstance(seen[0], torch.Tensor) else seen[0][0])[:, 1:].flatten(0, 1)
    assert kept_ND is not None and len(kept_ND) == len(there_ND)
    torch.testing.assert_close(kept_ND, there_ND, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("settings", [{"bits": None}, {"sparsity": None}, {"pruner": "wanda"}], ids=str)
def test_inputs_that_are_no_numbers_are_said_with_their_layer(
    text: Path, tmp_path: Path, settings: dict[str, object]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model("llama_tied_gqa", tmp_path / "model"))
    model.get_input_embeddings().weight.data[3:] = float("nan")
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(SolverError, match=r"q_proj: its calibration inputs hold NaN"):
        run(tmp_path / "model", tmp_path / "it", text, **{"format": "dense", **settings})


def test_weights_beyond_the_scales_are_said_with_their_layer(text: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model("llama_tied_gqa", tmp_path / "model"))
    model.get_submodule("model.layers.0.mlp.gate_proj").weight.data *= 1e8
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(SolverError, match=r"0\.mlp\.gate_proj.* too large for torch\.float16 scales"):
        run(tmp_path / "model", tmp_path / "it", text, sparsity=None, mse_clip=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_keep_their_dtype(tmp_path: Path, text: Path, dtype: torch.dtype) -> None:
    original = tiny_model("llama_tied_gqa", tmp_path / "original", dtype=dtype)
    run(original, tmp_path / "dense", text, format="dense")
    run(original, tmp_path / "gptq", text, format="gptq")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype="auto").eval()
    ours = load_model(tmp_path / "gptq")
    assert ours.dtype == dense.dtype == dtype
    for name in block_linears(dense):  # float32 value = code * scale, rounded once to the model's dtype: equal bits
        assert torch.equal(ours.get_submodule(name).weight, dense.get_submodule(name).weight)
    in_float32 = load_model(tmp_path / "gptq", dtype=torch.float32)
    # unrounded, a weight differs from the rounded one by half a unit in its last place at most
    tolerance = torch.finfo(dtype).eps / 2
    for name in block_linears(dense):
        torch.testing.assert_close(
            in_float32.get_submodule(name).weight, dense.get_submodule(name).weight.float(), rtol=tolerance, atol=1e-7
        )
    for name, tensor in stored_tensors(tmp_path / "gptq").items():
        if "embed" in name or "norm" in name:
            assert tensor.dtype == dtype


def test_the_report_counts_what_lies_on_the_disk(llama: Path, text: Path, tmp_path: Path) -> None:
    report = run(llama, tmp_path / "out", text)
    model = AutoModelForCausalLM.from_pretrained(llama)
    parameters = sum(p.numel() for p in {id(p): p for p in model.parameters()}.values())
    on_disk = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert report.checkpoint_bytes == on_disk
    assert report.original_bytes == parameters * 4
    assert report.bits_per_weight == pytest.approx(on_disk * 8 / parameters)
    manifest = json.loads((tmp_path / "out" / "ctp.json").read_text())
    assert manifest["kind"] == "compressed-checkpoint"
    layers = manifest["results"]["layers"]
    assert {layer["name"] for layer in layers} == block_linears(model)
    assert all(layer["calibration_tokens"] == 4 * 32 for layer in layers)
    assert max(layer["relative_error"] for layer in layers) < 1
    assert min(layer["relative_error"] for layer in layers) > 0
    assert sum(layer["zeros"] for layer in layers) >= sum(layer["weights"] for layer in layers) // 2
    assert any("no smaller" in note for note in report.notes)


@pytest.mark.parametrize(
    ("settings", "form"),
    [({}, "ctp"), ({"sparsity": None}, "gptq"), ({"bits": None}, "dense"), ({"format": "gptq"}, "gptq")],
)
def test_what_is_pruned_and_quantized_is_stored_in_format_ctp(
    llama: Path, text: Path, tmp_path: Path, settings: dict[str, object], form: str
) -> None:
    run(llama, tmp_path / "out", text, **{"format": "auto", **settings})
    assert json.loads((tmp_path / "out" / "ctp.json").read_text())["format"] == form
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config.get("quantization_config", {"quant_method": "dense"})["quant_method"] == form


def test_auto_groups_are_the_largest_that_divide_every_layer(llama: Path, text: Path, tmp_path: Path) -> None:
    run(llama, tmp_path / "out", text, group_size="auto")  # widths 64 and 128
    assert json.loads((tmp_path / "out" / "quantize_config.json").read_text())["group_size"] == 64


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (
            {"group_size": 48},
            RecipeError,
            r"compress\.group_size: 48 does not divide the 64 inputs of model\.layers\.0",
        ),
        ({"sparsity": "5:48"}, RecipeError, r"compress\.sparsity: m = 48 does not divide the 64 inputs"),
        ({"sparsity": "3:16", "group_size": 8, "seqlen": 100000}, InputError, r"too short: \d+ tokens"),
    ],
)
def test_what_cannot_work_is_refused_and_leaves_nothing_behind(
    llama: Path, text: Path, tmp_path: Path, settings: dict[str, object], error: type[CtpError], message: str
) -> None:
    with pytest.raises(error, match=message):
        run(llama, tmp_path / "out", text, **settings)
    assert sorted(path.name for path in tmp_path.iterdir()) == [text.name]


def test_a_quantized_model_and_an_existing_output_are_refused(llama: Path, text: Path, tmp_path: Path) -> None:
    run(llama, tmp_path / "out", text)
    with pytest.raises(InputError, match="already quantized"):
        run(tmp_path / "out", tmp_path / "again", text)
    before = (tmp_path / "out" / "ctp.json").read_bytes()
    with pytest.raises(OutputError, match="out exists"):
        run(llama, tmp_path / "out", text)
    assert (tmp_path / "out" / "ctp.json").read_bytes() == before
    run(llama, tmp_path / "out", text, bits=8, force=True)
    assert json.loads((tmp_path / "out" / "quantize_config.json").read_text())["bits"] == 8


def test_a_run_repeats_bit_for_bit(llama: Path, text: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        run(llama, tmp_path / name, text)
    one, two = (stored_tensors(tmp_path / name) for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(("symmetric", "form"), [(True, "gptq"), (False, "gptq_v2")])
def test_asymmetric_checkpoints_are_version_2(symmetric: bool, form: str, tmp_path: Path) -> None:
    """GPTQModel refuses asymmetric v1 files of other makers; both forms must load to the same weights as dense."""
    from tiny_models import tiny_model
    from transformers import AutoModelForCausalLM

    from ctp_cli.models.loading import load_model
    from ctp_cli.models.resolve import resolve_model
    from ctp_cli.recipe import CompressSection
    from ctp_cli.stages.compress import compress

    model = resolve_model(str(tiny_model("llama", tmp_path / "model")))
    text = tmp_path / "text.txt"
    text.write_text("words that the calibration reads, again and again, " * 60)
    for kind in ("gptq", "dense"):
        section = CompressSection(
            bits=4, group_size=32, symmetric=symmetric, calibration=str(text), windows=4, seqlen=32, format=kind
        )
        compress(section, model=model, output=tmp_path / kind)
    config = json.loads((tmp_path / "gptq" / "config.json").read_text())["quantization_config"]
    assert config["checkpoint_format"] == form and config["sym"] == symmetric
    ids = torch.randint(5, 300, (2, 16))
    ours, plain = load_model(tmp_path / "gptq"), AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    torch.testing.assert_close(ours(ids).logits, plain(ids).logits, rtol=1e-5, atol=1e-5)


def test_files_are_readable_by_others(tmp_path: Path) -> None:
    """A server that runs as another user reads them; safetensors alone makes them private."""
    import os

    from ctp_cli.checkpoints.writer import write_shard

    mask = os.umask(0o022)
    try:
        write_shard(tmp_path / "a.safetensors", {"x": torch.zeros(2)})
    finally:
        os.umask(mask)
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == 0o644
