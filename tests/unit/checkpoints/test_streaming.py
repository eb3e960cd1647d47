"""Compression with one block in memory at a time: the results of a whole model, whatever is kept where."""

import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed import StopAfter, Stopped, calibration_text, files_of, run, stored_tensors
from ctp_kernels.arithmetic import fast_arithmetic
from safetensors.torch import save_file
from tiny_models import FAMILIES, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig

from ctp_cli.compression.blockwise import FullBlock, compress_block
from ctp_cli.compression.solver import SolverRule
from ctp_cli.data.sources import load_text
from ctp_cli.data.windows import token_ids, windows
from ctp_cli.errors import RecipeError
from ctp_cli.models.activations import IN_MEMORY, Activations, TensorFile
from ctp_cli.models.blocks import WalkState, copy_of, find_blocks, residual_writers, shared_inputs, start_walk
from ctp_cli.models.loading import load_model, load_tokenizer
from ctp_cli.models.resolve import resolve_model
from ctp_cli.models.streaming import BlockStream, stream_model
from ctp_cli.recipe import CompressSection
from ctp_cli.stages import passes
from ctp_cli.stages.compress import dry_run
from ctp_cli.stages.estimate import Estimate
from ctp_cli.stages.plan import solver_rule


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return calibration_text(tmp_path)


@pytest.fixture
def short_of_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """Settings under which hidden states go to files; what a tiny model needs would fit any memory."""
    monkeypatch.setattr(Estimate, "in_memory_bytes", property(lambda self: 10**15))
    made: list[Path] = []
    original = TensorFile.__init__

    def counting(self: TensorFile, folder: Path) -> None:
        made.append(folder)
        original(self, folder)

    monkeypatch.setattr(TensorFile, "__init__", counting)
    yield {"max_memory": "100GB"}
    assert made and {folder.name for folder in made} == {"out.partial"}


def compressed_whole(model: Path, text: Path, **settings: Any) -> dict[str, torch.Tensor]:
    """The oracle: every weight in memory, one block after the other."""
    section = CompressSection(
        sparsity=0.5, bits=4, group_size=32, windows=4, seqlen=32, calibration=str(text), format="dense", **settings
    )
    ids = token_ids(load_text(str(text), default_part="train"), load_tokenizer(model), most=4 * 32)
    ids_NT = windows(ids, 32, most=4, text=load_text(str(text), default_part="train"))
    network = load_model(model)
    blocks = find_blocks(network)
    rule: SolverRule = solver_rule(section, [layer for block in blocks for layer in block.layers])
    with fast_arithmetic(torch.device("cpu")):
        state = start_walk(network, blocks, [(ids_NT, None)])
        full_state = WalkState(list(state.hidden_BTD), state.calls, state.keep_BT)
        for block in blocks:
            sets, full = shared_inputs(block, state), None
            if section.target == "full":
                before = copy_of(block)
                writers = residual_writers(before, full_state, shared_inputs(before, full_state))
                full = FullBlock(before, full_state, [layer.name for layer in writers])
            compress_block(block, state, rule, sets, true_sequential=section.true_sequential, full=full)
    return network.state_dict()


