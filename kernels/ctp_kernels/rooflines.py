"""How long products with packed weights take, and how near that is to the time of reading the weights once.

    report = measure([LayerShape(4096, 4096)], device="cpu", generator=torch.Generator())
    predictions([LayerShape(4096, 4096)])     # bytes / bandwidth of GPUs by name: arithmetic, nothing measured

Every product is measured once per round, in turns with the others. Weights are used in rotation: so many copies that
they do not fit into the caches. Bytes are those of codes, masks, scales and zero points as they are stored, of x and of
y; bandwidth is what copying tensors reaches in the same rounds, with bytes read and written counted.

M=rows of x N=outputs K=inputs G=groups
"""

import copy
import functools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ctp_kernels import dispatch, onnx_product
from ctp_kernels.profiling import Quartiles, median_interval
from ctp_kernels.ragged import pack_bits, row_starts
from ctp_kernels.reference import PackedParts

LAYOUTS = ("dense", "2:4", "8:16", "bitmap")
"""The last three with half of the weights."""
_SPARSER = {"bitmap, 62.5% pruned": 0.375, "bitmap, 75% pruned": 0.25}
"""What they keep."""
KINDS = (*LAYOUTS, *_SPARSER)
BATCHES = (1, 4, 16, 64)
"""Rows of x."""
GPU_BYTES_PER_S = {"A100": 2.0e12, "H100": 3.35e12, "RTX 4090": 1.0e12}
"""Memory bandwidths as their makers state them, rounded."""
_SAMPLE_S = 1e-2
"""A sample is as many products as take about this long, one at least; on GPUs one with each copy at least. The first
ones wait for what was written before to leave the caches: in 2 ms, products of few rows seemed a fifth slower."""
_QUIET_S = 0.05
"""Before a sample with several threads: those of the product before, OpenMP's or ONNX Runtime's, spin for a while.
Waited for busily: where a thread slept, Linux may wake all on its processor, and part them a few milliseconds later."""
_MOST_COPIES = 256
_COPIED_BYTES = 1 << 26
_CACHE_BYTES = 1 << 26
"""Of a CPU that does not say how large its caches are."""


@dataclass(frozen=True)
class LayerShape:
    """A linear layer's."""

    outputs: int
    inputs: int

    @property
    def group_size(self) -> int:
        """Inputs per scale: 128 where that divides them, else less; all of them where nothing does."""
        return next((size for size in (128, 64, 32, 16) if self.inputs % size == 0), self.inputs)

    def __str__(self) -> str:
        return f"{self.outputs} x {self.inputs}"


SHAPES = tuple(
    LayerShape(*shape) for shape in ((4096, 4096), (4096, 11008), (576, 576), (192, 576), (1536, 576), (576, 1536))
)
"""Two of 7-billion-parameter Llamas, and SmolLM2-135M's."""


@dataclass(frozen=True)
class ProductRow:
    """What one product took."""

    outputs: int
    inputs: int
    rows: int
    product: str
    way: str
    """Of `ctp_kernels.ways`, "" for products that are not ours."""
    moved_bytes: int
    """Weights as they are stored, x and y: the least that has to be read and written."""
    copies: int
    time_us: Quartiles
    interval_us: tuple[float, float] | None
    """Of the median, with 95% confidence (`profiling.median_interval`); None with fewer than 6 rounds."""
    gb_per_s: float
    """moved_bytes by the median time."""
    share_of_copy: float
    """gb_per_s by the median of copying in the same rounds."""


@dataclass(frozen=True)
class RooflineReport:
    """Every row, and what is needed to read them."""

    rows: tuple[ProductRow, ...]
    copy_gb_per_s: Quartiles
    device: str
    threads: int
    rounds: int
    cache_bytes: int
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Prediction:
    """moved_bytes by each GPU's bandwidth, in microseconds: what a product could take there at least. Not measured."""

    outputs: int
    inputs: int
    rows: int
    product: str
    moved_bytes: int
    time_us: dict[str, float]


