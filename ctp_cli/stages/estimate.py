"""What a compression will take of a machine, from shapes alone: memory, disk and time.

O=out_features I=in_features D=hidden width
"""

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from ctp_kernels.arithmetic import fast_arithmetic
from torch.nn import functional
from transformers import PreTrainedModel

from ctp_cli.checkpoints import writer
from ctp_cli.compression.alternating import PART
from ctp_cli.errors import RecipeError
from ctp_cli.models.activations import IN_MEMORY, Activations
from ctp_cli.models.blocks import Block
from ctp_cli.stages.plan import Job

PROCESS_BYTES = 400_000_000
"""Of Python, PyTorch and transformers, before any weight is read."""
BATCH_TOKENS = {"cpu": 2048, "cuda": 8192}
"""Tokens that go through a block at once: what fits a processor's caches, what fills a GPU."""
ALLOCATION_WINDOWS = 8
"""Of the calibration windows, those on which outliers are found."""
_DISK_BYTES_PER_SECOND = 5e8


@dataclass(frozen=True)
class Estimate:
    """Bytes in memory at the worst moment, and what grows with the number of windows apart."""

    fixed_bytes: int
    activation_bytes: int
    """Of all windows, while blocks stay suspended between their layers."""
    hidden_bytes: int
    """Of all windows between two blocks: what goes to files where memory is short."""
    checkpoint_bytes: int
    reads_bytes: int
    operations: float
    again_operations: float
    """More of them where blocks are run again for each set of their layers."""
    solver_operations: float

    @property
    def in_memory_bytes(self) -> int:
        return self.fixed_bytes + self.activation_bytes

    def activations(self, max_memory: int | None, folder: Path) -> Activations:
        """Raises RecipeError if the run does not fit however little is kept."""
        if max_memory is None or self.in_memory_bytes <= max_memory:
            return IN_MEMORY
        if self.fixed_bytes <= max_memory:
            return Activations(folder)
        raise RecipeError(
            f"compress.max_memory: {max_memory / 1e9:.2f} GB are too little, about {self.fixed_bytes / 1e9:.2f} GB are "
            "needed",
            hint="most of it is one block, its widest layer's Hessian and the solver's copies of both: use a machine "
            "with more memory, and no --tune-windows, which loads two models whole",
        )

    def seconds(self, *, in_files: bool, dtype: torch.dtype) -> float:
        """From how fast this machine multiplies matrices right now."""
        forward = self.operations + (self.again_operations if in_files else 0)
        disk = (self.reads_bytes + self.checkpoint_bytes) / _DISK_BYTES_PER_SECOND
        return forward / _operations_per_second(dtype) + self.solver_operations / _operations_per_second(None) + disk


