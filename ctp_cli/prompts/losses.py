"""The loss of text behind a learned prompt, which is rows among the embeddings, or keys and values.

B=batch T=tokens P=prompt tokens D=embedding width L=layers H=key-value heads C=head width
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from ctp_kernels.arithmetic import where_slow
from ctp_kernels.prefix import cache_of, cache_with, fresh_copy
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from ctp_cli.models.head import Scorer, SoftTargets
from ctp_cli.models.loading import decoder_embedding
from ctp_cli.prompts.prefix import kv_template, rows_prefix


class PromptedLoss(nn.Module, ABC):
    """Mean loss of text behind a learned prompt, on one of several frozen models. `prompt` is its only parameter."""

    def __init__(self, models: Sequence[PreTrainedModel], start: Tensor) -> None:
        super().__init__()
        self.prompt = nn.Parameter(start.to(models[0].device, copy=True))
        # held outside of nn.Module's registry: its parameters are neither prepared, synchronized nor saved with ours
        self._frozen = tuple((model, Scorer(model)) for model in models)

    @property
    def models(self) -> int:
        """How many there are."""
        return len(self._frozen)

    @abstractmethod
    def forward(self, ids_BT: Tensor, which: int, soft: SoftTargets | None) -> Tensor:
        """Mean loss of ids_BT on the model number `which`, against its labels or these targets."""

    @abstractmethod
    def learned(self, parameter: Tensor) -> Tensor:
        """What a value of the parameter stands for: that which is saved."""

    @abstractmethod
    def prefix(self, which: int) -> Cache:
        """Keys and values of the prompt as it is now, on the model number `which`, batch size 1, without gradients."""


class SoftPromptLoss(PromptedLoss):
    """The prompt is rows (P, D) float32 among the input embeddings.

    Its keys and values are the same for every sequence of a batch: they are computed once, and gradients flow back
    through them.
    """

    def forward(self, ids_BT: Tensor, which: int, soft: SoftTargets | None) -> Tensor:
        model, scorer = self._frozen[which]
        rows_1PD = self.prompt.to(decoder_embedding(model).weight.dtype)[None]
        with where_slow(rows_1PD):
            cache = cache_of(model.base_model(inputs_embeds=rows_1PD, use_cache=True))
        prefix = fresh_copy(cache, batch_size=ids_BT.shape[0])
        return scorer.nll(ids_BT, prefix=prefix, soft=soft, input_ids=ids_BT).mean()

    def learned(self, parameter: Tensor) -> Tensor:
        return parameter.float()

    @torch.no_grad()
    def prefix(self, which: int) -> Cache:
        return rows_prefix(self.prompt.detach(), self._frozen[which][0])


class KvPrefixLoss(PromptedLoss):
    """The prompt is every layer's keys and values (L, 2, H, P, C) float32 (prefix tuning, Li and Liang 2021).

    The parameter is in units of their standard deviation at the start, layer by layer, keys and values apart: these
    differ a thousandfold, and AdamW moves all parameters alike.
    """

    def __init__(self, models: Sequence[PreTrainedModel], start: Tensor) -> None:
        self.unit_L2111 = start.std(dim=(2, 3, 4), keepdim=True).clamp(min=1e-6).to(models[0].device)
        super().__init__(models, start.to(models[0].device) / self.unit_L2111)
        self._templates = [kv_template(start.shape[3], model) for model in models]

    def forward(self, ids_BT: Tensor, which: int, soft: SoftTargets | None) -> Tensor:
        scorer = self._frozen[which][1]
        prefix = self._cache(which, ids_BT.shape[0])
        return scorer.nll(ids_BT, prefix=prefix, soft=soft, input_ids=ids_BT).mean()

    def learned(self, parameter: Tensor) -> Tensor:
        return parameter.float() * self.unit_L2111.to(parameter.device)

    @torch.no_grad()
    def prefix(self, which: int) -> Cache:
        return self._cache(which, 1)

    def _cache(self, which: int, batch: int) -> Cache:
        dtype = self._frozen[which][0].dtype
        return cache_with(self._templates[which], self.learned(self.prompt).to(dtype), batch)
