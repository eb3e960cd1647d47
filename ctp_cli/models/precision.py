"""In which dtype a frozen model is held and multiplied."""

import os
from collections.abc import Sequence

import torch
from ctp_kernels.arithmetic import is_slow

from ctp_cli.memory import fits_comfortably
from ctp_cli.models.loading import dense_skeleton, load_config
from ctp_cli.models.resolve import ResolvedModel


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
    return fits_comfortably(parameters * torch.float32.itemsize * here / shards)
