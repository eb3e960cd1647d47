"""The work of a compression: every pass over the model, each block saved as it is done, and the tuning after them."""

import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from ctp_kernels.arithmetic import fast_arithmetic
from ctp_kernels.memory import keep_freed_memory, keep_no_freed_memory
from torch import Tensor
from transformers import PreTrainedModel

from ctp_cli.checkpoints import writer
from ctp_cli.checkpoints.formats import LayerFormat
from ctp_cli.checkpoints.hidden_states import save_hidden_states
from ctp_cli.compression.allocation import allocate, outlier_share
from ctp_cli.compression.blockwise import FullBlock, LayerResult, compress_block
from ctp_cli.compression.hessian import all_finite
from ctp_cli.compression.masks import MaskRule
from ctp_cli.compression.solver import SolverRule
from ctp_cli.compression.tuning import Tuned, tune
from ctp_cli.errors import SolverError
from ctp_cli.files import read_json, write_json
from ctp_cli.models.activations import Activations, Tensors
from ctp_cli.models.blocks import (
    Block,
    LinearLayer,
    WalkState,
    advance,
    copy_of,
    residual_writers,
    shared_inputs,
    start_walk,
)
from ctp_cli.models.loading import load_model
from ctp_cli.models.processes import Processes
from ctp_cli.models.streaming import BlockStream, WholeModel
from ctp_cli.progress import Progress
from ctp_cli.stages.estimate import ALLOCATION_WINDOWS, BATCH_TOKENS
from ctp_cli.stages.plan import Job

_TUNED = "tuned.json"
_SPARSITIES = "sparsities.json"
SCRATCH = ("*.layers", _TUNED, _SPARSITIES)
"""Files beside the shards that only unfinished work needs."""
_PRUNED = "pruned"
_STATES_WINDOWS = 8
"""At most, from which a tuned model's hidden states are kept."""


