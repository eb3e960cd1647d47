"""Checkpoints in every format: weights, configurations, tokenizers, links."""

import random
import shutil
from pathlib import Path

from hostile.damage import damaged_bytes, damaged_json, wrong_place
from hostile.inputs import LEARN, SMALL, Inputs, Mutant
from hostile.safetensors_files import damaged_safetensors

_OFTEN = ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json")


def checkpoint_mutant(draw: random.Random, inputs: Inputs, place: Path) -> Mutant:
    form = draw.choice(("dense", "shards", "gptq", "compressed-tensors", "ctp", "stitched"))
    folder = place / "model"
    shutil.copytree(inputs.folder / form, folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    weights = [path for path in files if path.suffix == ".safetensors"]
    often = [path for path in files if path.name in _OFTEN]
    what = []
    for _ in range(draw.choice((1, 1, 1, 2))):
        file = draw.choice(draw.choice((files, weights, often)))
        if draw.random() < 0.06 or not file.is_file():
            how = wrong_place(draw, file) if not file.is_dir() else "nothing more"
        else:
            content = file.read_bytes()
            mutate = {".safetensors": damaged_safetensors, ".json": damaged_json}.get(file.suffix, damaged_bytes)
            try:
                content, how = mutate(draw, content)
            except (ValueError, KeyError, IndexError, TypeError, AttributeError):  # a second change to a broken file
                content, how = damaged_bytes(draw, content)
            file.write_bytes(content)
        what.append(f"{file.relative_to(folder)}: {how}")
    text, prompt = str(inputs.folder / "text.txt"), str(inputs.folder / "soft.safetensors")
    compress = ("compress", "model", "--bits", "4", "--group-size", "32", "--calibration", text, *SMALL, "-o", "out")
    commands: list[tuple[str, ...]] = [
        ("eval", "model", "--ppl", text, *SMALL, "-o", "out"),
        ("stitch", prompt, "model", "-o", "out"),
        ("learn", "model", "--text", text, *LEARN, "-o", "out"),
    ]
    if form in ("dense", "shards"):
        commands += [compress, compress, (*compress, "--dry-run"), (*compress, "--tune-windows", "1")]
    elif form == "stitched":
        commands += [("unstitch", "model", "-o", "out")] * 3
    else:
        forms = ("gptq", "compressed-tensors", "ctp", "dense")
        commands += [("convert", "model", "--format", draw.choice(forms), "-o", "out")] * 3
    return Mutant(draw.choice(commands), f"{form}: {'; '.join(what)}")
