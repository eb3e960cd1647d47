"""Where the activations of all batches are while a model is walked block by block: in memory, or in a mapped file."""

import mmap
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor


class Tensors(Protocol):
    """What a list of tensors is used for here."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Tensor]: ...

    def __getitem__(self, index: int, /) -> Tensor: ...

    def __setitem__(self, index: int, tensor: Tensor, /) -> None: ...

    def append(self, tensor: Tensor, /) -> None: ...


@dataclass(frozen=True)
class Activations:
    """How a walk treats what it holds for all batches at once."""

    folder: Path | None = None
    """Hidden states between two blocks go to files here. None: they stay in memory, on the device."""

    @property
    def run_again(self) -> bool:
        """Whether a block is run again for each set of its layers, rather than keep it suspended for all batches."""
        return self.folder is not None

    def new(self) -> Tensors:
        return [] if self.folder is None else TensorFile(self.folder)

    def copied(self, tensors: Tensors) -> Tensors:
        """A list of its own with the same tensors."""
        copy = self.new()
        for tensor in tensors:
            copy.append(tensor)
        return copy


@dataclass(frozen=True)
class _Place:
    offset: int
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    @property
    def bytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize


class TensorFile:
    """A list of tensors in one file, mapped while they are used.

    The file has no name: it is gone with the list, however the process ends. On the CPU a tensor that is taken out is
    the file's own memory, so it is valid until another is put in its place, and what is written into it stays.
    """

    def __init__(self, folder: Path) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - open as long as the list is there
        self._places: list[_Place] = []
        self._end = 0

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int, /) -> Tensor:
        place = self._places[index]
        return self._mapped(place).to(place.device)

    def __setitem__(self, index: int, tensor: Tensor, /) -> None:
        place = self._places[index]
        if (place.shape, place.dtype) != (tensor.shape, tensor.dtype):
            place = self._places[index] = self._room_for(tensor)
        mapped = self._mapped(place)
        if tensor.data_ptr() != mapped.data_ptr():
            mapped.copy_(tensor)

    def append(self, tensor: Tensor, /) -> None:
        self._places.append(self._room_for(tensor))
        self[len(self) - 1] = tensor

    def _room_for(self, tensor: Tensor) -> _Place:
        place = _Place(self._end, tensor.shape, tensor.dtype, tensor.device)
        grain = mmap.ALLOCATIONGRANULARITY
        self._end += -(-place.bytes // grain) * grain
        # a full disk shows here, as an error; found out while mapped memory is written, it would end the process
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(self._file.fileno(), place.offset, self._end - place.offset)
        else:
            self._file.truncate(self._end)
        return place

    def _mapped(self, place: _Place) -> Tensor:
        memory = mmap.mmap(self._file.fileno(), place.bytes, offset=place.offset)
        return torch.frombuffer(memory, dtype=place.dtype).view(place.shape)


IN_MEMORY = Activations()
