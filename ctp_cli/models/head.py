"""From final hidden states to the loss of each token, without ever holding all logits.

B=batch T=tokens N=positions D=hidden width V=vocabulary
"""

from typing import Any

import torch
from ctp_kernels.prefix import cache_keyword
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

_CHUNK = 256
"""Positions whose logits are in memory at once."""


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
        return torch.equal(head(self._hidden(input_ids=ids)), self.model(input_ids=ids, use_cache=False).logits)

    def _hidden(self, **inputs: Any) -> Tensor:
        hidden: Tensor = self.model.base_model(**{"use_cache": False, **inputs}).last_hidden_state
        return hidden

    def nll(self, labels_BT: Tensor, *, skip: int = 0, prefix: Cache | None = None, **inputs: Any) -> Tensor:
        """Loss of each label but the first of each row, (B, T - 1) float32; differentiable in `inputs_embeds`.

        `inputs` go to the model as they are, behind the keys and values of `prefix`, which grows. The first `skip` of
        the model's output positions (a prompt given as embeddings) are left out of the head altogether.
        """
        targets_BT = labels_BT[:, 1:]
        if prefix is not None:
            inputs |= {cache_keyword(self.model): prefix, "use_cache": True}
        if self.head is None:
            logits = self.model(**{"use_cache": False, **inputs}).logits[:, skip:-1]
            flat = nn.functional.cross_entropy(logits.float().flatten(0, 1), targets_BT.flatten(), reduction="none")
            return flat.view(targets_BT.shape)
        hidden_ND = self._hidden(**inputs)[:, skip:-1].flatten(0, 1)
        losses_N: Tensor = _HeadLoss.apply(hidden_ND, self.head.weight, self.head.bias, targets_BT.flatten())
        return losses_N.view(targets_BT.shape)

    def divergence(self, full: "Scorer", ids_BT: Tensor) -> Tensor:
        """KL(full || model) of the next token after every token, (B, T) float32; differentiable in this model.

        Both models must have the same head.
        """
        if self.head is None or full.head is None:
            ours = self.model(ids_BT, use_cache=False).logits.float().log_softmax(-1)
            with torch.no_grad():
                theirs = full.model(ids_BT, use_cache=False).logits.float().log_softmax(-1)
            return nn.functional.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1)
        with torch.no_grad():
            wanted_ND = full._hidden(input_ids=ids_BT).flatten(0, 1)
        hidden_ND = self._hidden(input_ids=ids_BT).flatten(0, 1)
        divergences_N: Tensor = _HeadDivergence.apply(hidden_ND, wanted_ND, self.head.weight, self.head.bias)
        return divergences_N.view(ids_BT.shape)


class _HeadLoss(torch.autograd.Function):
    """Cross-entropy of a frozen head, chunk by chunk; gradients are made in the forward pass, while logits exist."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, labels_N: Tensor) -> Tensor:
        losses_N = torch.empty(labels_N.shape, dtype=torch.float32, device=hidden_ND.device)
        wants_gradient = ctx.needs_input_grad[0]
        gradient_ND = torch.empty_like(hidden_ND) if wants_gradient else None
        for start in range(0, labels_N.numel(), _CHUNK):
            part = slice(start, start + _CHUNK)
            logits_CV = nn.functional.linear(hidden_ND[part], weight_VD, bias_V).float()
            normalizer_C = torch.logsumexp(logits_CV, dim=-1)
            labels_C1 = labels_N[part, None]
            losses_N[part] = normalizer_C - logits_CV.gather(1, labels_C1)[:, 0]
            if gradient_ND is not None:
                share_CV = logits_CV.sub_(normalizer_C[:, None]).exp_()
                share_CV.scatter_add_(1, labels_C1, share_CV.new_full(labels_C1.shape, -1.0))
                gradient_ND[part] = share_CV.to(weight_VD.dtype) @ weight_VD
        ctx.save_for_backward(gradient_ND)
        return losses_N

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, None, None, None]:
        (gradient_ND,) = ctx.saved_tensors
        return (gradient_ND * outer[0][:, None].to(gradient_ND.dtype), None, None, None)


class _HeadDivergence(torch.autograd.Function):
    """KL between two final hidden states under one frozen head, chunk by chunk, as in _HeadLoss."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, wanted_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None) -> Tensor:
        divergences_N = torch.empty(hidden_ND.shape[0], dtype=torch.float32, device=hidden_ND.device)
        gradient_ND = torch.empty_like(hidden_ND)
        for start in range(0, hidden_ND.shape[0], _CHUNK):
            part = slice(start, start + _CHUNK)
            ours_CV = nn.functional.linear(hidden_ND[part], weight_VD, bias_V).float().log_softmax(-1)
            theirs_CV = nn.functional.linear(wanted_ND[part], weight_VD, bias_V).float().log_softmax(-1)
            share_CV = theirs_CV.exp()
            divergences_N[part] = (share_CV * theirs_CV.sub_(ours_CV)).sum(-1)
            gradient_ND[part] = ours_CV.exp_().sub_(share_CV).to(weight_VD.dtype) @ weight_VD
        ctx.save_for_backward(gradient_ND)
        return divergences_N

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient_ND,) = ctx.saved_tensors
        return (gradient_ND * outer[0][:, None].to(gradient_ND.dtype), None, None, None)
