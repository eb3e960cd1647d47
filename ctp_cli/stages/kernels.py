"""`ctp bench --kernels`: products with packed weights on this machine, for the layers of a model."""

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from ctp_kernels import rooflines, ways
from ctp_kernels.rooflines import KINDS, LayerShape, RooflineReport
from ctp_kernels.triton import from_parts
from ctp_kernels.triton.config import layer_key
from ctp_kernels.triton.ops import available
from ctp_kernels.triton.tune import tune

from ctp_cli import artifact
from ctp_cli.benchmark.figures import kernels_figure
from ctp_cli.checkpoints.packed_linear import dense_codes_asked, int8_activations_asked
from ctp_cli.errors import InputError, RecipeError
from ctp_cli.files import write_json
from ctp_cli.models.blocks import find_blocks
from ctp_cli.models.devices import resolve_device
from ctp_cli.models.loading import dense_skeleton, load_config
from ctp_cli.progress import SILENT, Progress
from ctp_cli.recipe import BenchSection

KIND = "kernel-benchmark"
_SEED = 0  # of random weights, whose values do not change what is measured


@dataclass(frozen=True)
class KernelsReport:
    """The finished artifact, what was measured, predictions where there is no GPU, and the JSON document in it."""

    output: Path
    measured: RooflineReport
    predicted: tuple[rooflines.Prediction, ...]
    document: dict[str, Any]


def layer_shapes(model_path: Path | None) -> tuple[LayerShape, ...]:
    """The shapes of a model's linear layers, each once, by its configuration alone; None: `rooflines.SHAPES`.

    Raises: InputError for a model without such layers, or with inputs that are no multiple of 16.
    """
    if model_path is None:
        return rooflines.SHAPES
    skeleton, _ = dense_skeleton(load_config(model_path))
    layers = [layer for block in find_blocks(skeleton) for layer in block.layers]
    shapes = tuple(dict.fromkeys(LayerShape(*layer.weight_OI.shape) for layer in layers))
    if odd := [str(shape) for shape in shapes if shape.inputs % 16]:
        raise InputError(
            f"{model_path}: layers of {', '.join(odd)}, whose inputs are no multiple of 16",
            hint="leave MODEL out for layers of usual shapes",
        )
    return shapes


def choices(shapes: Sequence[LayerShape], *, device: str) -> dict[tuple[str, int, str], ways.Choice]:
    """(kind, rows, layer) -> which way its products take on this machine, in the 16-bit type that is timed there.

    As layers of a model are multiplied: with 8-bit activations and dense codes if the environment asks for them, and
    unless it says no, with dense codes also where they pay (there, models whose layers do not fit go without).
    """
    where, asked = resolve_device(device), dense_codes_asked()
    dtype = torch.float16 if where.startswith("cuda") else torch.bfloat16
    found = {}
    for kind, rows, shape in itertools.product(KINDS, rooflines.BATCHES, shapes):
        parts = rooflines.described(shape, kind)
        found[kind, rows, str(shape)] = ways.explain(
            parts,
            device=where,
            dtype=dtype,
            rows=rows,
            int8_activations=int8_activations_asked(),
            dense_codes=ways.dense_codes_pay(parts, device=where) > 0 if asked is None else asked,
        )
    return found


def bench_kernels(
    section: BenchSection,
    *,
    model_path: Path | None,
    output: Path,
    device: str,
    force: bool,
    tuning: bool,
    progress: Progress = SILENT,
) -> KernelsReport:
    """Measure products with layers of the model's shapes and write `output`: kernels.json, kernels.png and ctp.json.

    Of `section`, `rounds` counts. `tuning` looks for each layer's fastest tiles first, which `triton.tune` keeps.
    Raises: OutputError if the output exists, InputError as `layer_shapes`, RecipeError for tuning without a GPU or
    without triton.
    """
    artifact.refuse_existing(output, model_path, force=force)
    where = resolve_device(device)
    if tuning and (not where.startswith("cuda") or not available()):
        missing = "a GPU, and there is none here" if not where.startswith("cuda") else "triton, which is not installed"
        raise RecipeError(f"--tune needs {missing}", hint="leave --tune out, or pip install 'ctp[gpu]' where a GPU is")
    shapes = layer_shapes(model_path)
    config = None if model_path is None else artifact.file_fingerprint(model_path / "config.json")
    inputs = {"model": None if model_path is None else {"path": str(model_path), "config_sha256": config}}
    identity = {"kernels": {"rounds": section.rounds, "tune": tuning}, "device": where, "inputs": inputs}
    with artifact.workspace(output, kind=KIND, identity=identity, force=force) as work:
        generator = torch.Generator().manual_seed(_SEED)
        if tuning:
            _tune(shapes, where, generator, progress)
        measured = _measure(shapes, where, generator, section.rounds, progress)
        predicted = () if where.startswith("cuda") else rooflines.predictions(shapes)
        document = {
            "model": None if model_path is None else model_path.name,
            **asdict(measured),
            "prediction, not measured": [asdict(row) for row in predicted],
        }
        write_json(work.path / "kernels.json", document)
        name = "usual layers" if model_path is None else f"layers of {model_path.name}"
        kernels_figure(measured, work.path / "kernels.png", title=f"Products with {name}, {measured.device}")
        work.finish(
            {
                "recipe": {"device": where, "bench": section.model_dump(), "tune": tuning},
                "inputs": inputs,
                "seed": _SEED,
                "results": "kernels.json",
            }
        )
    return KernelsReport(output, measured, predicted, document)


def _measure(
    shapes: Sequence[LayerShape], device: str, generator: torch.Generator, rounds: int, progress: Progress
) -> RooflineReport:
    progress.start("measuring", len(shapes) * len(rooflines.BATCHES) * (rounds + 1))
    try:
        return rooflines.measure(
            shapes,
            device=device,
            generator=generator,
            rounds=rounds,
            on_run=lambda what: progress.advance(note=what),
        )
    finally:
        progress.finish()


def _tune(shapes: Sequence[LayerShape], device: str, generator: torch.Generator, progress: Progress) -> None:
    made = (
        from_parts(rooflines.random_layer(shape, kind, generator, device=device))
        for shape in shapes
        for kind in rooflines.LAYOUTS
    )
    weights = {layer_key(weight): weight for weight in made}  # 2:4 has the layout of 8:16
    progress.start("tuning", len(weights))
    try:
        tune(list(weights.values()), batches=rooflines.BATCHES, on_layer=lambda layer: progress.advance(note=layer))
    finally:
        progress.finish()
