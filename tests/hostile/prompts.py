"""Prompt files, read by stitch, eval and learn."""

import random
from pathlib import Path

from hostile.damage import wrong_place
from hostile.inputs import LEARN, SMALL, Inputs, Mutant
from hostile.safetensors_files import damaged_safetensors


def prompt_mutant(draw: random.Random, inputs: Inputs, place: Path) -> Mutant:
    kind = draw.choice(("soft", "soft", "kv"))
    content, what = damaged_safetensors(draw, (inputs.folder / f"{kind}.safetensors").read_bytes())
    folder = place / "prompt"
    folder.mkdir()
    file = folder / "prompt.safetensors"
    if draw.random() < 0.03:
        what = wrong_place(draw, file)
    else:
        file.write_bytes(content)
    given = str(draw.choice((file, folder)).relative_to(place))
    model = str(inputs.folder / draw.choice(("dense", "ctp")))
    text = str(inputs.folder / "text.txt")
    form = draw.choice(("vocab", "peft", "kv")) if kind == "soft" else draw.choice(("kv", "peft"))
    commands: tuple[tuple[str, ...], ...] = (
        ("stitch", given, model, "--format", form, "-o", "out"),
        ("stitch", given, model, "--format", form, "-o", "out"),
        ("eval", model, "--prompt", given, "--ppl", text, *SMALL, "-o", "out"),
        ("learn", model, "--init", given, "--text", text, "--method", {"soft": "soft-prompt"}.get(kind, "kv-prefix"),
         *LEARN, "-o", "out"),
    )  # fmt: skip
    return Mutant(draw.choice(commands), f"{kind} prompt: {what}")