@dataclass
class Passes:
    """Finished blocks and finished tunings are on disk and are only read back."""

    job: Job
    folder: Path
    model: BlockStream | WholeModel
    """Tuning takes a whole one: a stream forgets what was done to a block."""
    original: Path
    activations: Activations
    processes: Processes
    """The main one writes; the others need to see the folder."""
    progress: Progress
    sparsities: list[float] | None = field(default=None, init=False)
    """Of each block, once `run` has found them; None: all are pruned alike."""

    @property
    def network(self) -> PreTrainedModel:
        return self.model.network

    @property
    def blocks(self) -> list[Block]:
        return self.model.blocks

    def run(self, ids_NT: Tensor) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """What became of every layer, and how every tuning went.

        Weights that are to be tuned are pruned first and quantized once they are tuned: rounding then meets the weights
        that stay, and what it costs is made up for by tuning scales.
        """
        section, rule, folder = self.job.section, self.job.rule, self.folder
        calibration_NT, tuning_NT = ids_NT[: section.windows], ids_NT[-section.tune_windows :]
        calibration_NT = calibration_NT[self.processes.rank :: self.processes.count]
        if section.max_memory is None:
            keep_freed_memory()
        else:
            keep_no_freed_memory()  # else small tensors that stay lie between large ones: 0.5 GB after 30 wide blocks
        if section.allocation == "owl":
            self.sparsities = self._allocated(calibration_NT)
        tunings: list[dict[str, Any]] = []
        if section.tune_windows and not (folder / _TUNED).exists():
            if section.tune == "weights" and rule.mask is not None and rule.grid is not None:
                tunings.append(self._prune_and_tune(folder / _PRUNED, calibration_NT, tuning_NT))
                rule = replace(rule, mask=None, keep_zeros=True)
            rows = self._pass(folder, rule, self.job.settings, calibration_NT)
            what: Literal["scales", "weights"] = "weights" if section.tune == "weights" and not rule.grid else "scales"
            tuned = self._tune(what, tuning_NT)
            self._keep_hidden_states(calibration_NT)  # those that the last pass kept are from before
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

    def _allocated(self, ids_NT: Tensor) -> list[float]:
        """Every block's sparsity, measured on the uncompressed model and kept for work that goes on."""
        record, processes = self.folder / _SPARSITIES, self.processes
        if not processes.told(record.exists()):
            few_NT = ids_NT[: -(-ALLOCATION_WINDOWS // processes.count)]
            with fast_arithmetic(ids_NT.device):
                shares = self._outlier_shares(few_NT)
            weights = [sum(layer.weight_OI.numel() for layer in block.layers) for block in self.blocks]
            assert isinstance(self.job.section.sparsity, float)
            found = allocate(shares, weights, self.job.section.sparsity)
            if processes.is_main:
                write_json(record, {"sparsities": found})
            processes.total(0)  # nobody reads before it is there
        sparsities: list[float] = read_json(record)["sparsities"]
        return sparsities

    def _outlier_shares(self, ids_NT: Tensor) -> list[float]:
        state = self._start_walk(ids_NT)
        sets = _SharedInputs(state)
        self.progress.start("find outliers", len(self.blocks))
        shares = []
        for block in self.blocks:
            self.model.open(block)
            shares.append(outlier_share(block, state, sets.of(block), self.processes))
            self.progress.advance(note=f"share {shares[-1]:.3%}")
        self.model.close()
        self.progress.finish()
        return shares

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
            bos=self.job.section.bos,
            progress=self.progress,
        )

    def _pass(
        self, folder: Path, rule: SolverRule, settings: LayerFormat | None, ids_NT: Tensor
    ) -> list[dict[str, Any]]:
        """Solve every block and write it to its shard. What became of every layer."""
        with fast_arithmetic(ids_NT.device):
            return self._solve_blocks(folder, rule, settings, ids_NT)

    def _solve_blocks(
        self, folder: Path, rule: SolverRule, settings: LayerFormat | None, ids_NT: Tensor
    ) -> list[dict[str, Any]]:
        names = writer.ShardNames(len(self.blocks), settings)
        processes = self.processes
        if processes.is_main:
            writer.write_shard(folder / names.outside(), writer.outside_tensors(self.network, self.blocks))
        state = self._start_walk(ids_NT)
        self.model.forget_the_rest()
        self.progress.start("quantize" if rule.keep_zeros else "compress", len(self.blocks))
        report: list[dict[str, Any]] = []
        sets = _SharedInputs(state)
        # what a pruned and tuned model would be corrected to has no zeros, and its own blocks are not the full model's
        aims_at_full = self.job.section.target == "full" and rule.moves_weights and not rule.keep_zeros
        full_hidden_BTD = self.activations.copied(state.hidden_BTD) if aims_at_full else None
        full_state = None if full_hidden_BTD is None else replace(state, hidden_BTD=full_hidden_BTD)
        for block in self.blocks:
            self.model.open(block)
            full_block = None if full_state is None else copy_of(block)
            shard = folder / names.block(block.index)
            record = shard.with_suffix(".layers")
            if processes.told(shard.exists() and record.exists()):
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
                results = compress_block(
                    block,
                    state,
                    self._rule_of(block, rule),
                    sets.of(block),
                    true_sequential=true_sequential,
                    full=full,
                    processes=processes,
                )
                self._refuse_nan(block, state.hidden_BTD)
                rows = [_layer_row(result) for result in results]
                if processes.is_main:
                    write_json(record, {"layers": rows})
                    writer.write_shard(shard, writer.block_tensors(block, results, settings=settings))
            report += rows
            self.progress.advance(note=_note(rows))
        self.model.close()
        if processes.is_main:
            save_hidden_states(folder, state.hidden_BTD)
        self.progress.finish()
        return report

    def _keep_hidden_states(self, ids_NT: Tensor) -> None:
        with fast_arithmetic(ids_NT.device):
            state = self._start_walk(ids_NT[:: -(-len(ids_NT) // _STATES_WINDOWS)])
            for block in self.blocks:
                advance(block, state)
        save_hidden_states(self.folder, state.hidden_BTD)

    def _start_walk(self, ids_NT: Tensor) -> WalkState:
        batch = max(1, BATCH_TOKENS.get(ids_NT.device.type, 2048) // ids_NT.shape[1])
        return start_walk(
            self.network,
            self.blocks,
            [(ids_BT, None) for ids_BT in ids_NT.split(batch)],
            activations=self.activations,
            open_block=self.model.open,
        )

    def _rule_of(self, block: Block, rule: SolverRule) -> SolverRule:
        if self.sparsities is None or rule.mask is None:
            return rule
        return replace(rule, mask=MaskRule(fraction=self.sparsities[block.index]))

    def _refuse_nan(self, block: Block, hidden_BTD: Tensors) -> None:
        if self.processes.total(sum(not all_finite(x_BTD) for x_BTD in hidden_BTD)):
            raise SolverError(
                f"{block.name}: its outputs hold NaN or infinity",
                hint="does the uncompressed model run on this text?",
            )


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


def _layer_row(result: LayerResult) -> dict[str, Any]:
    weight = result.solution.weight_OI
    return {
        "name": result.layer.name,
        "shape": list(weight.shape),
        "weights": weight.numel(),
        "zeros": result.zeros,
        "calibration_tokens": result.tokens,
        "relative_error": result.relative_error,
        "dampening": result.solution.dampening,
        "solve_seconds": round(result.solve_seconds, 4),
    }


def _note(rows: list[dict[str, Any]]) -> str:
    errors = [row["relative_error"] for row in rows if row["relative_error"] is not None]
    return f"relative error {sum(errors) / len(errors):.4f}" if errors else ""
