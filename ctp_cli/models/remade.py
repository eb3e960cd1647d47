"""Less memory between forward and backward pass: what is cheap to make again is not kept."""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

_ACTIVATIONS: tuple[Any, ...] = (functional.silu, functional.gelu)
_CONVERSIONS: tuple[Any, ...] = (torch.Tensor.to, torch.Tensor.float)


@dataclass(frozen=True)
class _Remade:
    function: Callable[..., Tensor]
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    def __call__(self) -> Tensor:
        return self.function(*self.arguments, **self.options)


class remade_activations(TorchFunctionMode):
    """A context whose backward pass makes some tensors again from what is kept anyway; gradients are the same bits.

    These are outputs of SiLU and GELU, which a gated layer's product would keep beside the function's input (of Llama's
    MLP a third), and wider copies of 16-bit tensors, which norms would keep.
    """

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[int, tuple[weakref.ref[Tensor], _Remade]] = {}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._packed, _unpacked)

    def __enter__(self) -> Self:
        super().__enter__()
        self._hooks.__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        self._hooks.__exit__(*raised)
        super().__exit__(*raised)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        made = func(*args, **kwargs)
        cheap = func in _ACTIVATIONS or (func in _CONVERSIONS and made.element_size() > args[0].element_size())
        if cheap and made.requires_grad and not kwargs.get("inplace"):
            place = made.data_ptr()
            # only as long as it is in use: what lies there afterwards is something else
            alive = weakref.ref(made, lambda _: self._made.pop(place, None))
            self._made[place] = alive, _Remade(func, (args[0].detach(), *args[1:]), kwargs)
        return made

    def _packed(self, tensor: Tensor) -> Any:
        alive, remade = self._made.get(tensor.data_ptr(), (None, None))
        made = alive() if alive else None
        same = made is not None and (made.shape, made.stride(), made.dtype) == (
            (tensor.shape, tensor.stride(), tensor.dtype)
        )
        return remade if same else tensor


def _unpacked(packed: Any) -> Tensor:
    tensor: Tensor = packed() if isinstance(packed, _Remade) else packed
    return tensor