def estimate(job: Job, network: PreTrainedModel, blocks: Sequence[Block], *, windows: int, device: str) -> Estimate:
    """`network` may be on the meta device; `windows` are those of calibration."""
    section, rule = job.section, job.rule
    config = network.config.get_text_config()
    dtype = network.dtype
    item = dtype.itemsize
    tokens, width = windows * section.seqlen, config.hidden_size
    shapes = [[(w.shape[0], w.shape[1]) for w in (layer.weight_OI for layer in block.layers)] for block in blocks]
    linear = sum(o * i for block in shapes for o, i in block)
    parameters = writer.parameter_count(network)
    in_blocks = [sum(p.numel() for p in block.module.parameters()) for block in blocks]
    outside_bytes = (parameters - sum(in_blocks)) * item
    widest = max(i for block in shapes for _, i in block)
    full = section.target == "full" and rule.moves_weights
    batch = max(BATCH_TOKENS.get(device, 2048), section.seqlen)

    solver = max(_solver_bytes(block, job, full) for block in shapes)
    linear_bits = 8 * item if job.settings is None else job.settings.bits + 20 / max(job.settings.group_size, 32)
    # weights, those of the full model beside, codes, and what is written: once laid out, once as bytes
    block_bytes = max(in_blocks) * (item * (2 if full else 1) + 1 + 2 * linear_bits / 8)
    # what one batch holds at once, part of it in float32
    batch_bytes = batch * 4 * (6 * width + 2 * widest)
    walking, solving = 2 * outside_bytes + max(in_blocks) * item, block_bytes + solver
    allocates = section.allocation != "uniform"
    # one block beside embeddings and head, a layer's weights twice in float32
    allocating = outside_bytes + max(in_blocks) * item + 8 * max(o * i for block in shapes for o, i in block)
    fixed = PROCESS_BYTES + batch_bytes + max(walking, solving, allocating if allocates else 0)
    hidden = tokens * width * item
    # in attention: what came in, normed, queries, keys, values, what comes out; in the MLP: its last layer's inputs
    suspended = tokens * item * max(6 * width, 3 * width + widest) if rule.needs_hessian else hidden
    if full:
        # a second run beside, and what the residual stream lacks, in float32
        suspended, hidden = 2 * suspended + 4 * tokens * width, 2 * hidden + 4 * tokens * width
    hessians = tokens * sum(i * i for block in shapes for i in {i for _, i in block}) if rule.needs_hessian else 0
    mismatches = 2 * hessians if full else 0
    runs = (1 if section.true_sequential or not rule.needs_hessian else 2) * (2 if full else 1)
    operations = 2.0 * linear * tokens * runs
    if allocates:
        operations += 2.0 * linear * min(windows, ALLOCATION_WINDOWS) * section.seqlen
    # a run up to each set of layers: of queries, of attention's output, of the MLP's first and last layers
    again = 1.4 * operations if rule.needs_hessian else 0
    solving_operations = _solver_operations(shapes, job) + hessians + mismatches
    if section.tune_windows:
        # both models whole, and of tuned weights their changes, gradients and moments; forward, and backward twice
        fixed += 2 * parameters * item + (20 * linear if section.tune == "weights" else 0)
        operations += 8 * parameters * section.seqlen * section.tune_windows
    return Estimate(
        fixed_bytes=int(fixed),
        activation_bytes=int(suspended),
        hidden_bytes=int(hidden),
        checkpoint_bytes=int((parameters - linear) * item + linear * linear_bits / 8),
        # once for their hash, once for their numbers, once more for their outliers
        reads_bytes=(3 if allocates else 2) * parameters * item,
        operations=operations,
        again_operations=again,
        solver_operations=solving_operations,
    )


def _solver_bytes(block: Sequence[tuple[int, int]], job: Job, full: bool) -> int:
    """Of the widest set of layers that may share an input, among those of equal width that follow one another."""
    most, together = 0, 0
    for inputs, layers in itertools.groupby(block, key=lambda shape: shape[1]):
        outputs = [o for o, _ in layers]
        # a gate and its like, or queries, keys and values
        in_set = min(sum(outputs), max(2 * max(outputs), 3 * min(outputs)))
        hessian, all_of_them, largest = 4 * inputs**2, 4 * in_set * inputs, 4 * max(outputs) * inputs
        together += hessian
        alternating = job.rule.mask is not None and job.rule.pruner == "alternating"
        part = min(largest, 4 * PART)
        moments = [2.5 * hessian + 9 * part + largest + all_of_them] if alternating else []
        moments.append(3 * hessian + 3 * all_of_them)  # the factor; the sweep over all layers
        if full:
            moments = [moment + hessian + all_of_them for moment in moments]
        most = max(most, *(int(moment) for moment in moments))
    if not job.rule.needs_hessian:
        return max(8 * o * i for o, i in block)
    return most if job.section.true_sequential else most + together


def _solver_operations(shapes: Sequence[Sequence[tuple[int, int]]], job: Job) -> float:
    rule, total = job.rule, 0.0
    for o, i in (shape for block in shapes for shape in block):
        products = 0.0
        if rule.mask is not None and rule.pruner == "alternating":
            products += 5 * rule.rounds  # with the Hessian, in a round
        if rule.feeds_back:
            products += 0.5
            total += 2 / 3 * i**3
        if rule.grid is not None and rule.quantizer == "gptq":
            products += 1 + rule.refine / 2
        total += 2 * products * o * i * i + 2000 * o * i  # of grids, masks and packing, which are no products
    return total


def _operations_per_second(dtype: torch.dtype | None) -> float:
    a, b = (torch.randn(1024, 1024, dtype=dtype or torch.float32) for _ in range(2))
    with fast_arithmetic(a.device):
        functional.linear(a, b)  # the first one pays for preparations
        started = time.perf_counter()
        functional.linear(a, b)
    return 2 * 1024**3 / (time.perf_counter() - started)
