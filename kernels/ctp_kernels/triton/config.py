"""How large a kernel's tiles are: measured for a GPU where someone has, else from what is known about it.

M=batch x tokens N=outputs K=inputs
"""

import functools
import json
import logging
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from ctp_kernels.triton.layouts import PackedWeight, block_of

log = logging.getLogger(__name__)

TUNING = Path(__file__).parent.parent / "tuning"
"""Where `tune` keeps what it found: one file per GPU name."""
_SHARED_BYTES = {(8, 0): 166912, (8, 6): 101376, (8, 9): 101376, (9, 0): 232448, (10, 0): 232448, (12, 0): 101376}
"""What one program may use of an NVIDIA GPU's shared memory, by compute capability."""
_LEAST_SHARED_BYTES = 65536
"""The same of gfx942, and the bound for GPUs not named here."""
_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


@dataclass(frozen=True)
class Config:
    """Tiles of a fused product. block_m tokens x block_n outputs; `splits` programs share the inputs of a tile."""

    block_m: int
    block_n: int
    splits: int = 1
    warps: int = 4
    stages: int = 3


@dataclass(frozen=True)
class Device:
    """What a default is worked out from. capability (0, 0): unknown, or not NVIDIA's."""

    name: str
    capability: tuple[int, int]
    processors: int

    @property
    def shared_bytes(self) -> int:
        return _SHARED_BYTES.get(self.capability, _LEAST_SHARED_BYTES)


def choose(batch: int, weight: PackedWeight, device: Device) -> Config:
    """The measured configuration for the nearest batch size of this layer and GPU, else `default`."""
    known = measured(device.name).get(layer_key(weight), {})
    if known:
        nearest = min(known, key=lambda size: abs(bucket(batch) - size))
        return known[nearest]
    return default(batch, weight, device)


def default(batch: int, weight: PackedWeight, device: Device) -> Config:
    """As many programs as the GPU has processors twice over, by splitting inputs where outputs are too few.

    A split has four blocks or more, so that loads can run ahead; larger batches fill the GPU without.
    """
    block_m = max(16, min(_power(batch), 64))
    block_n = 64 if weight.layout == "bitmap" or weight.padded_outputs % 128 or block_m == 64 else 128
    tiles = -(-batch // block_m) * (weight.padded_outputs // block_n)
    blocks = weight.padded_inputs // weight.block
    splits = max(1, min(-(-2 * device.processors // tiles), blocks // 4, 16)) if batch <= 64 else 1
    stages = 2 if weight.layout == "bitmap" else 3
    while stages > 1 and shared_bytes(Config(block_m, block_n, splits, 4, stages), weight) > device.shared_bytes:
        stages -= 1
    return Config(block_m, block_n, splits, 4, stages)


def candidates(batch: int, weight: PackedWeight, device: Device) -> list[Config]:
    """What `tune` tries: everything that fits into shared memory and splits inputs no finer than their blocks."""
    blocks = weight.padded_inputs // weight.block
    found = [
        Config(block_m, block_n, splits, warps, stages)
        for block_m in (16, 32, 64, 128)
        if block_m < 2 * max(batch, 16)
        for block_n in (32, 64, 128)
        if weight.padded_outputs % block_n == 0
        for splits in (1, 2, 4, 8, 16)
        if splits <= blocks and (splits == 1 or batch <= 64)
        for warps in (4, 8)
        for stages in (1, 2, 3, 4)
    ]
    return [config for config in found if shared_bytes(config, weight) <= device.shared_bytes]


def shared_bytes(config: Config, weight: PackedWeight) -> int:
    """An upper estimate, in bytes: stages of codes, masks and 16-bit inputs, or the tile of y on its way out."""
    block = block_of(weight.layout, weight.bits)
    bits_per_weight = {"dense": weight.bits, "2:4": 3, "8:16": weight.bits / 2 + 1, "bitmap": 10}[weight.layout]
    if weight.layout == "2:4" and weight.bits == 8:
        bits_per_weight = 5
    per_stage = block * (config.block_n * bits_per_weight / 8 + config.block_m * 2)
    if weight.group_size % 128 or (weight.layout == "8:16" and weight.group_size % block):
        per_stage += config.block_n * block // weight.stride * 3  # tiles of scales and zeros
    return max(int(config.stages * per_stage), config.block_m * config.block_n * 4)


def layer_key(weight: PackedWeight) -> str:
    return f"{weight.layout} {weight.bits} {weight.outputs}x{weight.inputs} g{weight.group_size}"


def bucket(batch: int) -> int:
    """The batch size, rounded up, that stands for this one."""
    return next((size for size in _BATCHES if size >= batch), _BATCHES[-1])


def tuning_path(gpu_name: str, folder: Path = TUNING) -> Path:
    return folder / f"{re.sub(r'[^a-z0-9]+', '-', gpu_name.lower()).strip('-')}.json"


@functools.cache
def measured(gpu_name: str, folder: Path = TUNING) -> dict[str, dict[int, Config]]:
    """{layer: {batch: configuration}} of this GPU; empty where nobody has measured."""
    path = tuning_path(gpu_name, folder)
    if not path.is_file():
        return {}
    try:
        layers = json.loads(path.read_text())["layers"]
        return {
            layer: {int(batch): Config(**config) for batch, config in sizes.items()} for layer, sizes in layers.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("%s: no tuning results (%s); using defaults. Delete it and tune again", path, error)
        return {}


def keep(gpu_name: str, found: dict[str, dict[int, Config]], folder: Path = TUNING) -> Path:
    """Add configurations to the GPU's file; returns its path."""
    layers = {**measured(gpu_name, folder)}
    for layer, sizes in found.items():
        layers[layer] = {**layers.get(layer, {}), **sizes}
    plain = {
        layer: {str(batch): asdict(config) for batch, config in sorted(sizes.items())}
        for layer, sizes in sorted(layers.items())
    }
    path = tuning_path(gpu_name, folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"gpu": gpu_name, "layers": plain}, indent=1) + "\n")
    measured.cache_clear()
    return path


def _power(batch: int) -> int:
    return 1 << max(0, batch - 1).bit_length()
