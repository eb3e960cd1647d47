"""A linear layer that keeps its weights packed; `ctp_kernels.dispatch` says how products with them are made.

T=tokens O=out_features I=in_features
"""

import os
from collections.abc import Callable
from typing import Any

import torch
from ctp_kernels import dispatch
from ctp_kernels.reference import PackedParts
from torch import Tensor, nn

from ctp_cli.checkpoints.packed import PackedSettings
from ctp_cli.memory import fits_comfortably


def int8_activations_asked() -> bool:
    """By the environment, CTP_INT8_ACTIVATIONS."""
    return os.environ.get("CTP_INT8_ACTIVATIONS") == "1"


def dense_codes_asked() -> bool | None:
    """By the environment, CTP_DENSE_CODES; None if it does not say."""
    given = os.environ.get("CTP_DENSE_CODES")
    return None if not given else given == "1"


def prepare_layers(model: nn.Module) -> None:
    """Make the packed layers of a model that was loaded ready for products.

    Unless CTP_DENSE_CODES says otherwise, pruned layers are multiplied with as dense codes on CPUs for which that pays,
    if all of them together fit comfortably. Raises ValueError, naming the layer, if its parts do not go together.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}
    paying: list[tuple[PackedLinear, dispatch.Weight, int]] = []
    for name, layer in layers.items():
        try:
            weight = layer.prepare()
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        if more_bytes := weight.dense_codes_pay():
            paying.append((layer, weight, more_bytes))
    if dense_codes_asked() is None and fits_comfortably(sum(more_bytes for *_, more_bytes in paying)):
        for layer, weight, _ in paying:
            layer.dense_codes_on = frozenset({"cpu"})
            weight.use_dense_codes()


class PackedLinear(nn.Module):
    """Buffers are the parts of a layer as format ctp stores them (`ctp_cli.checkpoints.packed`).

    Where a way of multiplying wants them in a form of its own (the Triton kernels, scattered groups, pairs of outputs),
    that form takes their place at the first product, as buffers that are not saved, so that nothing is in memory twice.
    Saving, loading, copying and moving the layer bring the stored parts back first; the next product converts them.

    The environment variable CTP_INT8_ACTIVATIONS=1 lets products on the CPU round activations to 8 bits.
    CTP_DENSE_CODES=1 multiplies with a code for every weight of pruned layers, which is faster and takes more memory;
    0 never does, and without it CPUs do for which that pays, where memory is free (`prepare_layers`).
    """

    codes: Tensor | None
    mask: Tensor | None
    scales: Tensor | None
    zeros: Tensor | None
    g_idx: Tensor | None

    def __init__(
        self, settings: PackedSettings, in_features: int, out_features: int, parts: dict[str, Tensor], *, bias: bool
    ) -> None:
        """`parts` may be on the meta device, to be filled by loading; then call `prepare`."""
        super().__init__()
        self.in_features, self.out_features, self.bits = in_features, out_features, settings.bits
        self._names = settings.parts
        for part in self._names:
            self.register_buffer(part, parts.get(part))
        self.bias = nn.Parameter(torch.empty(out_features, device="meta"), requires_grad=False) if bias else None
        self.int8_activations = int8_activations_asked()
        """Whether products on the CPU may round x to 8 bits (`dispatch.prepare`); takes effect with `prepare`."""
        self.dense_codes_on = frozenset({"cpu", "cuda"} if dense_codes_asked() else {})
        """Devices on which pruned layers are multiplied with as dense codes, likewise."""
        self._weight: dispatch.Weight | None = None
        self._form: object | None = None

    def prepare(self) -> dispatch.Weight:
        """Find where rows begin. Raises ValueError if the parts do not go together."""
        self._restore()
        parts = PackedParts(bits=self.bits, **{name: getattr(self, name) for name in self._names})
        weight = dispatch.prepare(
            parts,
            int8_activations=self.int8_activations,
            dense_codes=parts.codes.device.type in self.dense_codes_on,
        )
        if (weight.outputs, weight.inputs) != (self.out_features, self.in_features):
            raise ValueError(
                f"{weight.outputs} x {weight.inputs} weights of a layer of {self.out_features} x {self.in_features}"
            )
        self._weight = weight
        return weight

    def forward(self, x_TI: Tensor) -> Tensor:
        assert self._weight is not None, "prepare() comes first"
        y_TO = dispatch.matmul(x_TI, self._weight)
        self._follow()
        return y_TO if self.bias is None else y_TO + self.bias

    def _follow(self) -> None:
        """Register what the weight consists of now; stored parts that it no longer has are let go."""
        if self._weight is None or self._weight.form is self._form:
            return
        with dispatch.changing:
            self._form = self._weight.form
            held = self._weight.tensors()
            for name in [name for name in self._buffers if name not in self._names]:
                delattr(self, name)
            for name in self._names:
                setattr(self, name, held.pop(name, None))
            for name, tensor in held.items():
                self.register_buffer(name, tensor, persistent=False)

    def _restore(self) -> None:
        if self._weight is not None:
            with dispatch.changing:
                self._weight.restore()
                self._follow()

    def __getstate__(self) -> dict[str, Any]:
        with dispatch.changing:
            self._restore()
            return self.__dict__.copy()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedLinear":
        """Moves the stored parts. Scales stay float16 where a model changes its dtype: they are part of the weights."""
        self._restore()
        scales = self.scales

        def moved(tensor: Tensor) -> Tensor:
            made = fn(tensor)
            return made if tensor is not scales or made.dtype == tensor.dtype else tensor.to(made.device)

        super()._apply(moved, recurse)
        if self._weight is not None and self.codes is not None:
            self._weight = None
            if not self.codes.is_meta:
                self.prepare()
        return self

    def _save_to_state_dict(self, *arguments: Any) -> None:
        with dispatch.changing:  # another thread's product would take the stored parts away again
            self._restore()
            super()._save_to_state_dict(*arguments)

    def _load_from_state_dict(self, *arguments: Any) -> None:
        self._restore()
        super()._load_from_state_dict(*arguments)
        if self._weight is not None:
            self.prepare()

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}"
