"""What else takes time when a packed model generates on a CPU: attention, and the products of layers that stay dense.

Behind a long text most of a token's time would be PyTorch's attention of one bfloat16 query, else a quarter the head.
"""

from typing import Any

import torch
from ctp_kernels import one_row
from ctp_kernels.arithmetic import fast_attention
from ctp_kernels.attention import CausalMasks
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

_OURS = "attends_by_ctp"
"""Set on the modules of models whose attention may be ours."""
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
    plain = others.get("position_bias") is None and others.get("softcap") is None
    if _OURS in vars(module) and plain and not torch.compiler.is_compiling():
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        causal = causal and query.shape[-2] > 1 and attention_mask is None
        options = {"attn_mask": attention_mask, "is_causal": causal, "scale": scaling, "dropout_p": dropout}
        ours = fast_attention(query, key, value, options, _is_causal)
        if ours is not None:
            return ours.transpose(1, 2), None
    given: dict[str, Any] = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal}
    theirs: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **given, **others)
    return theirs


class DenseLinear(nn.Linear):
    """A linear layer that multiplies one row of bfloat16 by our kernel, where there is one."""

    def forward(self, input: Tensor) -> Tensor:
        ours = one_row.linear(input, self.weight, self.bias)
        return super().forward(input) if ours is None else ours


def make_fast(model: PreTrainedModel, *, attention: bool) -> None:
    """Let a model on the CPU generate so, its attention only if asked."""
    if model.device.type != "cpu":
        return
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = DenseLinear
        elif attention:
            setattr(module, _OURS, True)


# under transformers' own name: some models do otherwise for names they do not know
AttentionInterface.register("sdpa", attention)
