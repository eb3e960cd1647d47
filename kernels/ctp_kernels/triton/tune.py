"""Measuring which configuration of a product is the fastest on the GPU at hand. Needs that GPU."""

import functools
import logging
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from ctp_kernels.triton.config import TUNING, Config, Device, bucket, candidates, keep, layer_key
from ctp_kernels.triton.layouts import PackedWeight
from ctp_kernels.triton.ops import device_of, matmul

log = logging.getLogger(__name__)


def tune(
    weight: PackedWeight,
    *,
    batches: Iterable[int] = (1, 4, 16, 64, 256),
    dtype: torch.dtype = torch.float16,
    folder: Path = TUNING,
) -> Path:
    """Time every candidate for each batch size (rows of x) and keep the fastest for this layer's shape and this GPU.

    Some minutes per batch size, most of it compilation. Times are medians with cold caches. Returns the file that
    `matmul` will read from then on where `folder` is the default.
    Raises: ValueError if the weight is not on a GPU.
    """
    device = weight.codes.device
    if device.type != "cuda":
        raise ValueError(f"the weight is on {device}; tuning measures a GPU")
    from triton.runtime.errors import OutOfResources
    from triton.testing import do_bench

    def milliseconds(run: Callable[[], object]) -> float:
        try:
            return float(do_bench(run, return_mode="median"))
        except OutOfResources as error:  # shared memory is estimated, registers are not
            log.debug("skipped: %s", error)
            return float("inf")

    found = {}
    for batch in batches:
        x_MK = torch.randn(batch, weight.inputs, dtype=dtype, device=device)
        found[bucket(batch)] = fastest(x_MK, weight, device_of(device), milliseconds)
    return keep(device_of(device).name, {layer_key(weight): found}, folder)


def fastest(
    x_MK: torch.Tensor, weight: PackedWeight, device: Device, milliseconds: Callable[[Callable[[], object]], float]
) -> Config:
    """The candidate whose product with x takes the fewest milliseconds."""
    return min(
        candidates(len(x_MK), weight, device, x_MK.element_size()),
        key=lambda config: milliseconds(functools.partial(matmul, x_MK, weight, config=config)),
    )
