"""A frozen model, whole in this process or sharded over the processes of a job (FSDP2)."""

from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from ctp_cli.models.blocks import find_blocks
from ctp_cli.models.loading import load_config, load_model, packed_format
from ctp_cli.models.streaming import stream_model

Made = TypeVar("Made")


class Frozen(nn.Module):
    """A frozen model. Whatever reads its weights is done inside of a call: `frozen(lambda model: model(ids))`.

    Of a sharded model, embeddings, head and final norm are whole for the length of the call, a decoder block while it
    runs, forward or backward; every process makes the same calls in the same order.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, work: Callable[[PreTrainedModel], Made]) -> Made:
        return work(self.model)

    @property
    def is_sharded(self) -> bool:
        return isinstance(self, FSDPModule)

    def held_bytes(self) -> int:
        """Of weights, dense and packed, in this process, between calls."""
        return sum((p.to_local() if isinstance(p, DTensor) else p).nbytes for p in self._weights())

    def whole_bytes(self) -> int:
        """Of weights, in all processes together."""
        return sum(p.nbytes for p in self._weights())

    def _weights(self) -> Iterator[Tensor]:
        return chain(self.parameters(), self.buffers())  # what a packed layer holds are buffers


def load_sharded(path: Path, *, dtype: torch.dtype | None = None, device: str = "cpu") -> Frozen:
    """What `load_model` gives, an equal part of every tensor's rows in each process; called by all of them.

    A dense checkpoint is read block by block. A packed one is made dense in main memory first, by one process after
    the other. Raises what `load_model` and `stream_model` raise.
    """
    mesh = init_device_mesh(torch.device(device).type, (dist.get_world_size(),))
    if packed_format(load_config(path), path) is None:
        stream = stream_model(path, dtype=dtype, device=device)
        for block in stream.blocks:
            fully_shard(stream.take(block), mesh=mesh)
        return _with_the_rest(stream.network, mesh)
    for turn in range(dist.get_world_size()):
        if turn == dist.get_rank():
            network = load_model(path, dtype=dtype)
            for block in find_blocks(network):
                fully_shard(block.module, mesh=mesh)
            frozen = _with_the_rest(network, mesh)
        dist.barrier()
    return frozen


def _with_the_rest(network: PreTrainedModel, mesh: DeviceMesh) -> Frozen:
    frozen = Frozen(network)
    # FSDP would keep the outermost module's weights whole after a forward pass, in wait of a backward that may not come
    fully_shard(frozen, mesh=mesh, reshard_after_forward=True)
    return frozen
