"""What `ctp stitch` costs on models of the same vocabulary and width, and few or many layers.

    python benchmarks/stitch_cost.py [--layers 2 16] [--formats dense gptq] [--width 4096] [--vocabulary 32000]

Checkpoints are laid out as `ctp compress` writes them. Embedding table, head and hidden states are random, the weights
of the linear layers are zeros, really on disk, and out of the page cache when the clock starts. Each checkpoint is
stitched in a process of its own; imports do not count. "Read from disk" and "written to disk" are what the kernel says
of that process (/proc/self/io), so mapped files count; the least that has to be is beside them. Files are removed as
soon as they are measured: 7 GB at once with the defaults.
"""

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from ctp_cli.checkpoints import writer
from ctp_cli.checkpoints.compressed_tensors import CompressedTensorsSettings
from ctp_cli.checkpoints.formats import LayerFormat
from ctp_cli.checkpoints.gptq import GPTQSettings
from ctp_cli.checkpoints.hidden_states import POSITIONS, save_hidden_states
from ctp_cli.checkpoints.packed import PackedSettings
from ctp_cli.compression.solver import Codes
from ctp_cli.models.blocks import Block, find_blocks
from ctp_cli.models.loading import dense_skeleton
from ctp_cli.prompts.file import Prompt, save_prompt

BITS, GROUP = 4, 128
SETTINGS: dict[str, LayerFormat | None] = {
    "dense": None,
    "gptq": GPTQSettings(BITS, GROUP, symmetric=True, desc_act=False),
    "compressed-tensors": CompressedTensorsSettings(BITS, GROUP, symmetric=True),
    "ctp": PackedSettings(BITS, GROUP, symmetric=True),
}
STITCH = """
import json, sys, time
from pathlib import Path
from ctp_cli.artifact import peak_memory_bytes
from ctp_cli.recipe import StitchSection
from ctp_cli.stages.stitch import stitch
def io():
    return {k: int(v) for k, v in (line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())}
prompt, model, output = map(Path, sys.argv[1:])
before, started, cpu = io(), time.perf_counter(), time.process_time()
report = stitch(StitchSection(), prompt_path=prompt, model_path=model, output=output)
seconds, cpu, after = time.perf_counter() - started, time.process_time() - cpu, io()
print(json.dumps({
    "seconds": seconds,
    "cpu": cpu,
    "read": after["read_bytes"] - before["read_bytes"],
    "written": after["write_bytes"] - before["write_bytes"],
    "weights_written": report.written_bytes,
    "linked": report.linked_bytes,
    "mass": report.mass_max,
    "peak": peak_memory_bytes(),
}))
"""


def make(folder: Path, config: LlamaConfig, settings: LayerFormat | None) -> int:
    """A checkpoint in `folder`. Returns the bytes of its blocks."""
    folder.mkdir()
    skeleton, _ = dense_skeleton(config)
    blocks = find_blocks(skeleton)
    names = writer.ShardNames(len(blocks), settings)
    generator = torch.Generator().manual_seed(0)
    outside = {
        name: torch.randn(tensor.shape, generator=generator).to(torch.bfloat16)
        for name, tensor in skeleton.state_dict().items()
        if ".layers." not in name
    }
    writer.write_shard(folder / names.outside(), outside)
    in_blocks = 0
    for block in blocks:
        writer.write_shard(folder / names.block(block.index), dict(_zeros(block, settings)))
        in_blocks += (folder / names.block(block.index)).stat().st_size
    # as in real models, all of them share a direction
    hidden_ND = 2 * torch.randn(config.hidden_size, generator=generator)
    hidden_ND = hidden_ND + torch.randn(POSITIONS, config.hidden_size, generator=generator)
    save_hidden_states(folder, [torch.cat([hidden_ND[:1], hidden_ND])[None].to(torch.bfloat16)])
    writer.write_index(folder, settings=settings)
    writer.write_configuration(folder, skeleton, _tokenizer(config.vocab_size), settings=settings)
    return in_blocks


def _zeros(block: Block, settings: LayerFormat | None) -> Iterator[tuple[str, torch.Tensor]]:
    layers = {f"{layer.name}.weight": layer for layer in block.layers}
    for name, tensor in block.module.state_dict().items():
        full_name = f"{block.name}.{name}"
        if settings is None or full_name not in layers:
            yield full_name, torch.zeros(tensor.shape, dtype=torch.bfloat16)
        else:
            for part, packed in _packed_zeros(settings, *tensor.shape).items():
                yield f"{layers[full_name].name}.{part}", packed.clone()


@functools.cache
def _packed_zeros(settings: LayerFormat, outputs: int, inputs: int) -> dict[str, torch.Tensor]:
    middle = 2 ** (BITS - 1)
    codes = Codes(
        codes_OI=torch.full((outputs, inputs), middle, dtype=torch.uint8),
        scales_OG=torch.ones(outputs, inputs // GROUP),
        zeros_OG=torch.full((outputs, inputs // GROUP), middle, dtype=torch.uint8),
        g_idx_I=(torch.arange(inputs) // GROUP).int(),
    )
    return {name.removeprefix("layer."): tensor for name, tensor in settings.pack("layer", codes).items()}


def _tokenizer(count: int) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({f"w{index}": index for index in range(count)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="w0")


def forget(folder: Path) -> None:
    """Take the files out of the page cache, so that reading them shows."""
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
                os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 16])
    parser.add_argument("--formats", nargs="+", choices=SETTINGS, default=["dense", "gptq"])
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--folder", type=Path, help="On the disk to measure; the system's temporary one by default.")
    given = parser.parse_args()
    print(f"width {given.width}, vocabulary {given.vocabulary}, prompt of {given.tokens} tokens; MB = 10^6 bytes")
    header = (
        "format",
        "layers",
        "blocks MB",
        "seconds",
        "CPU s",
        "read MB",
        "written MB",
        "tables MB",
        "linked MB",
        "peak MB",
    )
    print("  ".join(header))
    for name in given.formats:
        for layers in given.layers:
            with tempfile.TemporaryDirectory(dir=given.folder) as place:
                folder = Path(place)
                config = LlamaConfig(
                    hidden_size=given.width,
                    intermediate_size=128 * round(86 * given.width / 4096),
                    num_hidden_layers=layers,
                    num_attention_heads=given.width // 128,
                    num_key_value_heads=given.width // 128,
                    vocab_size=given.vocabulary,
                    dtype="bfloat16",
                )
                in_blocks = make(folder / "model", config, SETTINGS[name])
                generator = torch.Generator().manual_seed(1)
                rows = torch.randn(given.tokens, given.width, generator=generator)
                save_prompt(folder / "prompt.safetensors", Prompt(rows))
                forget(folder)
                places = (folder / "prompt.safetensors", folder / "model", folder / "stitched")
                done = subprocess.run(
                    [sys.executable, "-c", STITCH, *map(str, places)], capture_output=True, text=True, check=False
                )
                if done.returncode:
                    raise SystemExit(done.stderr)
                found = json.loads(done.stdout.splitlines()[-1])
                sizes = [found[key] / 1e6 for key in ("read", "written", "weights_written", "linked", "peak")]
                figures = [in_blocks / 1e6, found["seconds"], found["cpu"], *sizes]
                print("  ".join([name, str(layers), *(f"{x:.1f}" for x in figures)]), flush=True)


if __name__ == "__main__":
    main()
