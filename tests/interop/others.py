"""Checkpoints that others make, as they are: every command of ctp takes them, and computes their maker's logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
MAKERS = {
    "gptqmodel": ("gptq", ["with_gptqmodel.py"]),
    "llmcompressor": ("compressed-tensors", ["with_llmcompressor.py", "--method", "gptq", "--packed"]),
}
"""By environment: the format in which its compressor saves, and the script that drives it, with options."""


@dataclass(frozen=True)
class Other:
    """One checkpoint, made by the compressor of an environment: 4 bits, groups of 64."""

    environment: str
    symmetric: bool

    @property
    def name(self) -> str:
        return f"by-{self.environment}-{'sym' if self.symmetric else 'asym'}"

    @property
    def form(self) -> str:
        return MAKERS[self.environment][0]

    def command(self, python: Path, model: Path, windows: Path, folder: Path) -> list[str]:
        """What makes it; `windows` holds token ids (N, T)."""
        script, *options = MAKERS[self.environment][1]
        options += ["--bits", "4", "--group-size", "64", *(["--symmetric"] if self.symmetric else [])]
        path = HERE.parents[1] / "benchmarks" / "peers" / script
        return [str(python), str(path), str(model), str(windows), str(folder), *options]


def others() -> list[Other]:
    """Both symmetries of every maker."""
    return [Other(environment, symmetric) for environment in MAKERS for symmetric in (True, False)]


def write_windows(file: Path, model: Path, text: Path, windows: int = 16, tokens: int = 128) -> None:
    """The text's first windows, as the makers want them."""
    from safetensors.torch import save_file
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = tokenizer(text.read_text()[: 16 * windows * tokens], return_tensors="pt", verbose=False)["input_ids"][0]
    save_file({"ids": ids[: windows * tokens].view(windows, tokens).contiguous()}, file)


def use(ctp: Callable[..., None], checkpoint: Path, stitched: Path, text: Path) -> list[str]:
    """Every command that takes a checkpoint; one of them makes the stitched one. Returns the commands' names.

    `ctp` runs a command and raises where it ends with another exit code than 0.
    """
    work = checkpoint.parent
    given, prompt = str(checkpoint), str(work / "prompt")
    sizes = ["--seqlen", "64", "--force"]
    commands = {
        "learn": [given, "--text", str(text), "--steps", "4", "--tokens", "8", *sizes, "-o", prompt],
        "eval": [given, "--prompt", prompt, "--ppl", str(text), "--windows", "4", *sizes, "-o", str(work / "eval")],
        "bench": [given, "--prompt-len", "0,8", "--rounds", "2", *sizes, "-o", str(work / "bench")],
        "stitch": [prompt, given, "--force", "-o", str(stitched)],
    }
    for name, arguments in commands.items():
        ctp(name, *arguments)
    return list(commands)


def write_twin(ctp: Callable[..., None], checkpoint: Path, tokens: int = 64) -> None:
    """Beside the checkpoint its weights as ctp decodes them, and the logits that ctp computes from packed ones."""
    import torch
    from safetensors.torch import save_file

    from ctp_cli.models.loading import load_model

    ctp("convert", str(checkpoint), "--format", "dense", "--force", "-o", str(checkpoint.parent / "dense"))
    model = load_model(checkpoint, dtype=torch.float32, packed=True)
    ids = torch.randint(model.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        logits = model(ids).logits
    save_file({"ids": ids, "logits": logits.contiguous()}, checkpoint.parent / "reference.safetensors")
