"""Less memory between forward and backward pass: a frozen model's norms and gated MLPs that keep their inputs alone."""

import functools
import inspect
import re
import weakref
from collections.abc import Callable
from typing import Any

import torch
from ctp_kernels.elementwise import gated_silu, made_again, rms_norm
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
from transformers.models.phi3.modeling_phi3 import Phi3MLP


def keep_less(model: PreTrainedModel) -> None:
    """From now on RMS norms and gated MLPs of this model keep no more than their inputs for a backward pass.

    Families copy these from one another word for word, so what is Llama's (or, with gate and up in one layer, Phi-3's)
    is known by its source, and runs as `ctp_kernels.elementwise` does it. Other RMS norms, such as Gemma's, are made a
    second time on the way back.
    """
    for module in model.modules():
        way = _way(module)
        if way is not None and "forward" not in vars(module):
            module.forward = _Leaner(module, way)


class _Leaner:
    """A module's forward. It holds the module weakly, so that the model goes when nobody else needs it."""

    def __init__(self, module: nn.Module, way: Callable[[Any, Tensor], Tensor]) -> None:
        self._module, self.way = weakref.ref(module), way

    def __call__(self, *inputs: Any, **options: Any) -> Tensor:
        module = self._module()
        assert module is not None
        if len(inputs) != 1 or options:
            made: Tensor = type(module).forward(module, *inputs, **options)
            return made
        return self.way(module, inputs[0])


def _way(module: nn.Module) -> Callable[[Any, Tensor], Tensor] | None:
    kind: Any = type(module)
    if kind.__name__.endswith("RMSNorm") and not any(p.requires_grad for p in module.parameters()):
        return _norm if _source(kind) == _source(LlamaRMSNorm) else _other_norm
    source = _source(kind) if isinstance(getattr(module, "down_proj", None), nn.Module) else ""
    if source and source == _source(LlamaMLP):
        return _mlp
    return _joint_mlp if source and source == _source(Phi3MLP) else None


@functools.cache
def _source(kind: Any) -> str:
    """What forward does, without its signature and spaces; empty where the source is not at hand."""
    try:
        return re.sub(r"\s", "", inspect.getsource(kind.forward).split(":\n", 1)[1])
    except (OSError, TypeError, IndexError):
        return ""


def _norm(module: Any, x: Tensor) -> Tensor:
    return rms_norm(x, module.weight, module.variance_epsilon)


def _other_norm(module: Any, x: Tensor) -> Tensor:
    return made_again(functools.partial(type(module).forward, module), x)


def _mlp(module: Any, x: Tensor) -> Tensor:
    made: Tensor = module.down_proj(_gated(module.act_fn, module.gate_proj(x), module.up_proj(x)))
    return made


def _joint_mlp(module: Any, x: Tensor) -> Tensor:
    made: Tensor = module.down_proj(_gated(module.activation_fn, *module.gate_up_proj(x).chunk(2, dim=-1)))
    return made


def _gated(activation: nn.Module, gate: Tensor, up: Tensor) -> Tensor:
    if _is_silu(activation):
        return gated_silu(gate, up)
    return made_again(lambda gate, up: activation(gate) * up, gate, up)


@functools.cache
def _is_silu(activation: nn.Module) -> bool:
    at = torch.linspace(-20, 20, 401)
    return not list(activation.parameters()) and torch.equal(activation(at), functional.silu(at))
