"""`--packed`: quantized checkpoints of every format stay packed in memory, and compute what their dense twins do."""

import copy
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from ctp_kernels import dispatch
from safetensors.torch import load_file, save_file
from tiny_models import VOCAB_SIZE, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM

import ctp_cli.integration  # noqa: F401 - registers the format
from ctp_cli import memory
from ctp_cli.checkpoints.packed_linear import PackedLinear
from ctp_cli.errors import InputError
from ctp_cli.models.loading import load_model
from ctp_cli.models.resolve import resolve_model
from ctp_cli.models.sharding import Frozen
from ctp_cli.recipe import CompressSection, EvalSection, LearnSection
from ctp_cli.stages import eval as eval_stage
from ctp_cli.stages import learn as learn_stage
from ctp_cli.stages.compress import compress
from ctp_cli.stages.eval import Target, evaluate
from ctp_cli.stages.learn import learn_prompt

WORDS = "A layer is made dense while it is multiplied, and forgotten. " * 60


def text(folder: Path) -> str:
    (folder / "text.txt").write_text(WORDS)
    return str(folder / "text.txt")


def compressed(family: str, folder: Path, **settings: Any) -> Path:
    model = tiny_model(family, folder / "model")
    small = {"bits": 4, "group_size": 32, "windows": 4, "seqlen": 32, "calibration": text(folder)}
    compress(CompressSection(**{**small, **settings}), model=resolve_model(str(model)), output=folder / "small")
    return folder / "small"


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama_tied_gqa", {"format": "gptq"}),
        ("llama_tied_gqa", {"format": "gptq", "symmetric": False, "act_order": "column", "bits": 3}),
        ("llama_tied_gqa", {"format": "compressed-tensors", "bits": 8}),
        ("llama_tied_gqa", {"sparsity": 0.5}),
        ("opt", {"format": "gptq", "group_size": "row"}),
        ("gpt2", {"format": "gptq"}),
    ],
)
def test_logits_of_packed_layers_are_those_of_dense_ones(family: str, settings: dict[str, Any], tmp_path: Path) -> None:
    path = compressed(family, tmp_path, **settings)
    dense, packed = load_model(path), load_model(path, packed=True)
    in_blocks = {name for name, m in dense.named_modules() if isinstance(m, nn.Linear) or "Conv1D" in type(m).__name__}
    layers = {name for name, module in packed.named_modules() if isinstance(module, PackedLinear)}
    assert layers == in_blocks - {"lm_head"}
    assert not any(parameter.is_meta for parameter in packed.parameters()), "nothing is left to be filled"
    assert sum(p.numel() for p in packed.parameters()) < sum(p.numel() for p in dense.parameters())
    in_layers = sum(tensor.nbytes for m in packed.modules() if isinstance(m, PackedLinear) for tensor in m.buffers())
    others = Frozen(packed).held_bytes() - sum(p.nbytes for p in packed.parameters()) - in_layers
    assert in_layers > 0 and 0 <= others < 1000, "what layers hold is counted; others hold the frequencies of positions"
    ids = torch.randint(3, VOCAB_SIZE, (2, 20), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        torch.testing.assert_close(packed(ids).logits, dense(ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("told", ["0", "1"])
def test_how_products_are_made_can_be_told_wherever_a_model_comes_from(
    told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = compressed("llama_tied_gqa", tmp_path, sparsity=0.5)
    monkeypatch.setenv("CTP_INT8_ACTIVATIONS", told)
    monkeypatch.setenv("CTP_DENSE_CODES", told)
    for model in (load_model(path, packed=True), AutoModelForCausalLM.from_pretrained(path)):
        layers = [module for module in model.modules() if isinstance(module, PackedLinear)]
        assert {layer.int8_activations for layer in layers} == {told == "1"}
        assert {layer.dense_codes_on for layer in layers} == {frozenset({"cpu", "cuda"} if told == "1" else {})}


@pytest.mark.parametrize(
    ("decoding", "pairs", "free_share", "dense"),
    [(True, False, 2.0, True), (True, False, 1.99, False), (True, True, 1e9, False), (False, False, 1e9, False)],
)
def test_pruned_layers_are_multiplied_as_dense_codes_where_that_pays_and_memory_is_free(
    decoding: bool, pairs: bool, free_share: float, dense: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = compressed("llama_tied_gqa", tmp_path, sparsity=0.5)
    monkeypatch.setattr(dispatch.packed, "takes_pairs", lambda _: pairs)
    monkeypatch.delenv("CTP_DENSE_CODES", raising=False)
    monkeypatch.setattr(dispatch.packed, "available", lambda: decoding)
    tensors = {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}
    masks = {name: tensor for name, tensor in tensors.items() if name.endswith(".mask")}
    more = sum(4 * mask.numel() - tensors[name.replace(".mask", ".codes")].numel() for name, mask in masks.items())
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: SimpleNamespace(available=int(more * free_share)))
    for model in (load_model(path, packed=True), AutoModelForCausalLM.from_pretrained(path)):
        layers = [module for module in model.modules() if isinstance(module, PackedLinear)]
        assert len(layers) == len(masks) > 0
        assert {layer.dense_codes_on for layer in layers} == {frozenset({"cpu"} if dense else {})}


def test_a_dense_checkpoint_has_nothing_to_keep_packed(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not quantized"):
        load_model(tiny_model("llama_tied_gqa", tmp_path / "model"), packed=True)


def test_a_damaged_layer_is_named_though_nothing_is_unpacked(tmp_path: Path) -> None:
    path = compressed("llama_tied_gqa", tmp_path, sparsity=0.5)
    file = next(file for file in path.glob("*.safetensors") if "model.layers.0.mlp.up_proj.mask" in load_file(file))
    tensors = load_file(file)
    tensors["model.layers.0.mlp.up_proj.mask"][3] = 255
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"model\.layers\.0\.mlp\.up_proj: .* do not go together"):
        load_model(path, packed=True)


def watched(stage: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each model that the stage loads from now on has packed layers."""
    found = []

    def load(path: Path, **options: Any) -> Any:
        model = load_model(path, **options)
        found.append(any(isinstance(module, PackedLinear) for module in model.modules()))
        return model

    monkeypatch.setattr(stage, "load_model", load)
    return found


def test_eval_of_packed_and_dense_models_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = watched(eval_stage, monkeypatch)
    path = compressed("llama_tied_gqa", tmp_path, sparsity=0.5)
    targets = [Target("full", resolve_model(str(tmp_path / "model"))), Target("small", resolve_model(str(path)))]
    dense, packed = (
        evaluate(EvalSection(ppl=(f"mine={text(tmp_path)}",), seqlen=32, windows=4, packed=one), targets=targets)
        for one in (False, True)
    )
    assert loaded == [False, False, False, True], "full and small, without --packed and with it"
    assert packed.value("full", "mine") == dense.value("full", "mine")
    assert packed.value("small", "mine") == pytest.approx(dense.value("small", "mine"), rel=1e-5)


def test_a_prompt_learned_through_packed_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = watched(learn_stage, monkeypatch)
    path = compressed("llama_tied_gqa", tmp_path, format="gptq")
    (tmp_path / "other.txt").write_text("Another text chooses. " + WORDS)
    found = []
    for packed in (False, True):  # packed with checkpointing: what large models are learned on
        section = LearnSection(
            tokens=4, steps=3, batch_size=2, seqlen=32, validate_every=3, validation_windows=2, text=text(tmp_path),
            validation=str(tmp_path / "other.txt"), packed=packed, gradient_checkpointing=packed,
        )  # fmt: skip
        report = learn_prompt(section, models=[resolve_model(str(path))], output=tmp_path / f"prompt-{packed}")
        found.append((report.unprompted_perplexity, report.best_perplexity))
    assert loaded == [False, True]
    assert found[1] == pytest.approx(found[0], rel=1e-4)


def test_threads_multiply_while_another_one_saves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CTP_DENSE_CODES", "1")  # a form that saving has to undo
    model = load_model(compressed("llama_tied_gqa", tmp_path, sparsity=0.5), packed=True)
    stored = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ids = torch.randint(3, VOCAB_SIZE, (1, 5), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        wanted = model(ids).logits
    saved, done = 0, threading.Event()

    def multiply() -> int:
        times = 0
        with torch.no_grad():
            while not done.is_set():
                assert torch.equal(model(ids).logits, wanted)
                times += 1
        return times

    switching = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(2) as pool:
            multiplying = [pool.submit(multiply) for _ in range(2)]
            try:
                while saved < 40 and not any(other.done() for other in multiplying):
                    found = model.state_dict()
                    assert found.keys() == stored.keys()
                    assert all(torch.equal(found[name], tensor) for name, tensor in stored.items())
                    saved += 1
            finally:
                done.set()
            assert all(other.result() > 0 for other in multiplying)
    finally:
        sys.setswitchinterval(switching)
    assert saved == 40


def test_a_copy_of_a_model_that_has_multiplied_holds_its_layers_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CTP_DENSE_CODES", "1")
    model = load_model(compressed("llama_tied_gqa", tmp_path, sparsity=0.5), packed=True)
    stored = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ids = torch.randint(3, VOCAB_SIZE, (1, 5), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        wanted = model(ids).logits
        made = copy.deepcopy(model)
        for layer in (module for module in made.modules() if isinstance(module, PackedLinear)):
            weight = layer._weight
            assert weight is not None and weight.form is None and layer._form is None
            assert layer.codes is weight.stored().codes and set(dict(layer.named_buffers())) <= set(layer._names)
        assert torch.equal(made(ids).logits, wanted) and torch.equal(model(ids).logits, wanted)
    assert all(torch.equal(tensor, stored[name]) for name, tensor in made.state_dict().items())
