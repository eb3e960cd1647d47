"""How large a kernel's tiles are: measured for a GPU where someone has, else from what is known about it.

M=batch x tokens N=outputs K=inputs
"""

import functools
import json
import logging
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from ctp_kernels.triton.layouts import PackedWeight

log = logging.getLogger(__name__)

TUNING = Path(__file__).parent.parent / "tuning"
"""Where `tune` keeps what it found: one file per GPU name."""
_SHARED_BYTES = {(8, 0): 166912, (8, 6): 101376, (8, 9): 101376, (9, 0): 232448, (10, 0): 232448, (12, 0): 101376}
"""What one program may use of an NVIDIA GPU's shared memory, by compute capability."""
_LEAST_SHARED_BYTES = 65536
"""The same of gfx942, and the bound for GPUs not named here."""
_WARPGROUPS = ((9, 0), (10, 0))
"""Whose tensor cores take inputs from shared memory."""
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


def choose(
    batch: int, weight: PackedWeight, device: Device, *, element_bytes: int = 2, folder: Path = TUNING
) -> Config:
    """The measured configuration for the nearest batch size of this layer and GPU, else `default`.

    element_bytes: of an activation. What was measured with 2 need not fit into shared memory with 4.
    """
    known = measured(device.name, folder).get(layer_key(weight), {})
    if known:
        nearest = known[min(known, key=lambda size: abs(bucket(batch) - size))]
        if shared_bytes(nearest, weight, device, element_bytes) <= device.shared_bytes:
            return nearest
    return default(batch, weight, device, element_bytes)


def default(batch: int, weight: PackedWeight, device: Device, element_bytes: int = 2) -> Config:
    """As many programs as the GPU has processors four times over, twice for more than 16 rows, by splitting inputs.

    On an H200 these were within 15% of the fastest for up to 64 rows where both were timed. A split has two blocks or
    more, so that loads can run ahead; larger batches fill the GPU without.
    """
    bitmap, by_warpgroups = weight.layout == "bitmap", device.capability in _WARPGROUPS
    block_m = max(16, min(_power(batch), 64 if weight.layout == "dense" else 32))
    block_n, warps, stages = 64, 8 if bitmap and batch > 16 and not by_warpgroups else 4, 2 if bitmap else 3
    if batch > 64 and not bitmap and by_warpgroups:
        block_m, block_n, warps = 128, 128, 8  # sums are in tensor memory there, or spread over two warpgroups
    elif batch > 16 and weight.layout == "8:16" and by_warpgroups:
        block_n, warps, stages = 128, 8, 2  # a token more costs less than decoding for it again
    elif batch <= 16 and bitmap and by_warpgroups:
        block_n = 128  # elsewhere registers spill
    if weight.padded_outputs % block_n:
        block_m, block_n, warps = min(block_m, 64), 64, 4
    tiles = -(-batch // block_m) * (weight.padded_outputs // block_n)
    blocks = weight.padded_inputs // weight.block
    programs = (4 if batch <= 16 else 2) * device.processors
    splits = max(1, min(programs // tiles, blocks // 2, 16)) if batch <= 64 else 1
    deepest = (Config(block_m, block_n, splits, warps, depth) for depth in range(stages, 1, -1))
    fits = (config for config in deepest if shared_bytes(config, weight, device, element_bytes) <= device.shared_bytes)
    return next(fits, Config(block_m, block_n, splits, warps, 1))


def candidates(batch: int, weight: PackedWeight, device: Device, element_bytes: int = 2) -> list[Config]:
    """What `tune` tries: tiles near the batch's size, with as many warps as were fast for such ones on an H200, if they
    fit into shared memory and split inputs no finer than their blocks."""
    blocks = weight.padded_inputs // weight.block
    found = [
        Config(block_m, block_n, splits, warps, stages)
        for block_m in (16, 32, 64, 128)
        if min(batch, 64) <= 2 * block_m < 4 * max(batch, 16)
        for block_n in (32, 64, 128)
        if weight.padded_outputs % block_n == 0
        for splits in (1, 2, 4, 8, 16)
        if splits <= blocks and (splits == 1 or batch <= 64)
        for warps in (1, 2, 4, 8)
        if block_n // 32 <= warps <= max(block_n // 16, block_m * block_n // 1024)
        for stages in (2, 3, 4)
    ]
    return [config for config in found if shared_bytes(config, weight, device, element_bytes) <= device.shared_bytes]


def shared_bytes(config: Config, weight: PackedWeight, device: Device, element_bytes: int = 2) -> int:
    """What a program needs at most: stages of codes, masks and inputs, or the tile of y on its way out."""
    block, places = weight.block, weight.block // weight.planes
    # of a bitmap: masks, and two or three words for the codes of 8 weights
    windows = 2 + 4 * (3 if weight.bits == 8 else 2)
    # of 8:16 one by one: both neighbours load the word they share, and its first mask again
    alone = weight.bits != 4 or element_bytes == 4 or not (weight.scales_segments or weight.zeros_GN is None)
    shared = weight.bits + 3 if alone else weight.bits / 2 + 1
    bits = {"dense": weight.bits, "8:16": shared, "bitmap": windows}[weight.layout]
    weights = block * config.block_n * bits / 8
    tiled_grid = not weight.scales_segments and (weight.layout != "dense" or weight.group_size % places != 0)
    if tiled_grid:
        grid_bytes = 2 if weight.zeros_GN is None else 3
        weights += config.block_n * block // weight.stride * grid_bytes
    inputs = block * config.block_m * element_bytes
    # warpgroups read inputs from shared memory while the next ones arrive
    ahead = config.stages - 1
    staged = ahead * weights + (ahead + (device.capability in _WARPGROUPS)) * inputs + config.block_n * 4
    if weight.zeros_GN is not None or tiled_grid:
        # a plane of weights meets its zero points and scales in another arrangement than the one products want
        staged += config.block_n * places * element_bytes
    return max(int(staged), config.block_m * config.block_n * 4)


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
