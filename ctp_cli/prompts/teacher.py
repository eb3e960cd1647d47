"""A teacher's likeliest next tokens for every step of learning, computed once and kept in files.

B=batch T=tokens K=likeliest tokens
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from ctp_kernels.prefix import fresh_copy
from safetensors.torch import load_file, save_file
from torch import Tensor

from ctp_cli.files import whole_file
from ctp_cli.models.head import Scorer
from ctp_cli.models.loading import check_ids
from ctp_cli.models.sharding import Frozen
from ctp_cli.progress import SILENT, Progress
from ctp_cli.prompts.prefix import bos_prefix

FILES = "teacher-*.safetensors"
_STEPS_PER_FILE = 50
_Held = dict[str, Tensor]


@dataclass
class Teacher:
    """`load` gives the teacher; it is in memory only while files are made. Targets have `share` of the loss."""

    load: Callable[[], Frozen]
    folder: Path
    share: float
    count: int
    """Tokens kept for each position. 32 of 49,152 hold about nine tenths of SmolLM2's probability."""
    is_sharded: bool = False
    """Then every process prepares, and one of them writes."""
    bos_id: int | None = None
    """Stands before the text that the teacher reads."""
    vocabulary: int | None = None
    """Rows of the student's head: the teacher's may be padded further."""
    _open: tuple[Path, _Held] | None = field(default=None, init=False)

    def prepare(
        self, batch_at: Callable[[int], Tensor], steps: int, *, writes: bool, progress: Progress = SILENT
    ) -> None:
        """Write the files that are missing; `batch_at(step)` is the batch (B, T) of a step."""
        firsts = range(0, steps, _STEPS_PER_FILE)
        missing = [first for first in firsts if not self._file(first).exists()]
        if not missing:
            return
        teacher = self.load()
        scorer: Scorer = teacher(Scorer)
        bos = None if self.bos_id is None else teacher(functools.partial(bos_prefix, bos_id=self.bos_id))
        progress.start("ask the teacher", len(missing) * _STEPS_PER_FILE)
        for first in missing:
            tensors: _Held = {}
            for step in range(first, min(first + _STEPS_PER_FILE, steps)):
                ids_BT = batch_at(step)
                check_ids(ids_BT, scorer.model)
                ids_BT = ids_BT.to(scorer.model.device)
                prefix = None if bos is None else fresh_copy(bos, batch_size=len(ids_BT))
                tokens_BTK, probabilities_BTK = teacher(
                    lambda _, ids_BT=ids_BT, prefix=prefix: scorer.likeliest(
                        ids_BT, self.count, below=self.vocabulary, prefix=prefix
                    )
                )
                tensors[f"tokens.{step}"] = tokens_BTK.to("cpu", torch.int32)
                tensors[f"probabilities.{step}"] = probabilities_BTK.to("cpu", torch.float16)
                progress.advance()
            if writes:
                with whole_file(self._file(first)) as beside:
                    save_file(tensors, beside)
        progress.finish()

    def at(self, step: int) -> dict[str, Tensor]:
        """Tokens and probabilities of a step's batch, (B, T - 1, K) both."""
        file = self._file(step - step % _STEPS_PER_FILE)
        if self._open is None or self._open[0] != file:
            self._open = file, load_file(file)
        held = self._open[1]
        return {name: held[f"{name}.{step}"] for name in ("tokens", "probabilities")}

    def _file(self, first: int) -> Path:
        return self.folder / f"teacher-{first:06}.safetensors"