@dataclass
class _Product:
    """One competitor on one shape: `run(x, copy)` multiplies with the weights of that copy."""

    name: str
    weight_bytes: int
    dtype: torch.dtype
    copies: list[Any]
    run: Callable[[Tensor, Any], Tensor]
    turn: int = 0

    def sample_s(self, x_MK: Tensor, repeats: int) -> float:
        """Seconds per product, over `repeats` of them."""
        if x_MK.device.type == "cpu" and torch.get_num_threads() > 1:
            quiet = time.perf_counter() + _QUIET_S
            while time.perf_counter() < quiet:
                pass
            self._repeat(x_MK, repeats)  # its own threads are awake then, and their processors
        start, end = _clock(x_MK.device)
        self._repeat(x_MK, repeats)
        return end(start) / repeats

    def sampler(self, x_MK: Tensor, repeats: int) -> Callable[[], float]:
        """`sample_s` of these; on a GPU as a graph, so that launching takes no time, and all copies' products."""
        if x_MK.device.type != "cuda":
            return functools.partial(self.sample_s, x_MK, repeats)
        repeats = max(repeats, len(self.copies))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._repeat(x_MK, repeats)

        def sample_s() -> float:
            start, end = _clock(x_MK.device)
            graph.replay()
            return end(start) / repeats

        return sample_s

    def _repeat(self, x_MK: Tensor, repeats: int) -> None:
        for _ in range(repeats):
            self.run(x_MK, self.copies[self.turn % len(self.copies)])
            self.turn += 1


@torch.no_grad()
def measure(
    shapes: Sequence[LayerShape],
    *,
    device: str,
    generator: torch.Generator,
    batches: Sequence[int] = BATCHES,
    rounds: int = 5,
    on_run: Callable[[str], None] = lambda _: None,
) -> RooflineReport:
    """Time products with random layers of these shapes, 4 bits, for each number of rows.

    On the CPU: bfloat16 and float32 `F.linear`, `torch.mv` for one row, PyTorch's int4 product, and ours with dense
    codes, 2:4, 8:16 and a bitmap of half of the weights, on bfloat16 and with x in 8 bits; ONNX Runtime's int4 product
    where onnxruntime and onnx are installed. On a GPU: float16 `F.linear`, PyTorch's int4 product on bfloat16, ours.
    `generator` is one of the CPU's. `on_run` is called `len(shapes) * len(batches) * (rounds + 1)` times.
    """
    where, caches = torch.device(device), cache_bytes(device)
    copied = max(_COPIED_BYTES, caches)
    source = torch.zeros(copied, dtype=torch.uint8, device=where)
    copying = _Product("copy", 2 * copied, torch.uint8, [torch.empty_like(source)], lambda x, to: to.copy_(x))
    found, bandwidths, notes = [], [], set[str]()
    for shape in shapes:
        products = _products(shape, where, caches, generator)
        cached = [product.name for product in products if len(product.copies) * product.weight_bytes < caches]
        if cached:
            notes.add(f"{shape}: {_MOST_COPIES} copies of the weights fit into the caches: {'; '.join(cached)}")
        for rows in batches:
            taking = [product for product in products if rows == 1 or product.name != _MV]
            x_MK = torch.randn(rows, shape.inputs, generator=generator).to(where)
            tell = functools.partial(on_run, f"{shape}, {rows} rows")
            seconds, copies_s = _rounds(taking, x_MK, copying, source, rounds, tell)
            bandwidth = Quartiles.of([2 * copied / s / 1e9 for s in copies_s])
            bandwidths += [2 * copied / s / 1e9 for s in copies_s]
            found += [_row(shape, rows, product, seconds[product.name], bandwidth.median) for product in taking]
    if where.type == "cuda":
        notes.add("products are replayed as graphs: the time of launching them is left out")
    elif not onnx_product.available():
        notes.add("ONNX Runtime was left out: onnxruntime and onnx are not both installed")
    return RooflineReport(
        rows=tuple(found),
        copy_gb_per_s=Quartiles.of(bandwidths),
        device=device if where.type == "cpu" else torch.cuda.get_device_name(where),
        threads=torch.get_num_threads(),
        rounds=rounds,
        cache_bytes=caches,
        notes=tuple(sorted(notes)),
    )


def predictions(shapes: Sequence[LayerShape], *, rows: int = 1) -> tuple[Prediction, ...]:
    """The least time that products with float16 weights and with 4-bit ones in each form could take on GPUs by name."""
    made = []
    for shape in shapes:
        moved = 2 * rows * (shape.inputs + shape.outputs)
        sizes = {"fp16 F.linear": 2 * shape.outputs * shape.inputs}
        sizes |= {f"ours, {kind}": stored_bytes(described(shape, kind)) for kind in KINDS}
        made += [
            Prediction(
                *(shape.outputs, shape.inputs, rows, name, size + moved),
                {gpu: (size + moved) / bandwidth * 1e6 for gpu, bandwidth in GPU_BYTES_PER_S.items()},
            )
            for name, size in sizes.items()
        ]
    return tuple(made)


