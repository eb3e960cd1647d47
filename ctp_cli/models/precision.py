"""In which dtype a frozen model is held and multiplied."""

import os
from collections.abc import Sequence

import psutil
import torch
from ctp_kernels.arithmetic import is_slow

from ctp_cli.models.loading import dense_skeleton, load_config
from ctp_cli.models.resolve import ResolvedModel

_SHARE = 0.5
"""Of the memory that is free now, which weights in float32 may take: activations need some, too."""


def wider_is_faster(models: Sequence[ResolvedModel], *, device: str, shards: int = 1) -> bool:
    """Whether these checkpoints' weights are slow to multiply as they are, and fit comfortably in float32.

    Each of this machine's processes holds one part in `shards` of them. Raises InputError for a model whose
    configuration is not usable.
    """
    configs = [load_config(model.path) for model in models]
    if device != "cpu" or not any(config.dtype and is_slow(torch.empty(0, dtype=config.dtype)) for config in configs):
        return False
    parameters = sum(p.numel() for config in configs for p in dense_skeleton(config)[0].parameters())
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    held_bytes = parameters * torch.float32.itemsize * here / shards
    return bool(held_bytes <= _SHARE * psutil.virtual_memory().available)