@pytest.mark.parametrize("target", ["layer", "full"])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_streamed_weights_are_those_of_a_whole_model_bit_for_bit(
    family: str, target: str, tmp_path: Path, text: Path
) -> None:
    model = tiny_model(family, tmp_path / "m")
    expected = compressed_whole(model, text, target=target)
    run(model, tmp_path / "out", text, format="dense", target=target)
    ours = load_model(tmp_path / "out").state_dict()
    assert ours.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(ours[name], expected[name])] == []


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_that_no_checkpoint_holds_is_as_in_a_loaded_model(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny_model(family, tmp_path / "m", dtype=dtype)
    whole, stream = load_model(model), stream_model(model)
    expected = dict(whole.named_buffers())
    assert dict(stream.network.named_buffers()).keys() == expected.keys()
    for name, buffer in stream.network.named_buffers():
        assert buffer.dtype == expected[name].dtype
        assert torch.equal(buffer, expected[name]), name
    for block in stream.blocks:
        stream.open(block)
        for name, parameter in block.module.named_parameters():
            assert torch.equal(parameter, whole.get_parameter(f"{block.name}.{name}"))


@pytest.mark.parametrize("given", [{"temperature": 0.5, "do_sample": True}, None])
def test_settings_of_generation_are_as_in_a_loaded_model(given: dict[str, Any] | None, tmp_path: Path) -> None:
    model = tiny_model("llama", tmp_path / "m")
    file = model / "generation_config.json"
    file.unlink()
    if given is not None:
        file.write_text(json.dumps(given))
    for name, network in (("whole", load_model(model)), ("streamed", stream_model(model).network)):
        network.generation_config.save_pretrained(tmp_path / name)
        network.config.save_pretrained(tmp_path / name)
    assert files_of(tmp_path / "streamed") == files_of(tmp_path / "whole")


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {}),
        ("gpt2", {"target": "full"}),
        ("opt350", {"true_sequential": False}),
        ("gpt_neox", {"target": "full", "bits": None, "format": "dense"}),  # attention and MLP beside one another
        ("llama", {"quantizer": "rtn", "pruner": "magnitude", "refine": 0}),
    ],
    ids=["llama", "gpt2-full", "opt350-parallel", "neox-full", "llama-rtn"],
)
def test_hidden_states_in_files_change_no_byte(
    family: str, settings: dict[str, object], tmp_path: Path, text: Path, short_of_memory: dict[str, str]
) -> None:
    model = tiny_model(family, tmp_path / "m", dtype=torch.bfloat16)
    run(model, tmp_path / "whole", text, windows=70, **settings)  # in two batches
    run(model, tmp_path / "out", text, windows=70, **settings, **short_of_memory)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


@pytest.mark.parametrize("settings", [{}, {"target": "full", "format": "ctp"}], ids=["layer", "full"])
def test_a_run_in_files_stops_and_goes_on_in_files_or_in_memory(
    tmp_path: Path, text: Path, settings: dict[str, str], short_of_memory: dict[str, str]
) -> None:
    model = tiny_model("llama_tied_gqa", tmp_path / "m", num_hidden_layers=3)
    run(model, tmp_path / "whole", text, **settings)
    for then in (short_of_memory, {}):
        with pytest.raises(Stopped):
            run(model, tmp_path / "out", text, progress=StopAfter(2), **settings, **short_of_memory)
        left = {path.suffix for path in (tmp_path / "out.partial").iterdir()}
        assert left == {".safetensors", ".layers", ".json"}, "files of hidden states have no names to be left under"
        run(model, tmp_path / "out", text, **settings, **then)
        assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
        shutil.rmtree(tmp_path / "out")


