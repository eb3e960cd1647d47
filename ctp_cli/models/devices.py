"""Which device to work on."""

import torch

from ctp_cli.errors import RecipeError


def resolve_device(name: str) -> str:
    """'auto' is CUDA where there is one, else the CPU. Raises RecipeError for a device that is not there."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise RecipeError(f"device: {name!r} is not a torch device", hint="use auto, cpu or cuda") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise RecipeError(f"device: {name} asked for, but torch sees no CUDA device", hint="use --device cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise RecipeError(f"device: {name} cannot be used ({reason})", hint="use --device cpu") from None
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # what picks a device of its own, such as accelerate, then picks this one
    return str(device)
