"""What else takes time when a packed model generates on a CPU: attention, and the products of layers that stay dense.

Behind a long text most of a token's time would be PyTorch's attention of one bfloat16 query, else a quarter the head.
"""

from typing import Any

import torch
from ctp_kernels import one_row
from ctp_kernels.arithmetic import fast_attention
from ctp_kernels.attention import CausalMasks
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "ctp"
_is_causal = CausalMasks()


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """What transformers calls "sdpa", with the same arguments and result: (B, H, T, D) three times, (B, T, H, D)."""
    if others.get("position_bias") is None and others.get("softcap") is None and not torch.compiler.is_compiling():
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        options = {"attn_mask": attention_mask, "is_causal": causal, "scale": scaling, "dropout_p": dropout}
        ours = fast_attention(query, key, value, options, _is_causal)
        if ours is not None:
            return ours.transpose(1, 2), None
    given: dict[str, Any] = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal}
    plain: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **given, **others)
    return plain


class DenseLinear(nn.Linear):
    """A linear layer that multiplies one row of bfloat16 by our kernel, where there is one."""

    def forward(self, input: Tensor) -> Tensor:
        ours = one_row.linear(input, self.weight, self.bias)
        return super().forward(input) if ours is None else ours


def make_fast(model: PreTrainedModel, *, attention: bool) -> None:
    """Let a model on the CPU generate so, its attention only if asked, and if it is PyTorch's."""
    if model.device.type != "cpu":
        return
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = DenseLinear
    if attention and model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(NAME)


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