def test_a_disk_without_room_for_hidden_states_leaves_nothing(
    tmp_path: Path, text: Path, short_of_memory: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    model = tiny_model("llama", tmp_path / "m")
    run(model, tmp_path / "whole", text)
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        run(model, tmp_path / "out", text, **short_of_memory)
    monkeypatch.undo()
    run(model, tmp_path / "out", text)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


@pytest.mark.parametrize("target", ["layer", "full"])
def test_one_block_is_in_memory_and_every_weight_is_read_once(
    target: str, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama", tmp_path / "m", num_hidden_layers=4)
    there: list[set[str]] = []
    reads: list[str] = []
    streams: list[BlockStream] = []
    read, solve = BlockStream._read, passes.compress_block

    def reading(self: BlockStream, module: torch.nn.Module, sources: dict[str, Any]) -> Any:
        streams[:] = [self]
        reads.extend(source.name for source in sources.values())
        yield from read(self, module, sources)
        there.append(materialized(self))

    def solving(*args: Any, **kwargs: Any) -> Any:
        results = solve(*args, **kwargs)
        there.append(materialized(streams[0]))
        outside_of_blocks = {name for name, x in streams[0].network.named_parameters() if not x.is_meta}
        assert all(name.startswith("model.layers.") for name in outside_of_blocks)
        return results

    monkeypatch.setattr(BlockStream, "_read", reading)
    monkeypatch.setattr(passes, "compress_block", solving)
    run(model, tmp_path / "out", text, target=target)
    assert len(there) >= 8
    assert max(len(blocks) for blocks in there) == 1
    assert sorted(reads) == sorted(name for name in stored_tensors(model) if ".layers." in name)
    assert materialized(streams[0]) == set()


def materialized(stream: BlockStream) -> set[str]:
    """The blocks of which any parameter is in memory."""
    return {b.name for b in stream.blocks if any(not x.is_meta for x in b.module.parameters())}


def test_the_layout_of_the_checkpoint_does_not_matter(tmp_path: Path, text: Path) -> None:
    """Many shards, blocks torn apart by them, and names without the model's prefix, as GPT-2's first checkpoint has."""
    single = tiny_model("gpt2", tmp_path / "a" / "m")
    network = AutoModelForCausalLM.from_pretrained(single)
    sharded, bare = tmp_path / "b" / "m", tmp_path / "c" / "m"
    network.save_pretrained(sharded, max_shard_size="60KB")
    assert len(list(sharded.glob("*.safetensors"))) > 4
    network.save_pretrained(bare)
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in stored_tensors(single).items()}
    save_file(tensors, bare / "model.safetensors", metadata={"format": "pt"})
    run(single, tmp_path / "single", text)
    for model in (sharded, bare):
        load_tokenizer(single).save_pretrained(model)
        run(model, tmp_path / "out", text, force=True)
        assert files_of(tmp_path / "out") == files_of(tmp_path / "single")


def test_memory_decides_where_hidden_states_are(tmp_path: Path) -> None:
    needs = Estimate(3_000_000_000, 2_000_000_000, 1, 1, 1, 1.0, 1.0, 1.0)
    for unlimited in (None, 5_000_000_000):
        assert needs.activations(unlimited, tmp_path) == IN_MEMORY
    assert needs.activations(4_999_999_999, tmp_path) == Activations(tmp_path)
    with pytest.raises(RecipeError, match=r"max_memory: 2\.90 GB are too little, about 3\.00 GB"):
        needs.activations(2_900_000_000, tmp_path)


def planned(folder: Path, layers: int, text: Path, **settings: Any) -> dict[str, Any]:
    """What is said by a dry run on a folder that holds a configuration and a tokenizer, and no weights."""
    config = LlamaConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=layers,
        num_attention_heads=16,
        vocab_size=320,
        dtype="bfloat16",
    )
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    tiny_tokenizer(bos=True).save_pretrained(folder)
    section = CompressSection(bits=4, calibration=str(text), seqlen=32, **settings)
    plan = dry_run(section, model=resolve_model(str(folder)), output=folder / "out")
    assert json.loads(json.dumps(plan)) == plan
    return plan


def test_a_dry_run_needs_no_weights_and_memory_does_not_grow_with_depth(tmp_path: Path, text: Path) -> None:
    short, long = (planned(tmp_path / str(layers), layers, text, windows=4) for layers in (2, 40))
    assert short["memory_bytes"] == long["memory_bytes"]
    assert 15 < long["checkpoint_bytes"] / short["checkpoint_bytes"] < 21
    assert long["seconds"] > short["seconds"]
    tuned = planned(tmp_path / "tuned", 40, text, windows=4, tune_windows=2)
    # two models of 40 x 16.7 million parameters in two bytes, and 20 bytes per weight to tune them
    assert tuned["memory_bytes"] > long["memory_bytes"] + 40 * 16.7e6 * 24


def test_tensors_in_a_file(tmp_path: Path) -> None:
    tensors = TensorFile(tmp_path)
    values = [torch.randn(3, 5, generator=torch.Generator().manual_seed(i)).to(torch.bfloat16) for i in range(4)]
    for value in values:
        tensors.append(value)
    assert len(tensors) == 4 and list(tmp_path.iterdir()) == []
    assert all(torch.equal(ours, value) for ours, value in zip(tensors, values, strict=True))
    tensors[1] = tensors[1].add_(1)  # in place
    tensors[2] = torch.arange(7)  # of another size and type
    assert torch.equal(tensors[1], values[1] + 1)
    assert torch.equal(tensors[2], torch.arange(7))
    assert torch.equal(tensors[3], values[3])
    copy = Activations(tmp_path).copied(tensors)
    tensors[0] = torch.zeros(3, 5, dtype=torch.bfloat16)
    assert torch.equal(copy[0], values[0])
