"""Whole inputs, which mutants are made from: a tiny model in every format, prompts of every kind, texts, a recipe."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from ctp_cli.app import app
from ctp_cli.prompts.file import KvPrefix, Prompt, PromptMetadata, fingerprint_tokenizer, save_prompt

SMALL = ("--windows", "2", "--seqlen", "16")
LEARN = ("--tokens", "3", "--steps", "1", "--batch-size", "1", "--seqlen", "16", "--validation-windows", "2")
RECIPE = """\
# a recipe whose stages all are a moment's work
model: model
output: made
seed: 0
device: cpu
compress: {sparsity: '2:4', bits: 4, group_size: 32, calibration: text.txt, windows: 2, seqlen: 16, format: ctp,
  max_memory: 4GB}
learn:
  tokens: 3
  steps: 1
  batch_size: 1
  seqlen: 16
  learning_rate: 0.01
  text: pydoc:test
  validation: text.txt
  validation_windows: 2
  init: text:be brief
stitch: {format: vocab}
eval:
  ppl: ["t=text.txt"]
  seqlen: 16
  windows: 2
  max_ppl: 1e9
bench: {prompt_len: [0, 2], seqlen: 16, new_tokens: 2, rounds: 1}
"""


@dataclass(frozen=True)
class Mutant:
    """A damaged input in place, what was done to it, and the command that reads it."""

    arguments: tuple[str, ...]
    what: str


class Inputs:
    """Whole inputs in one folder, made once: a tiny model in every format, prompts of every kind, texts."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if (folder / "whole").exists():
            return
        folder.mkdir(parents=True, exist_ok=True)
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
        model = tiny_model("llama", folder / "dense", bos=False, **sizes)
        text = folder / "text.txt"
        text.write_text("a small text that is long enough for windows of sixteen tokens\n" * 40)
        for name in ("gptq", "compressed-tensors", "ctp"):
            line = ("compress", str(model), "--bits", "4", "--sparsity", "2:4", "--group-size", "32", "--format", name)
            self._make(*line, "--calibration", str(text), *SMALL, "-o", str(folder / name))
        self._make(
            "compress",
            str(model),
            "--sparsity",
            "0.5",
            "--calibration",
            str(text),
            *SMALL,
            "-o",
            str(folder / "shards"),
        )
        self._prompts(model)
        self._make("stitch", str(folder / "soft.safetensors"), str(model), "-o", str(folder / "stitched"))
        (folder / "whole").touch()

    @property
    def cache(self) -> Path:
        """Where the embedded model lies, which here is the tiny one: a recipe without a model fetches nothing."""
        place = self.folder / "cache" / "models" / "smollm2-135m"
        if not place.exists():
            shutil.copytree(self.folder / "dense", place)
        return self.folder / "cache"

    def _make(self, *arguments: str) -> None:
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output

    def _prompts(self, model: Path) -> None:
        network, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
        rows = network.get_input_embeddings().weight[5:8].detach().float().clone()
        facts = {
            "base_model": "dense",
            "tokenizer_fingerprint": fingerprint_tokenizer(tokenizer),
            "steps": 3,
            "seed": 1,
        }
        data = json.dumps({"text_sha256": "0", "file_sha256": "1"})
        soft = PromptMetadata(**facts, data=data, compression="null", validation_perplexity=9.5)
        save_prompt(self.folder / "soft.safetensors", Prompt(rows, soft))
        kv = torch.randn(2, 2, 2, 3, 16, generator=torch.Generator().manual_seed(0))
        save_prompt(self.folder / "kv.safetensors", KvPrefix(kv, PromptMetadata(kind="kv-prefix", **facts)))
