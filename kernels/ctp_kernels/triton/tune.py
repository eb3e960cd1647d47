"""Measuring which configuration of a product is the fastest on the GPU at hand. Needs that GPU."""

import contextlib
import copy
import functools
import itertools
import logging
import multiprocessing
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from ctp_kernels.triton.config import TUNING, Config, Device, bucket, candidates, keep, layer_key
from ctp_kernels.triton.layouts import PackedWeight
from ctp_kernels.triton.ops import constants, device_of, matmul, operands, options

log = logging.getLogger(__name__)

_FINALISTS = 6
"""Configurations that are timed again, for longer, after all were timed briefly."""


def tune(
    weights: Sequence[PackedWeight],
    *,
    batches: Iterable[int] = (1, 4, 16, 64, 256),
    dtype: torch.dtype = torch.float16,
    folder: Path = TUNING,
    on_layer: Callable[[str], None] = lambda _: None,
) -> Path:
    """Time every candidate for each batch size (rows of x) and keep the fastest for these layers' shapes and this GPU.

    Times are medians without launching, with weights in rotation, which caches do not hold from some million on. Nearly
    all of it is compilation: a hundred kernels per layout, bits and group size, on all processor cores at once.
    Returns the file that `matmul` will read from then on where `folder` is the default. `on_layer` is called with a
    layer's key once it is tuned.
    Raises: ValueError if a weight is not on a GPU.
    """
    for weight in weights:
        if weight.codes.device.type != "cuda":
            raise ValueError(f"the weight is on {weight.codes.device}; tuning measures a GPU")
    sizes = tuple(batches)
    _compile([(weight, config) for weight in weights for config in _tried(weight, sizes, dtype)], dtype)
    path = folder
    for weight in weights:
        device = device_of(weight.codes.device)
        copies = rotation(weight)
        found = {}
        for batch in sizes:
            x_MK = torch.randn(batch, weight.inputs, dtype=dtype, device=weight.codes.device)
            found[bucket(batch)] = fastest(x_MK, weight, device, functools.partial(_milliseconds, x_MK, copies))
        path = keep(device.name, {layer_key(weight): found}, folder)
        on_layer(layer_key(weight))
    return path


def fastest(
    x_MK: torch.Tensor, weight: PackedWeight, device: Device, milliseconds: Callable[[Config, bool], float]
) -> Config:
    """The candidate whose product with x takes the fewest `milliseconds(config, carefully)`."""
    tried = candidates(len(x_MK), weight, device, x_MK.element_size())
    best = sorted(tried, key=lambda config: milliseconds(config, False))[:_FINALISTS]
    return min(best, key=lambda config: milliseconds(config, True))


def _tried(weight: PackedWeight, batches: Iterable[int], dtype: torch.dtype) -> list[Config]:
    device = device_of(weight.codes.device)
    return [config for batch in batches for config in candidates(batch, weight, device, dtype.itemsize)]


def rotation(weight: PackedWeight) -> list[PackedWeight]:
    """Copies that together are twice what the GPU's cache holds; small layers as many as are worth their memory."""
    cache = getattr(torch.cuda.get_device_properties(weight.codes.device), "L2_cache_size", 1 << 26)
    count = min(64, max(2, -(-2 * cache // weight.weight_bytes)))
    return [weight, *(copy.deepcopy(weight) for _ in range(count - 1))]


def _milliseconds(x_MK: torch.Tensor, copies: Sequence[PackedWeight], config: Config, carefully: bool) -> float:
    from triton.runtime.errors import OutOfResources, PTXASError
    from triton.testing import do_bench_cudagraph

    turns = itertools.cycle(copies)
    try:
        return float(
            do_bench_cudagraph(
                lambda: matmul(x_MK, next(turns), config=config), rep=10 if carefully else 2, return_mode="median"
            )
        )
    except (OutOfResources, PTXASError) as error:  # shared memory is estimated, registers are not
        log.debug("skipped: %s", error)
        return float("inf")


def _compile(pairs: Iterable[tuple[PackedWeight, Config]], dtype: torch.dtype) -> None:
    """Every kernel these need, each once, into Triton's cache on disk."""
    jobs = {}
    for weight, config in pairs:
        kinds = {name: None if x is None else x.dtype for name, x in operands(weight).items()}
        sizes = (weight.outputs, weight.padded_outputs, weight.padded_inputs)
        job = (
            kinds,
            sizes,
            constants(weight, config, dtype, nvidia=not torch.version.hip),
            options(config.warps, config.stages),
            config.splits > 1,
            dtype,
        )
        # of sizes, kernels know whether they are multiples of 16
        alike = (*kinds.values(), *(size % 16 == 0 for size in sizes), *job[2].values(), *job[3].values(), job[4])
        jobs[alike] = job
    processes = max(1, min(len(os.sched_getaffinity(0)), len(jobs)))
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(_compile_one, jobs.values(), chunksize=4))


def _compile_one(job: tuple[Any, ...]) -> None:
    from triton.runtime.errors import OutOfResources, PTXASError

    from ctp_kernels.triton.forward import forward

    kinds, sizes, fixed, settings, split, dtype = job
    sums, arrived = (torch.float32, torch.int32) if split else (None, None)
    with contextlib.suppress(OutOfResources, PTXASError):  # and again where it is timed, which takes it for slow
        forward.warmup(dtype, dtype, sums, arrived, *kinds.values(), 7, *sizes, 3, grid=(1,), **fixed, **settings)
