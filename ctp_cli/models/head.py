"""From final hidden states to the loss of each token, without ever holding all logits.

B=batch T=tokens N=positions D=hidden width V=vocabulary K=likeliest tokens
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from ctp_kernels.arithmetic import fast_arithmetic, wide
from ctp_kernels.prefix import cache_keyword
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

_CHUNK_BYTES, _CHUNK_BYTES_GPU = 32 << 20, 256 << 20
"""Of float32 logits in memory at once. Larger blocks the C library asks the system for, and hands back, each time; that
fills them with zeros, which takes longer than what is computed in them. A GPU launches some twenty kernels for each."""


class Scorer:
    """Negative log-likelihoods of next tokens under a model whose parameters are frozen.

    Splits the model into its decoder and its head, after checking on a few tokens that head(decoder(x)) really is the
    model's output. Families that do more than that at the end (soft-capped or scaled logits) are scored through their
    whole forward.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        head = model.get_output_embeddings()
        self.head: nn.Linear | None = head if isinstance(head, nn.Linear) and self._is_plain(head) else None

    @torch.no_grad()
    def _is_plain(self, head: nn.Linear) -> bool:
        ids = torch.arange(1, 9, device=self.model.device)[None] % head.weight.shape[0]
        with fast_arithmetic(self.model.device):
            return torch.equal(head(self._hidden(input_ids=ids)), self._logits(input_ids=ids))

    def _hidden(self, **inputs: Any) -> Tensor:
        with self._fast(inputs):
            hidden: Tensor = self.model.base_model(**{"use_cache": False, **inputs}).last_hidden_state
        return hidden

    def _logits(self, **inputs: Any) -> Tensor:
        with self._fast(inputs):
            logits: Tensor = self.model(**{"use_cache": False, **inputs}).logits
        return logits

    def _fast(self, inputs: dict[str, Any]) -> AbstractContextManager[Any]:
        return fast_arithmetic(self.model.device, behind_prefix=cache_keyword(self.model) in inputs)

    def nll(
        self,
        labels_BT: Tensor,
        *,
        prefix: Cache | None = None,
        soft: "SoftTargets | None" = None,
        **inputs: Any,
    ) -> Tensor:
        """Loss of each label but the first of each row, (B, T - 1) float32; differentiable in `prefix` and `inputs`.

        `inputs` go to the model as they are, behind the keys and values of `prefix`, which grows; labels are of the
        last T positions of what they are. With `soft` the loss is the cross-entropy against a mix of label and another
        model's likeliest tokens.
        """
        shape = labels_BT[:, 1:].shape
        tokens_NK, shares_NK = labels_BT[:, 1:].reshape(-1, 1), None
        if soft is not None:
            tokens_NK, shares_NK = soft.mixed_with(tokens_NK)
        if prefix is not None:
            inputs |= {cache_keyword(self.model): prefix, "use_cache": True}
        if self.head is None:
            logits = self._logits(**inputs)[:, -labels_BT.shape[1] : -1]
            surprise_NK = -logits.float().flatten(0, 1).log_softmax(-1).gather(1, tokens_NK)
            return (surprise_NK if shares_NK is None else surprise_NK * shares_NK).sum(-1).view(shape)
        hidden_ND = self._hidden(**inputs)[:, -labels_BT.shape[1] : -1].flatten(0, 1)
        losses_N: Tensor = _HeadLoss.apply(hidden_ND, self.head.weight, self.head.bias, tokens_NK, shares_NK)
        return losses_N.view(shape)

    @torch.no_grad()
    def likeliest(
        self, ids_BT: Tensor, count: int, *, below: int | None = None, prefix: Cache | None = None
    ) -> tuple[Tensor, Tensor]:
        """The likeliest next tokens after every token but the last, and their probabilities, (B, T - 1, K) both.

        Of tokens `below` this number, where the vocabulary is padded further; K is `count`, or as many as there are.
        Behind the keys and values of `prefix`, which grows.
        """
        inputs: dict[str, Any] = {"input_ids": ids_BT}
        if prefix is not None:
            inputs |= {cache_keyword(self.model): prefix, "use_cache": True}
        if self.head is None:
            parts = [self._logits(**inputs)[:, :-1].float().flatten(0, 1)]
        else:
            hidden_ND = self._hidden(**inputs)[:, :-1].flatten(0, 1)
            weight_VD = wide(self.head.weight)
            parts = [_head_logits(part, weight_VD, self.head.bias) for part in hidden_ND.split(_positions(weight_VD))]
        count = min(count, parts[0][:, :below].shape[1])
        tops = [part[:, :below].softmax(-1).topk(count, dim=-1) for part in parts]
        shape = (ids_BT.shape[0], ids_BT.shape[1] - 1, count)
        return torch.cat([t.indices for t in tops]).view(shape), torch.cat([t.values for t in tops]).view(shape)

    def divergence(self, full: "Scorer", ids_BT: Tensor) -> Tensor:
        """KL(full || model) of the next token after every token, (B, T) float32; differentiable in this model.

        Both models must have the same head.
        """
        if self.head is None or full.head is None:
            ours = self._logits(input_ids=ids_BT).float().log_softmax(-1)
            with torch.no_grad():
                theirs = full._logits(input_ids=ids_BT).float().log_softmax(-1)
            return nn.functional.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1)
        with torch.no_grad():
            wanted_ND = full._hidden(input_ids=ids_BT).flatten(0, 1)
        hidden_ND = self._hidden(input_ids=ids_BT).flatten(0, 1)
        divergences_N: Tensor = _HeadDivergence.apply(hidden_ND, wanted_ND, self.head.weight, self.head.bias)
        return divergences_N.view(ids_BT.shape)


