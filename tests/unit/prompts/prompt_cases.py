"""A prompt, a base and its stitched checkpoint, and what plain transformers makes of them."""

import pydoc_data.topics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ctp_cli.prompts.file import Prompt, PromptMetadata
from ctp_cli.prompts.stitching import StitchedCheckpoint, stitch_vocabulary

TEXT = "Lists are mutable sequences."


@dataclass
class Case:
    """A base as plain transformers loads it, a prompt, and where the stitched checkpoint is."""

    base: Path
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    prompt: Prompt
    folder: Path
    made: StitchedCheckpoint | None = None

    def stitched(self, **settings: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        model = AutoModelForCausalLM.from_pretrained(self.folder, **settings).eval()
        return model, AutoTokenizer.from_pretrained(self.folder)

    def bare_ids(self, text: str = TEXT) -> torch.Tensor:
        return self.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]

    def prompted_embeddings(self, text: str = TEXT) -> torch.Tensor:
        """[BOS,] prompt, text in the space of inputs_embeds, put together here and nowhere else."""
        embed = self.model.get_input_embeddings()
        rows = self.prompt.embeddings[None].to(embed.weight.dtype)
        parts = [rows, embed(self.bare_ids(text))]
        if self.prompt.metadata.layout == "bos-prompt-text":
            parts.insert(0, embed(torch.tensor([[self.tokenizer.bos_token_id]])))
        return torch.cat(parts, dim=1)

    @torch.no_grad()
    def expected_logits(self, text: str = TEXT) -> torch.Tensor:
        return self.model(inputs_embeds=self.prompted_embeddings(text)).logits


def load_case(base: Path, folder: Path, *, layout: str = "prompt-text", tokens: int = 9, seed: int = 1) -> Case:
    model = AutoModelForCausalLM.from_pretrained(base).eval().requires_grad_(False)
    prompt = prompt_for(model, layout=layout, tokens=tokens, seed=seed)
    return Case(base, model, AutoTokenizer.from_pretrained(base), prompt, folder)


def stitched_case(base: Path, folder: Path, *, vocab_multiple: int | None = None, **settings: Any) -> Case:
    """Stitch with the library's own function, given what plain transformers loaded."""
    case = load_case(base, folder, **settings)
    folder.mkdir()
    case.made = stitch_vocabulary(
        case.prompt,
        model=case.model,
        tokenizer=case.tokenizer,
        base=base,
        folder=folder,
        sample_ids=sample_ids(case.tokenizer),
        vocab_multiple=vocab_multiple,
    )
    return case


def prompt_for(model: PreTrainedModel, *, layout: str = "prompt-text", tokens: int = 9, seed: int = 1) -> Prompt:
    """Rows near those of random tokens, as learned prompts are."""
    generator = torch.Generator().manual_seed(seed)
    rows = model.get_input_embeddings()(torch.randint(3, 300, (tokens,), generator=generator)).detach().float()
    noise = 0.3 * rows.std() * torch.randn(rows.shape, generator=generator)
    return Prompt(rows + noise, PromptMetadata(layout=layout))


def sample_ids(tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    text = pydoc_data.topics.topics["typesseq"][:1200]
    return torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"][:300])