def described(shape: LayerShape, kind: str, *, bits: int = 4) -> PackedParts:
    """Parts of a layer of this kind on the meta device, for `ways.explain`."""
    outputs, inputs = shape.outputs, shape.inputs
    stored = inputs if kind == "dense" else int(inputs * _SPARSER.get(kind, 0.5))
    return PackedParts(
        codes=torch.empty(outputs * ((stored * bits + 7) // 8), dtype=torch.uint8, device="meta"),
        scales=torch.empty(outputs, inputs // shape.group_size, dtype=torch.float16, device="meta"),
        bits=bits,
        mask=None if kind == "dense" else torch.empty(outputs, inputs // 8, dtype=torch.uint8, device="meta"),
    )


def random_layer(
    shape: LayerShape, kind: str, generator: torch.Generator, *, bits: int = 4, device: torch.device | str = "cpu"
) -> PackedParts:
    """A layer of this kind with random codes, symmetric; a bitmap keeps about what it should.

    The generator is one of the CPU's.
    Raises: ValueError for inputs that are no multiple of 16.
    """
    outputs, inputs = shape.outputs, shape.inputs
    if inputs % 16:
        raise ValueError(f"{inputs} inputs are no multiple of 16")
    mask_NB = None if kind == "dense" else _random_mask(kind, outputs, inputs, generator)
    length = outputs * inputs * bits // 8
    if mask_NB is not None:
        length = int(row_starts(mask_NB, bits)[-1])
    scales_NG = torch.rand(outputs, inputs // shape.group_size, generator=generator) / 64 + 0.01
    return PackedParts(
        codes=torch.randint(0, 256, (length,), dtype=torch.uint8, generator=generator).to(device),
        scales=scales_NG.half().to(device),
        bits=bits,
        mask=None if mask_NB is None else mask_NB.to(device),
    )


def stored_bytes(parts: PackedParts) -> int:
    """Of codes, mask, scales, zero points and group indices."""
    tensors = (parts.codes, parts.mask, parts.scales, parts.zeros, parts.g_idx)
    return sum(x.numel() * x.element_size() for x in tensors if x is not None)


def cache_bytes(device: str) -> int:
    """The largest cache of the device."""
    if torch.device(device).type == "cuda":
        return int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", _CACHE_BYTES))
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size[:-1]) * units[size[-1]] for size in sizes if size[-1:] in units), default=_CACHE_BYTES)


_MV = "bf16 torch.mv"


def _products(shape: LayerShape, device: torch.device, caches: int, generator: torch.Generator) -> list[_Product]:
    weights_NK = torch.randn(shape.outputs, shape.inputs, generator=generator) / math.sqrt(shape.inputs)
    half = torch.float16 if device.type == "cuda" else torch.bfloat16

    def plain(name: str, dtype: torch.dtype, run: Callable[[Tensor, Any], Tensor]) -> _Product:
        made = weights_NK.to(device, dtype)
        return _Product(name, made.nbytes, dtype, _copies(made, made.nbytes, caches), run)

    products = [plain("fp16 F.linear" if half == torch.float16 else "bf16 F.linear", half, functional.linear)]
    if device.type == "cpu":
        products.append(plain(_MV, half, lambda x, weight: torch.mv(weight, x[0])))
        products.append(plain("fp32 F.linear", torch.float32, functional.linear))
    if shape.outputs % 16 == 0 and shape.group_size in (32, 64, 128):
        products.append(_int4(shape, device, caches, generator))
        if device.type == "cpu" and onnx_product.available():
            products.append(_onnx(shape, caches, generator))
    for kind in KINDS:
        parts = random_layer(shape, kind, generator, device=device)
        size = stored_bytes(parts)
        for int8, name in ((False, f"ours, {kind}"), (True, f"ours, {kind}, x in 8 bits")):
            if int8 and device.type != "cpu":
                continue
            weight = dispatch.prepare(parts, int8_activations=int8)
            products.append(_Product(name, size, half, _copies(weight, size, caches), dispatch.matmul))
    return products


def _int4(shape: LayerShape, device: torch.device, caches: int, generator: torch.Generator) -> _Product:
    aten = torch.ops.aten
    if device.type == "cpu":
        codes_NK = torch.randint(0, 16, (shape.outputs, shape.inputs), dtype=torch.int32, generator=generator)
        packed, multiply = aten._convert_weight_to_int4pack_for_cpu(codes_NK, 1), aten._weight_int4pack_mm_for_cpu
    else:
        codes_NB = torch.randint(0, 256, (shape.outputs, shape.inputs // 2), dtype=torch.uint8, generator=generator)
        # the most tiles of 16 inputs at once that divide them
        tiles = next(count for count in (8, 4, 2) if shape.inputs % (16 * count) == 0)
        packed, multiply = aten._convert_weight_to_int4pack(codes_NB.to(device), tiles), aten._weight_int4pack_mm
    grid_GN2 = torch.rand(shape.inputs // shape.group_size, shape.outputs, 2, generator=generator)
    grid_GN2 = grid_GN2.to(device, torch.bfloat16)
    size = packed.nbytes + grid_GN2.nbytes
    copies = _copies((packed, grid_GN2), size, caches)
    return _Product(
        *("bf16 torch int4", size, torch.bfloat16, copies),
        lambda x, weight: multiply(x, weight[0], shape.group_size, weight[1]),
    )


def _onnx(shape: LayerShape, caches: int, generator: torch.Generator) -> _Product:
    parts = random_layer(shape, "dense", generator)
    size = stored_bytes(parts) + parts.scales.nbytes  # scales are float32 there
    codes_NB = parts.codes.view(shape.outputs, -1)
    copies = [onnx_product.int4_product(codes_NB, parts.scales) for _ in range(_count(size, caches))]
    return _Product("ONNX Runtime, x in 8 bits", size, torch.float32, copies, lambda x, product: product(x))


def _copies(made: Any, size: int, caches: int) -> list[Any]:
    """Enough to fill the caches twice over."""
    return [made, *(copy.deepcopy(made) for _ in range(_count(size, caches) - 1))]


def _count(size: int, caches: int) -> int:
    return min(_MOST_COPIES, max(2, -(-2 * caches // size)))


def _rounds(
    products: Sequence[_Product],
    x_MK: Tensor,
    copying: _Product,
    source: Tensor,
    rounds: int,
    on_round: Callable[[], None],
) -> tuple[dict[str, list[float]], list[float]]:
    """Seconds of every product in every round, and of copying `source`."""
    inputs = {copying.name: source, **{product.name: x_MK.to(product.dtype) for product in products}}
    samplers = {}
    for product in [copying, *products]:
        for weight in product.copies:
            if isinstance(weight, dispatch.Weight):  # in whatever form fewer or more rows have left it
                weight.restore()
                weight.form_for(product.dtype, len(x_MK))
        product.sample_s(inputs[product.name], 1)
        warm_s = product.sample_s(inputs[product.name], 1)
        repeats = max(1, min(1000, int(_SAMPLE_S / max(warm_s, 1e-7))))
        samplers[product.name] = product.sampler(inputs[product.name], repeats)
    on_round()
    seconds: dict[str, list[float]] = {name: [] for name in samplers}
    for _ in range(rounds):
        for name, sample_s in samplers.items():
            seconds[name].append(sample_s())
        on_round()
    return seconds, seconds.pop(copying.name)


def _row(shape: LayerShape, rows: int, product: _Product, seconds: Sequence[float], copy_gb_per_s: float) -> ProductRow:
    moved = product.weight_bytes + product.dtype.itemsize * rows * (shape.inputs + shape.outputs)
    microseconds = [s * 1e6 for s in seconds]
    quartiles = Quartiles.of(microseconds)
    weight = product.copies[0]
    return ProductRow(
        outputs=shape.outputs,
        inputs=shape.inputs,
        rows=rows,
        product=product.name,
        way=weight.explain(product.dtype, rows).way if isinstance(weight, dispatch.Weight) else "",
        moved_bytes=moved,
        copies=len(product.copies),
        time_us=quartiles,
        interval_us=median_interval(microseconds),
        gb_per_s=moved / quartiles.median / 1e3,
        share_of_copy=moved / quartiles.median / 1e3 / copy_gb_per_s,
    )


def _clock(device: torch.device) -> tuple[Any, Callable[[Any], float]]:
    """A start, and a function that gives the seconds since."""
    if device.type != "cuda":
        return time.perf_counter(), lambda start: time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()

    def seconds(start: Any) -> float:
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3

    return start, seconds


def _random_mask(kind: str, outputs: int, inputs: int, generator: torch.Generator) -> Tensor:
    """(N, K / 8) uint8."""
    if kind == "bitmap":
        return torch.randint(0, 256, (outputs, inputs // 8), dtype=torch.uint8, generator=generator)
    if kind in _SPARSER:
        return pack_bits(torch.rand(outputs, inputs, generator=generator) < _SPARSER[kind])
    n, m = map(int, kind.split(":"))
    runs = [pattern for pattern in range(1 << m) if pattern.bit_count() == n]
    units = runs if m == 16 else [low | high << 4 for low in runs for high in runs]
    patterns = torch.tensor(units).to(torch.int16 if m == 16 else torch.uint8)
    chosen = torch.randint(0, len(units), (outputs, inputs // (16 if m == 16 else 8)), generator=generator)
    return patterns[chosen].view(torch.uint8)
