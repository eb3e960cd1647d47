"""A prompt as a PEFT adapter: a folder that `PeftModel.from_pretrained(base, folder)` loads."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from ctp_cli.errors import UnsupportedModelError
from ctp_cli.files import whole_file, write_json
from ctp_cli.prompts.file import KvPrefix, Prompt, in_dtype
from ctp_cli.prompts.prefix import behind_bos

BOS_INSIDE = "the BOS token comes first in it: tokenize text with add_special_tokens=False"
_NO_BOS = "the prompt was learned without a BOS token: tokenize text with add_special_tokens=False"


@torch.no_grad()
def export_peft(
    prompt: Prompt,
    folder: Path,
    *,
    model: PreTrainedModel,
    base_name: str,
    bos_id: int | None,
    dtype: torch.dtype | None = None,
) -> tuple[str, ...]:
    """Write adapter_config.json and adapter_model.safetensors (`dtype` None: float32); return notes for the user.

    PEFT puts its rows before everything, a BOS included. A prompt that stands after a BOS (`bos_id` given)
    therefore takes the BOS token's embedding along as its first row, and text is given without one.
    Source: PEFT 0.21, peft/tuners/prompt_tuning.
    """
    rows = prompt.embeddings
    if bos_id is not None:
        bos_row = behind_bos(rows[:0], model, bos_id).float().cpu()
        rows = torch.cat([bos_row, rows])
    text_config = model.config.get_text_config()
    _write(
        folder,
        model,
        in_dtype(rows, dtype),
        {
            "peft_type": "PROMPT_TUNING",
            "base_model_name_or_path": base_name,
            "token_dim": rows.shape[1],
            "num_attention_heads": text_config.num_attention_heads,
            "prompt_tuning_init": "RANDOM",
        },
    )
    return (_NO_BOS if bos_id is None else BOS_INSIDE,)


def export_peft_prefix(
    prefix: KvPrefix, folder: Path, *, model: PreTrainedModel, base_name: str, dtype: torch.dtype | None = None
) -> tuple[str, ...]:
    """As `export_peft`, for an adapter of prefix tuning: rows (P, layers x 2 x heads x head width).

    Source: PEFT 0.21, peft/peft_model.py, get_prompt.
    """
    _, _, heads, tokens, width = prefix.key_values.shape
    rows = prefix.key_values.permute(3, 0, 1, 2, 4).reshape(tokens, -1)
    _write(
        folder,
        model,
        in_dtype(rows, dtype),
        {
            "peft_type": "PREFIX_TUNING",
            "base_model_name_or_path": base_name,
            "token_dim": heads * width,
            "num_attention_heads": heads,
            "prefix_projection": False,
        },
    )
    return (_NO_BOS if prefix.metadata.layout == "prompt-text" else BOS_INSIDE,)


def _write(folder: Path, model: PreTrainedModel, rows: torch.Tensor, facts: dict[str, Any]) -> None:
    config = model.config
    if config.is_encoder_decoder:
        raise UnsupportedModelError(f"{config.model_type} is an encoder-decoder: prompts are for decoders")
    common = {
        "task_type": "CAUSAL_LM",
        "num_virtual_tokens": rows.shape[0],
        "num_layers": config.get_text_config().num_hidden_layers,
        "num_transformer_submodules": 1,
        "inference_mode": True,
    }
    write_json(folder / "adapter_config.json", facts | common)
    with whole_file(folder / "adapter_model.safetensors") as beside:
        save_file({"prompt_embeddings": rows.contiguous()}, beside, metadata={"format": "pt"})
