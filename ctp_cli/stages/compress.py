"""Compress a model: load, calibrate, solve block by block, save each block as it is done, finish as one artifact."""

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from ctp_cli.artifact import Workspace, folder_fingerprint, manifest_of, refuse_existing, workspace
from ctp_cli.checkpoints import gptq, writer
from ctp_cli.compression.blockwise import FullBlock, LayerResult, compress_block
from ctp_cli.compression.grid import GridRule
from ctp_cli.compression.hessian import all_finite
from ctp_cli.compression.masks import MaskRule
from ctp_cli.compression.solver import SolverRule
from ctp_cli.compression.tuning import Tuned, tune
from ctp_cli.data.sources import Text, load_text
from ctp_cli.data.windows import token_ids, windows
from ctp_cli.errors import InputError, RecipeError, SolverError
from ctp_cli.files import read_json, write_json
from ctp_cli.models import embedded
from ctp_cli.models.attention import fast_attention
from ctp_cli.models.blocks import (
    Block,
    LinearLayer,
    WalkState,
    advance,
    copy_of,
    find_blocks,
    residual_writers,
    shared_inputs,
    start_walk,
)
from ctp_cli.models.loading import load_config, load_model, load_tokenizer
from ctp_cli.models.resolve import ResolvedModel
from ctp_cli.progress import SILENT, Progress
from ctp_cli.recipe import CompressSection

KIND = "compressed-checkpoint"
AUTO_GROUP_SIZES = (128, 64, 32)
_BATCH_TOKENS = {"cpu": 2048, "cuda": 8192}
"""Tokens that go through a block at once: what fits a processor's caches, what fills a GPU."""
_TUNED = "tuned.json"
_PRUNED = "pruned"


@dataclass(frozen=True)
class CompressReport:
    """What was made. Bits count everything stored: codes, scales, zeros, indices and what was left uncompressed."""

    path: Path
    checkpoint_bytes: int
    original_bytes: int
    bits_per_weight: float
    linear_bits_per_weight: float
    linear_sparsity: float
    mean_relative_error: float | None
    seconds: float
    notes: tuple[str, ...]


def output_name(model: ResolvedModel, section: CompressSection) -> str:
    """smollm2-135m-s50-w4: what the checkpoint holds."""
    parts = [model.name]
    if isinstance(section.sparsity, str):
        parts.append("s" + section.sparsity.replace(":", "of"))
    elif section.sparsity is not None:
        parts.append(f"s{section.sparsity * 100:g}".replace(".", "p"))
    if section.bits is not None:
        parts.append(f"w{section.bits}")
    return "-".join(parts)


def default_text(model: ResolvedModel) -> str:
    """The embedded model is for trying things out without a network; any other model gets the field's usual text."""
    base = (manifest_of(model.path) or {}).get("base_model")
    return "pydoc" if embedded.NAME in (base, model.name) and (model.embedded or base) else "c4"


def identity(section: CompressSection, model: ResolvedModel, calibration: Text) -> dict[str, Any]:
    """Everything the resulting bytes depend on."""
    return {
        "model": {"name": model.name, "sha256": folder_fingerprint(model.path)},
        "compress": section.model_dump(exclude={"calibration"}),
        "calibration": {"source": calibration.source, "sha256": calibration.sha256},
    }


def compress(
    section: CompressSection,
    *,
    model: ResolvedModel,
    output: Path,
    device: str = "cpu",
    force: bool = False,
    progress: Progress = SILENT,
) -> CompressReport:
    """Raises CtpError kinds for whatever the user can mend; unfinished work is kept in `output`.partial."""
    refuse_existing(output, force=force, reads=model.path)
    config = _config_of_original(model)
    tokenizer = load_tokenizer(model.path)
    calibration = load_text(section.calibration or default_text(model), default_part="train")
    ids_NT = _windows(section, calibration, tokenizer)
    _check_fits_model(config, tokenizer, ids_NT)
    network = load_model(model.path, device=device)
    blocks = find_blocks(network)
    job = _Job.plan(section, network, blocks)
    with workspace(output, kind=KIND, identity=identity(section, model, calibration), force=force) as space:
        run = _Run(job, space, network, blocks, model.path, progress)
        report, tunings = run.run(ids_NT.to(device))
        job.write_shared_files(space.path, network, tokenizer)
        sizes = _sizes(space, network, blocks)
        notes = _notes(job, sizes)
        space.finish(
            {
                "recipe": {"model": model.name, "compress": section.model_dump()},
                "inputs": space.identity,
                "calibration": {
                    "source": calibration.source,
                    "sha256": calibration.sha256,
                    "windows": min(section.windows, ids_NT.shape[0]),
                    "seqlen": section.seqlen,
                },
                "format": job.format,
                "base_model": model.name,
                "results": sizes | {"layers": report, "notes": notes, "tunings": tunings},
            },
            scratch=("*.layers", _TUNED),
        )
    errors = [layer["relative_error"] for layer in report if layer["relative_error"] is not None]
    return CompressReport(
        path=output,
        mean_relative_error=sum(errors) / len(errors) if errors else None,
        linear_sparsity=sum(x["zeros"] for x in report) / sum(x["weights"] for x in report),
        seconds=time.monotonic() - space.started,
        notes=notes,
        **sizes,
    )