@dataclass(frozen=True)
class SoftTargets:
    """Another model's likeliest next tokens and their probabilities, (B, T - 1, K) both."""

    tokens_BTK: Tensor
    probabilities_BTK: Tensor
    share: float
    """Weight of these in the loss, between 0 and 1; the label has the rest."""

    def mixed_with(self, labels_N1: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens and shares that sum to 1, (N, 1 + K); a label that is among the tokens has both its shares."""
        likely_NK = self.probabilities_BTK.flatten(0, 1).float()
        likely_NK = self.share * likely_NK / likely_NK.sum(-1, keepdim=True)
        shares_NK = torch.cat([torch.full_like(likely_NK[:, :1], 1 - self.share), likely_NK], dim=1)
        return torch.cat([labels_N1, self.tokens_BTK.flatten(0, 1).to(labels_N1)], dim=1), shares_NK


def _head_logits(hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None) -> Tensor:
    """(N, V) float32, multiplied in the dtype of the weight."""
    bias_V = None if bias_V is None else bias_V.to(weight_VD.dtype)
    return nn.functional.linear(hidden_ND.to(weight_VD.dtype), weight_VD, bias_V).float()


def _positions(weight_VD: Tensor) -> int:
    """Whose logits are in memory at once."""
    budget = _CHUNK_BYTES if weight_VD.device.type == "cpu" else _CHUNK_BYTES_GPU
    return max(1, budget // (4 * weight_VD.shape[0]))


class _HeadLoss(torch.autograd.Function):
    """Cross-entropy of a frozen head, chunk by chunk; gradients are made in the forward pass, while logits exist."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        tokens_NK: Tensor,
        shares_NK: Tensor | None,
    ) -> Tensor:
        losses_N = torch.empty(tokens_NK.shape[0], dtype=torch.float32, device=hidden_ND.device)
        wants_gradient = ctx.needs_input_grad[0]
        gradient_ND = torch.empty_like(hidden_ND) if wants_gradient else None
        weight_VD = wide(weight_VD)
        chunk = _positions(weight_VD)
        for start in range(0, tokens_NK.shape[0], chunk):
            part = slice(start, start + chunk)
            logits_CV = _head_logits(hidden_ND[part], weight_VD, bias_V)
            tokens_CK = tokens_NK[part]
            shares_CK = torch.ones_like(tokens_CK, dtype=torch.float32) if shares_NK is None else shares_NK[part]
            wanted_C = (logits_CV.gather(1, tokens_CK) * shares_CK).sum(-1)
            largest_C1 = logits_CV.amax(-1, keepdim=True)
            exp_CV = logits_CV.sub_(largest_C1).exp_()
            sum_C1 = exp_CV.sum(-1, keepdim=True)
            losses_N[part] = (sum_C1.log() + largest_C1)[:, 0] - wanted_C
            if gradient_ND is not None:
                share_CV = exp_CV.mul_(1 / sum_C1)
                share_CV.scatter_add_(1, tokens_CK, -shares_CK)
                gradient_ND[part] = share_CV.to(weight_VD.dtype) @ weight_VD
        ctx.save_for_backward(gradient_ND)
        return losses_N

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        (gradient_ND,) = ctx.saved_tensors
        return (gradient_ND * outer[0][:, None].to(gradient_ND.dtype), None, None, None, None)


class _HeadDivergence(torch.autograd.Function):
    """KL between two final hidden states under one frozen head, chunk by chunk, as in _HeadLoss."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, wanted_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None) -> Tensor:
        divergences_N = torch.empty(hidden_ND.shape[0], dtype=torch.float32, device=hidden_ND.device)
        gradient_ND = torch.empty_like(hidden_ND)
        weight_VD = wide(weight_VD)
        chunk = _positions(weight_VD)
        for start in range(0, hidden_ND.shape[0], chunk):
            part = slice(start, start + chunk)
            ours_CV = _head_logits(hidden_ND[part], weight_VD, bias_V).log_softmax(-1)
            theirs_CV = _head_logits(wanted_ND[part], weight_VD, bias_V).log_softmax(-1)
            share_CV = theirs_CV.exp()
            divergences_N[part] = (share_CV * theirs_CV.sub_(ours_CV)).sum(-1)
            gradient_ND[part] = ours_CV.exp_().sub_(share_CV).to(weight_VD.dtype) @ weight_VD
        ctx.save_for_backward(gradient_ND)
        return divergences_N

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient_ND,) = ctx.saved_tensors
        return (gradient_ND * outer[0][:, None].to(gradient_ND.dtype), None, None, None)
