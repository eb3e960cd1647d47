"""A packed Llama on Triton's kernels, interpreted, against its dense twin; prints what was found as JSON.

Arguments: the packed checkpoint, and a folder to save it into again. A program of its own: whether kernels are
interpreted is settled when triton is imported.
"""

import json
import sys
from pathlib import Path

import torch
from ctp_kernels.triton.layouts import PackedWeight
from transformers import AutoModelForCausalLM, PreTrainedModel

import ctp_cli.integration  # noqa: F401 - registers the format
from ctp_cli.checkpoints.packed_linear import PackedLinear
from ctp_cli.models.loading import load_model


def outputs(model: PreTrainedModel, ids_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, and the gradient of their likelihood with respect to the embeddings."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    embeds = model.get_input_embeddings()(ids_BT).detach().requires_grad_(True)
    result = model(inputs_embeds=embeds, labels=ids_BT)
    # scaled, or float16 gradients would be too small to have all their digits
    (result.loss * 1024).backward()
    assert embeds.grad is not None
    return result.logits.detach(), embeds.grad


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def held_bytes(layers: list[PackedLinear]) -> int:
    return sum(tensor.nbytes for layer in layers for tensor in layer.buffers())


def main(checkpoint: Path, again: Path) -> dict[str, object]:
    found: dict[str, object] = {}
    ids_BT = torch.randint(3, 60, (1, 9), generator=torch.Generator().manual_seed(7))
    for dtype in (torch.float32, torch.float16):
        packed = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype).eval()
        layers = [module for module in packed.modules() if isinstance(module, PackedLinear)]
        before = held_bytes(layers)
        wanted = outputs(load_model(checkpoint, dtype=dtype), ids_BT)
        pairs = zip(outputs(packed, ids_BT), wanted, strict=True)
        found[str(dtype)] = [distance(*pair) for pair in pairs]
    found["converted"] = all(
        layer._weight is not None and isinstance(layer._weight.form, PackedWeight) for layer in layers
    )
    found["stored parts held"] = sum(layer.codes is not None or layer.mask is not None for layer in layers)
    found["own buffers"] = sorted({name for layer in layers for name, _ in layer.named_buffers()})
    packed.save_pretrained(again)
    found["restored bytes"] = held_bytes(layers) == before
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    json.dump(main(Path(sys.argv[1]), Path(sys.argv[2])), sys.stdout)