def dry_run(section: CompressSection, *, model: ResolvedModel, output: Path, force: bool = False) -> dict[str, Any]:
    """Check what can be checked without weights; estimate sizes from shapes and time from a probe of the machine."""
    refuse_existing(output, force=force, reads=model.path)
    config = _config_of_original(model)
    calibration = load_text(section.calibration or default_text(model), default_part="train")
    tokenizer = load_tokenizer(model.path)
    ids_NT = _windows(section, calibration, tokenizer)
    count = min(section.windows, ids_NT.shape[0])
    _check_fits_model(config, tokenizer, ids_NT)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    blocks = find_blocks(skeleton)
    job = _Job.plan(section, skeleton, blocks)
    linear = sum(layer.weight_OI.numel() for block in blocks for layer in block.layers)
    widest = max(layer.weight_OI.shape[1] for block in blocks for layer in block.layers)
    parameters, bits = writer.parameter_count(skeleton), writer.dtype_bits(config.dtype or torch.float32)
    linear_bits = bits if job.settings is None else job.settings.bits + 20 / max(job.settings.group_size, 32)
    tokens = count * section.seqlen
    # the model, the widest layer's Hessian and its factors, hidden states before and after a block
    memory_bytes = parameters * bits / 8 + 16 * widest**2 + tokens * config.hidden_size * bits / 4
    # one forward pass and about as much for the Hessians; twice with the full model beside
    passes = (1 if section.true_sequential else 2) + 1
    if section.target == "full" and job.rule.feeds_back:
        memory_bytes += tokens * config.hidden_size * (bits / 4 + 4)
        passes *= 2
    operations = 2 * linear * tokens * passes
    if section.tune_windows:
        # a forward pass of each model and a backward pass of one, for inputs and weights
        memory_bytes += parameters * bits / 8 * 2
        operations += 8 * parameters * section.seqlen * min(section.tune_windows, ids_NT.shape[0])
    return {
        "model": str(model.path),
        "calibration": f"{calibration.source}, {count} windows of {section.seqlen} tokens",
        "output": str(output),
        "format": job.format,
        "linear layers": sum(len(block.layers) for block in blocks),
        "estimated size": f"{((parameters - linear) * bits + linear * linear_bits) / 8e6:.0f} MB",
        "estimated memory": f"{memory_bytes / 1e6:.0f} MB",
        "estimated time": f"{operations / _probe_operations_per_second(config.dtype) + linear * 1e-7:.0f} s",
    }


def _config_of_original(model: ResolvedModel) -> Any:
    config = load_config(model.path)
    if getattr(config, "quantization_config", None) is not None:
        raise InputError(f"{model.path}: already quantized", hint="compress the original model")
    return config


