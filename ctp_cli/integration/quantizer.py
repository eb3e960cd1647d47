"""transformers' interface for formats of quantized weights, for format ctp."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ctp_cli.checkpoints.packed import PackedSettings
from ctp_cli.checkpoints.packed_generation import make_fast
from ctp_cli.checkpoints.packed_linear import PackedLinear, prepare_layers

if not hasattr(HfQuantizer, "update_attn_implementation"):
    raise ImportError("format ctp in transformers needs transformers 5.24 or later")  # the hook that sees the config

_KINDS = {"scales": ("F16", torch.float16), "g_idx": ("I32", torch.int32)}
"""How parts are stored, that are not uint8."""
_INDEX = f"{PackedSettings.weights_prefix}.safetensors.index.json"


@register_quantization_config(PackedSettings.name)
class CtpConfig(QuantizationConfigMixin):
    """quantization_config of a checkpoint's config.json."""

    def __init__(self, **settings: Any) -> None:
        self.quant_method: Any = PackedSettings.name  # transformers declares one of its own methods
        self.packed = PackedSettings.from_config(settings, Path("config.json"))

    def to_dict(self) -> dict[str, Any]:
        return self.packed.to_config()


@register_quantizer(PackedSettings.name)
class CtpQuantizer(HfQuantizer):
    """Linear layers become `PackedLinear`; their weights are never dense for longer than a product takes."""

    requires_calibration = True
    quantization_config: CtpConfig
    is_trainable: ClassVar[bool] = True
    """Of what stands before the frozen layers, such as a prompt: gradients go through them."""

    def is_serializable(self) -> bool:
        return True

    def update_attn_implementation(self, config: Any) -> Any:
        # only here a quantizer sees what attention was asked for, and the config before files are looked for
        self._may_choose_attention = config._attn_implementation is None
        folder = Path(config.name_or_path)
        if not (folder / "model.safetensors").is_file() and not (folder / "model.safetensors.index.json").is_file():
            config.transformers_weights = _INDEX
        return super().update_attn_implementation(config)

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Iterable[str] = (), **_: Any
    ) -> None:
        settings = self.quantization_config.packed
        for name, parts in _packed_layers(checkpoint_files, settings).items():
            if not hasattr(model, name.partition(".")[0]):  # the model without its head, as AutoModel gives it
                name = name.removeprefix(f"{model.base_model_prefix}.")
            module = model.get_submodule(name)
            if not isinstance(module, nn.Linear | Conv1D):
                raise ValueError(f"{name} is packed in the checkpoint and no linear layer in the model")
            outputs, inputs = module.weight.shape if isinstance(module, nn.Linear) else reversed(module.weight.shape)
            packed = PackedLinear(settings, inputs, outputs, parts, bias=module.bias is not None)
            model.set_submodule(name, packed)
            # GPT-2's attention would give its layers' weights initial values, and there are none
            parent: Any = model.get_submodule(name.rpartition(".")[0])
            parent._is_hf_initialized = True

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        if hasattr(model.config, "transformers_weights"):
            del model.config.transformers_weights  # of how it was loaded; it would be saved with the model
        prepare_layers(model)
        make_fast(model, attention=self._may_choose_attention)
        return model


def _packed_layers(files: Iterable[str], settings: PackedSettings) -> dict[str, dict[str, Tensor]]:
    """Every packed layer's parts as empty tensors, by the headers of the files."""
    layers: dict[str, dict[str, Tensor]] = {}
    for file in files:
        with safe_open(file, "pt") as handle:
            for name in handle.keys():  # noqa: SIM118 - not a dict
                layer, _, part = name.rpartition(".")
                if part not in settings.parts:
                    continue
                piece, (kind, dtype) = handle.get_slice(name), _KINDS.get(part, ("U8", torch.uint8))
                if piece.get_dtype() != kind:
                    raise ValueError(f"{name} is stored as {piece.get_dtype()}, format ctp has {kind} there")
                layers.setdefault(layer, {})[part] = torch.empty(piece.get_shape(), dtype=dtype, device="meta")
    for layer, parts in layers.items():
        if not {"codes", "scales"} <= parts.keys() or ("zeros" in parts) == settings.symmetric:
            raise ValueError(f"{layer}: {', '.join(sorted(parts))} are no whole layer of format ctp")
    return layers
