"""What a compressed model's last decoder block gave at some positions of the calibration text: kept with a checkpoint.

From them a prompt's head rows are found later (`prompts/rejection.py`) without running the model. The file is in a
folder of its own: readers of a checkpoint take every safetensors file beside config.json for weights.

N=positions D=hidden_width B=windows T=tokens
"""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ctp_cli.errors import InputError
from ctp_cli.files import whole_file
from ctp_cli.models.activations import Tensors

FILE = Path("calibration", "hidden_states.safetensors")
POSITIONS = 256
_TENSOR = "hidden_states"


def save_hidden_states(folder: Path, hidden_BTD: Tensors) -> None:
    """Write (N, D), N at most POSITIONS, evenly spread over batches (B, T, D), into the checkpoint `folder`.

    The first token of a window is left out: no text is seen there once a prompt stands before it.
    """
    positions = sum(x.shape[0] * (x.shape[1] - 1) for x in hidden_BTD)
    stride = -(-positions // POSITIONS)
    kept: list[Tensor] = []
    offset = 0
    for x_BTD in hidden_BTD:
        x_ND = x_BTD[:, 1:].flatten(0, 1)
        kept.append(x_ND[-offset % stride :: stride].cpu())
        offset += len(x_ND)
    (folder / FILE).parent.mkdir(exist_ok=True)
    with whole_file(folder / FILE) as beside:
        save_file({_TENSOR: torch.cat(kept).contiguous()}, beside)


def load_hidden_states(folder: Path) -> Tensor | None:
    """(N, D), or None for a checkpoint without: one of other tools, or made before ctp kept them.

    Raises InputError for a file that is damaged or holds something else.
    """
    file = folder / FILE
    if not file.is_file():
        return None
    try:
        with safe_open(file, "pt") as handle:
            hidden_ND: Tensor = handle.get_tensor(_TENSOR)
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{file}: damaged ({error})", hint="remove it: the model is run instead, which takes longer"
        ) from None
    if hidden_ND.dim() != 2 or not hidden_ND.numel() or not torch.isfinite(hidden_ND).all():
        raise InputError(
            f"{file}: no hidden states, which are finite numbers, positions x hidden width",
            hint="remove it: the model is run instead, which takes longer",
        )
    return hidden_ND