def _windows(section: CompressSection, calibration: Text, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Windows for calibration, then those for tuning; a short text serves both with what it has."""
    most = section.windows + section.tune_windows
    return windows(token_ids(calibration, tokenizer), section.seqlen, most=most, text=calibration)


def _probe_operations_per_second(dtype: torch.dtype | None) -> float:
    a, b = (torch.randn(1024, 1024, dtype=dtype or torch.float32) for _ in range(2))
    a @ b
    started = time.perf_counter()
    a @ b
    return 2 * 1024**3 / (time.perf_counter() - started)


def _check_fits_model(config: Any, tokenizer: PreTrainedTokenizerBase, ids_NT: Tensor) -> None:
    """Windows longer than the model's positions, or ids beyond its table, would index out of range midway."""
    text_config = config.get_text_config()
    positions = getattr(text_config, "max_position_embeddings", None)
    if positions is not None and ids_NT.shape[1] > positions:
        raise InputError(
            f"compress.seqlen {ids_NT.shape[1]} is more than the model's {positions} positions",
            hint=f"use --seqlen {positions} or less",
        )
    if int(ids_NT.max()) >= text_config.vocab_size:
        raise InputError(
            f"the tokenizer gives id {int(ids_NT.max())}, the model has {text_config.vocab_size} embeddings",
            hint="is the tokenizer that of this model?",
        )


@dataclass(frozen=True)
class _Job:
    section: CompressSection
    rule: SolverRule
    settings: gptq.GPTQSettings | None

    @property
    def format(self) -> str:
        return "dense" if self.settings is None else "gptq"

    @classmethod
    def plan(cls, section: CompressSection, network: PreTrainedModel, blocks: Sequence[Block]) -> "_Job":
        """All that can be refused is refused here, before anything is computed."""
        layers = [layer for block in blocks for layer in block.layers]
        rule = solver_rule(section, layers)
        if section.bits is None or section.format == "dense":
            return cls(section, rule, None)
        for layer in layers:
            out_features, in_features = layer.weight_OI.shape
            gptq.check_packable(layer.name, out_features=out_features, in_features=in_features, bits=section.bits)
        grid = rule.grid
        assert grid is not None
        return cls(
            section,
            rule,
            gptq.GPTQSettings(
                bits=section.bits,
                group_size=grid.group_size or -1,
                symmetric=section.symmetric,
                desc_act=section.act_order == "column",
                dampening=section.dampening,
                true_sequential=section.true_sequential,
                static_groups=rule.static_grids,
                zero_offset=1 if section.symmetric else 0,
            ),
        )

    def tuned_group_size(self, blocks: Sequence[Block]) -> int | None:
        """Groups of the grid; without one, the largest usual groups that fit, or whole rows."""
        if self.rule.grid is not None:
            return self.rule.grid.group_size
        widths = {layer.weight_OI.shape[1] for block in blocks for layer in block.layers}
        return next((size for size in AUTO_GROUP_SIZES if all(width % size == 0 for width in widths)), None)

    def write_shared_files(self, folder: Path, network: PreTrainedModel, tokenizer: Any) -> None:
        writer.write_index(folder)
        writer.write_configuration(folder, network, tokenizer, settings=self.settings)


def solver_rule(section: CompressSection, layers: Sequence[LinearLayer]) -> SolverRule:
    """The section as the solver's rule. Raises RecipeError naming a layer that a group size or n:m does not divide."""
    mask = None if section.sparsity is None else MaskRule.parse(section.sparsity)
    grid = None
    if section.bits is not None:
        group = _group_size(section.group_size, layers)
        grid = GridRule(section.bits, group, section.symmetric, section.mse_clip)
    for layer in layers:
        in_features = layer.weight_OI.shape[1]
        for what, unit in (
            ("compress.group_size: ", grid.group_size if grid else None),
            ("compress.sparsity: m = ", mask.m if mask else None),
        ):
            if unit and in_features % unit:
                raise RecipeError(
                    f"{what}{unit} does not divide the {in_features} inputs of {layer.name}",
                    hint=f"use a divisor of {in_features}, e.g. {_divisor_near(in_features, unit)}",
                )
    if mask and mask.m and grid and grid.group_size and grid.group_size % mask.m and mask.m % grid.group_size:
        raise RecipeError(
            f"compress: n:m runs of {mask.m} do not fit groups of {grid.group_size}",
            hint="make one divide the other",
        )
    return SolverRule(mask, grid, section.pruner, section.quantizer, section.act_order, section.dampening)


def _group_size(asked: str | int, layers: Sequence[LinearLayer]) -> int | None:
    if asked == "row":
        return None
    if isinstance(asked, int):
        return asked
    widths = [layer.weight_OI.shape[1] for layer in layers]
    for size in AUTO_GROUP_SIZES:
        if all(width % size == 0 for width in widths):
            return size
    raise RecipeError(
        f"compress.group_size: none of {AUTO_GROUP_SIZES} divides every layer's inputs ({sorted(set(widths))})",
        hint="give --group-size row, or a size that divides them all",
    )


def _divisor_near(number: int, wanted: int) -> int:
    return min((d for d in range(1, number + 1) if number % d == 0), key=lambda d: (abs(d - wanted), -d))


@dataclass
class _Run:
    """All passes over the model; finished blocks and finished tunings are on disk and are only read back."""

    job: _Job
    space: Workspace
    network: PreTrainedModel
    blocks: list[Block]
    original: Path
    progress: Progress

    def run(self, ids_NT: Tensor) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """What became of every layer, and how every tuning went.

        Weights that are to be tuned are pruned first and quantized once they are tuned: rounding then meets the weights
        that stay, and what it costs is made up for by tuning scales.
        """
        section, rule, folder = self.job.section, self.job.rule, self.space.path
        calibration_NT, tuning_NT = ids_NT[: section.windows], ids_NT[-section.tune_windows :]
        if self.space.resumed:
            self.progress.say(f"going on with the unfinished work in {folder}")
        tunings: list[dict[str, Any]] = []
        if section.tune_windows and not (folder / _TUNED).exists():
            if section.tune == "weights" and rule.mask is not None and rule.grid is not None:
                tunings.append(self._prune_and_tune(folder / _PRUNED, calibration_NT, tuning_NT))
                rule = replace(rule, mask=None, keep_zeros=True)
            rows = self._pass(folder, rule, self.job.settings, calibration_NT)
            what: Literal["scales", "weights"] = "weights" if section.tune == "weights" and not rule.grid else "scales"
            tuned = self._tune(what, tuning_NT)
            for shard, tensors in writer.tuned_shards(
                folder, self.network, self.blocks, tuned.factors_OG, settings=self.job.settings
            ):
                writer.write_shard(shard.with_name(f"{shard.name}.tuned"), tensors)
            write_json(folder / _TUNED, {"layers": rows, "tunings": [*tunings, _tuning_row(what, tuned, tuning_NT)]})
        if not section.tune_windows:
            return self._pass(folder, rule, self.job.settings, calibration_NT), []
        # from here on only files are moved: what is found half moved is moved on
        for shard in folder.glob("*.safetensors.tuned"):
            shard.replace(shard.with_suffix(""))
        shutil.rmtree(folder / _PRUNED, ignore_errors=True)
        record = read_json(folder / _TUNED)
        return record["layers"], record["tunings"]

    def _prune_and_tune(self, folder: Path, calibration_NT: Tensor, tuning_NT: Tensor) -> dict[str, Any]:
        folder.mkdir(exist_ok=True)
        parameters, record = folder / "parameters.safetensors", folder / _TUNED
        if record.exists():
            writer.restore_parameters(self.network, parameters)
        else:
            self._pass(folder, replace(self.job.rule, grid=None), None, calibration_NT)
            tuned = self._tune("weights", tuning_NT)
            writer.write_shard(parameters, dict(self.network.named_parameters()))
            write_json(record, _tuning_row("weights", tuned, tuning_NT))
        return read_json(record)

    def _tune(self, what: Literal["scales", "weights"], ids_NT: Tensor) -> Tuned:
        return tune(
            self.network,
            load_model(self.original, device=str(ids_NT.device)),
            self.blocks,
            ids_NT,
            what=what,
            group_size=self.job.tuned_group_size(self.blocks),
            learning_rate=self.job.section.tune_learning_rate,
            progress=self.progress,
        )

    def _pass(
        self, folder: Path, rule: SolverRule, settings: gptq.GPTQSettings | None, ids_NT: Tensor
    ) -> list[dict[str, Any]]:
        """Solve every block and write it to its shard. What became of every layer."""
        with fast_attention():
            return self._solve_blocks(folder, rule, settings, ids_NT)

    def _solve_blocks(
        self, folder: Path, rule: SolverRule, settings: gptq.GPTQSettings | None, ids_NT: Tensor
    ) -> list[dict[str, Any]]:
        names = writer.ShardNames(len(self.blocks))
        writer.write_shard(folder / names.outside(), writer.outside_tensors(self.network, self.blocks))
        batch = max(1, _BATCH_TOKENS.get(ids_NT.device.type, 2048) // ids_NT.shape[1])
        state = start_walk(self.network, self.blocks, [(ids_BT, None) for ids_BT in ids_NT.split(batch)])
        self.progress.start("quantize" if rule.keep_zeros else "compress", len(self.blocks))
        report: list[dict[str, Any]] = []
        sets = _SharedInputs(state)
        aims_at_full = self.job.section.target == "full" and rule.feeds_back
        full_state = replace(state, hidden_BTD=list(state.hidden_BTD)) if aims_at_full else None
        for block in self.blocks:
            full_block = None if full_state is None else copy_of(block)
            shard = folder / names.block(block.index)
            record = shard.with_suffix(".layers")
            if shard.exists() and record.exists():
                writer.restore_block(block, shard, settings=settings)
                advance(block, state)
                if full_block is not None and full_state is not None:
                    advance(full_block, full_state)
                rows = read_json(record)["layers"]
            else:
                full = None
                if full_block is not None and full_state is not None:
                    writers = residual_writers(full_block, full_state, sets.of(full_block))
                    full = FullBlock(full_block, full_state, [layer.name for layer in writers])
                true_sequential = self.job.section.true_sequential
                results = compress_block(block, state, rule, sets.of(block), true_sequential=true_sequential, full=full)
                _refuse_nan(block, state.hidden_BTD)
                rows = [_layer_row(result) for result in results]
                write_json(record, {"layers": rows})
                writer.write_shard(shard, writer.block_tensors(block, results, settings=settings))
            report += rows
            self.progress.advance(note=_note(rows))
        self.progress.finish()
        return report


def _tuning_row(what: str, tuned: Tuned, ids_NT: Tensor) -> dict[str, Any]:
    return {
        "what": what,
        "windows": ids_NT.shape[0],
        "first_divergence": tuned.first_divergence,
        "last_divergence": tuned.last_divergence,
    }


class _SharedInputs:
    """Which layers of a block share an input; found once for all blocks that are built alike."""

    def __init__(self, state: WalkState) -> None:
        self._state = state
        self._known: dict[tuple[str, ...], list[list[str]]] = {}

    def of(self, block: Block) -> list[list[LinearLayer]]:
        by_path = {layer.name.removeprefix(block.name): layer for layer in block.layers}
        if (alike := tuple(by_path)) not in self._known:
            found = shared_inputs(block, self._state)
            self._known[alike] = [[layer.name.removeprefix(block.name) for layer in layers] for layers in found]
        return [[by_path[path] for path in paths] for paths in self._known[alike]]


def _refuse_nan(block: Block, hidden_BTD: list[Tensor]) -> None:
    if not all(all_finite(x_BTD) for x_BTD in hidden_BTD):
        raise SolverError(
            f"{block.name}: its outputs hold NaN or infinity",
            hint="does the uncompressed model run on this text?",
        )


def _layer_row(result: LayerResult) -> dict[str, Any]:
    weight = result.solution.weight_OI
    return {
        "name": result.layer.name,
        "shape": list(weight.shape),
        "weights": weight.numel(),
        "zeros": int((weight == 0).sum()),
        "calibration_tokens": result.tokens,
        "relative_error": result.relative_error,
        "dampening": result.solution.dampening,
        "solve_seconds": round(result.solve_seconds, 4),
    }


def _note(rows: list[dict[str, Any]]) -> str:
    errors = [row["relative_error"] for row in rows if row["relative_error"] is not None]
    return f"relative error {sum(errors) / len(errors):.4f}" if errors else ""


def _sizes(space: Workspace, network: PreTrainedModel, blocks: Sequence[Block]) -> dict[str, Any]:
    shards = {path.name: path.stat().st_size for path in space.path.glob("*.safetensors")}
    parameters = writer.parameter_count(network)
    linear = sum(layer.weight_OI.numel() for block in blocks for layer in block.layers)
    unlinear = sum(p.numel() for block in blocks for p in block.module.parameters()) - linear
    bits = writer.dtype_bits(network.dtype)
    names = writer.ShardNames(len(blocks))
    in_blocks = sum(size for name, size in shards.items() if name != names.outside())
    return {
        "checkpoint_bytes": sum(shards.values()),
        "original_bytes": parameters * bits // 8,
        "bits_per_weight": sum(shards.values()) * 8 / parameters,
        "linear_bits_per_weight": (in_blocks * 8 - unlinear * bits) / linear,
    }


def _notes(job: _Job, sizes: dict[str, Any]) -> tuple[str, ...]:
    notes = []
    if job.section.sparsity is not None:
        what = f"a dense {job.section.bits}-bit one" if job.settings else "the original"
        notes.append(
            f"format {job.format} stores pruned weights like any other: this checkpoint is no smaller than {what}"
        )
    if job.settings is None and job.section.bits is not None:
        notes.append(f"format dense stores the rounded weights in {sizes['bits_per_weight']:.0f} bits each")
    return tuple(notes)
