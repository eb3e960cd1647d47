"""The processes of one job, as torchrun or accelerate start them: what they add up, and what the main one tells."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor

from ctp_cli.errors import UnfinishedError


@dataclass(frozen=True)
class Processes:
    """This process among those of the job. Every method is called by all of them, in the same order.

    All methods but `of_job` raise UnfinishedError when another process has ended.
    """

    rank: int = 0
    count: int = 1

    @classmethod
    def of_job(cls, device: str) -> "Processes":
        """Connects them, by gloo on the CPU and NCCL on GPUs, where there are several."""
        if os.environ.get("WORLD_SIZE", "1") == "1":
            return cls()
        state = PartialState(cpu=device == "cpu")
        return cls(state.process_index, state.num_processes)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def add_up(self, *tensors: Tensor) -> None:
        """Each becomes the sum over all processes, the same bits in all of them, in place."""
        if self.count > 1:
            with _ended_is_said():
                for tensor in tensors:
                    dist.all_reduce(tensor)

    def total(self, number: int) -> int:
        """The sum of the processes' numbers."""
        sum_ = torch.tensor(number, device=self._device())
        self.add_up(sum_)
        return int(sum_)

    def tell(self, tensor: Tensor) -> None:
        """It becomes the main process's, in place; contiguous."""
        if self.count > 1:
            with _ended_is_said():
                dist.broadcast(tensor.view(torch.uint8), src=0)  # gloo does not know every type

    def told(self, number: int) -> int:
        """The main process's number."""
        tensor = torch.tensor(number, device=self._device())
        if self.count > 1:
            with _ended_is_said():
                dist.broadcast(tensor, src=0)
        return int(tensor)

    def _device(self) -> torch.device:
        on_gpu = self.count > 1 and dist.get_backend() == "nccl"
        return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


ALONE = Processes()


@contextlib.contextmanager
def _ended_is_said() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise _ended(error) from None


@contextlib.contextmanager
def lost_process_is_said() -> Iterator[None]:
    """For work in which libraries talk to the other processes: UnfinishedError when one of them has ended."""
    try:
        yield
    except RuntimeError as error:
        # gloo's errors have no type of their own
        if isinstance(error, dist.DistError) or "gloo" in str(error).lower():
            raise _ended(error) from None
        raise


def _ended(error: RuntimeError) -> UnfinishedError:
    reason = str(error).strip().splitlines()[0]
    return UnfinishedError(
        f"another process of this job has ended or cannot be reached ({reason})",
        hint="look for its message; the same command goes on where this one stopped",
    )
