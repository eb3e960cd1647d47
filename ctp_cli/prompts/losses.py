"""The loss of text behind a learned prompt, which is rows among the embeddings, or keys and values.

B=batch T=tokens P=prompt tokens D=embedding width L=layers H=key-value heads C=head width
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from ctp_kernels.arithmetic import fast_arithmetic
from ctp_kernels.prefix import cache_of, cache_with, fresh_copy, key_values_of
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from ctp_cli.errors import InputError
from ctp_cli.models.head import Scorer, SoftTargets
from ctp_cli.models.lean import keep_less
from ctp_cli.models.loading import check_ids, decoder_embedding
from ctp_cli.models.sharding import Frozen
from ctp_cli.prompts.prefix import behind_bos, kv_template, rows_prefix


class PromptedLoss(nn.Module, ABC):
    """Mean loss of text behind a learned prompt, on one of several frozen models. `prompt` is its only parameter."""

    def __init__(self, models: Sequence[Frozen], start: Tensor) -> None:
        super().__init__()
        self.prompt = nn.Parameter(start.to(models[0].model.device, copy=True))
        # held outside of nn.Module's registry: its parameters are neither prepared, synchronized nor saved with ours
        self._frozen = tuple(models)
        for frozen in models:
            keep_less(frozen.model)
        self._scorers = tuple(frozen(Scorer) for frozen in models)

    @property
    def models(self) -> int:
        """How many there are."""
        return len(self._frozen)

    def check_ids(self, ids: Tensor) -> None:
        """Raises UnknownTokenError for ids that have no row in the models' embedding tables, which are equal."""
        check_ids(ids, self._frozen[0].model)

    def forward(self, ids_BT: Tensor, which: int, soft: SoftTargets | None) -> Tensor:
        """Mean loss of ids_BT on the model number `which`, against its labels or these targets."""
        loss: Tensor = self._frozen[which](lambda model: self._loss(model, ids_BT, which, soft))
        return loss

    @abstractmethod
    def _loss(self, model: PreTrainedModel, ids_BT: Tensor, which: int, soft: SoftTargets | None) -> Tensor: ...

    @abstractmethod
    def learned(self, parameter: Tensor) -> Tensor:
        """What a value of the parameter stands for: that which is saved."""

    @abstractmethod
    def prefix(self, which: int) -> Cache:
        """Keys and values of the prompt as it is now, on the model number `which`, batch size 1, without gradients."""


class SoftPromptLoss(PromptedLoss):
    """The prompt is rows (P, D) float32 among the input embeddings.

    On the CPU its keys and values, which are the same for every sequence of a batch, are computed once, and gradients
    flow back through them. Elsewhere it stands before every sequence unless it is longer than these: launching kernels
    twice, and attention behind a prefix, would cost more than its rows. With `bos_id` that token stands before the
    rows, and is not learned.
    """

    def __init__(self, models: Sequence[Frozen], start: Tensor, *, bos_id: int | None = None) -> None:
        super().__init__(models, start)
        self._bos_id = bos_id

    def _loss(self, model: PreTrainedModel, ids_BT: Tensor, which: int, soft: SoftTargets | None) -> Tensor:
        rows_PD = behind_bos(self.prompt, model, self._bos_id)
        in_front = model.device.type != "cpu" and len(rows_PD) <= ids_BT.shape[1]
        way = self._in_front if in_front else self._behind_prefix
        return way(rows_PD, model, ids_BT, which, soft)

    def _in_front(
        self, rows_PD: Tensor, model: PreTrainedModel, ids_BT: Tensor, which: int, soft: SoftTargets | None
    ) -> Tensor:
        embeds_BTD = decoder_embedding(model)(ids_BT).to(rows_PD.dtype)
        embeds_BTD = torch.cat([rows_PD.expand(len(ids_BT), -1, -1), embeds_BTD], dim=1)
        return self._scorers[which].nll(ids_BT, soft=soft, inputs_embeds=embeds_BTD).mean()

    def _behind_prefix(
        self, rows_PD: Tensor, model: PreTrainedModel, ids_BT: Tensor, which: int, soft: SoftTargets | None
    ) -> Tensor:
        with fast_arithmetic(model.device):
            of_prompt = model.base_model(inputs_embeds=rows_PD[None], use_cache=True)
        prefix = fresh_copy(cache_of(of_prompt), batch_size=ids_BT.shape[0])
        loss = self._scorers[which].nll(ids_BT, prefix=prefix, soft=soft, input_ids=ids_BT).mean()
        if self._frozen[which].is_sharded:
            # the last block's keys and values are used, its output is not; but it is at a gradient of its output that
            # FSDP fetches a block's weights again
            loss = loss + (0 * of_prompt.last_hidden_state).sum()
        return loss

    def learned(self, parameter: Tensor) -> Tensor:
        return parameter.float()

    @torch.no_grad()
    def prefix(self, which: int) -> Cache:
        made: Cache = self._frozen[which](
            lambda model: rows_prefix(behind_bos(self.prompt.detach(), model, self._bos_id), model)
        )
        return made


class KvPrefixLoss(PromptedLoss):
    """The prompt is every layer's keys and values (L, 2, H, P, C) float32 (prefix tuning, Li and Liang 2021).

    The parameter is in units of their standard deviation at the start, layer by layer, keys and values apart: these
    differ a thousandfold, and AdamW moves all parameters alike.
    """

    def __init__(self, models: Sequence[Frozen], start: Tensor) -> None:
        device = models[0].model.device
        self.unit_L2111 = start.std(dim=(2, 3, 4), keepdim=True).clamp(min=1e-6).to(device)
        super().__init__(models, start.to(device) / self.unit_L2111)
        self._templates: list[Cache] = [frozen(lambda model: kv_template(start.shape[3], model)) for frozen in models]
        for frozen, template in zip(models, self._templates, strict=True):
            if key_values_of(template).shape != start.shape:
                raise InputError(
                    f"{type(frozen.model).__name__}: its layers' keys and values are not shaped as those of the first "
                    "model",
                    hint="one prefix is learned for compressions of one model",
                )

    def _loss(self, model: PreTrainedModel, ids_BT: Tensor, which: int, soft: SoftTargets | None) -> Tensor:
        prefix = self._cache(which, ids_BT.shape[0])
        return self._scorers[which].nll(ids_BT, prefix=prefix, soft=soft, input_ids=ids_BT).mean()

    def learned(self, parameter: Tensor) -> Tensor:
        return parameter.float() * self.unit_L2111.to(parameter.device)

    @torch.no_grad()
    def prefix(self, which: int) -> Cache:
        return self._cache(which, 1)

    def _cache(self, which: int, batch: int) -> Cache:
        dtype = self._frozen[which].model.dtype
        return cache_with(self._templates[which], self.learned(self.prompt).to(dtype), batch)
