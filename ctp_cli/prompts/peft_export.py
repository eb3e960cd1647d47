"""A prompt as a PEFT adapter: a folder that `PeftModel.from_pretrained(base, folder)` loads."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from ctp_cli.errors import UnsupportedModelError
from ctp_cli.files import whole_file, write_json
from ctp_cli.models.loading import decoder_embedding
from ctp_cli.prompts.file import Prompt


@torch.no_grad()
def export_peft(
    prompt: Prompt, folder: Path, *, model: PreTrainedModel, base_name: str, bos_id: int | None
) -> tuple[str, ...]:
    """Write adapter_config.json and adapter_model.safetensors; return notes for the user.

    PEFT puts its rows before everything, a BOS included. A prompt that stands after a BOS (`bos_id` given)
    therefore takes the BOS token's embedding along as its first row, and text is given without one.
    Source: PEFT 0.21, peft/tuners/prompt_tuning.
    """
    config = model.config
    if config.is_encoder_decoder:
        raise UnsupportedModelError(f"{config.model_type} is an encoder-decoder: prompts are for decoders")
    rows = prompt.embeddings
    if bos_id is not None:
        embed = decoder_embedding(model)
        bos_row = embed(torch.tensor([bos_id], device=embed.weight.device)).float().cpu()
        rows = torch.cat([bos_row, rows])
    text_config = config.get_text_config()
    write_json(
        folder / "adapter_config.json",
        {
            "peft_type": "PROMPT_TUNING",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base_name,
            "num_virtual_tokens": rows.shape[0],
            "token_dim": rows.shape[1],
            "num_layers": text_config.num_hidden_layers,
            "num_attention_heads": text_config.num_attention_heads,
            "num_transformer_submodules": 1,
            "prompt_tuning_init": "RANDOM",
            "inference_mode": True,
        },
    )
    with whole_file(folder / "adapter_model.safetensors") as beside:
        save_file({"prompt_embeddings": rows.contiguous()}, beside, metadata={"format": "pt"})
    if bos_id is not None:
        return ("the BOS token is the adapter's first row: tokenize text with add_special_tokens=False",)
    return ("the prompt was learned without a BOS token: tokenize text with add_special_tokens=False",)
