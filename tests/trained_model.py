"""A small language model that really is trained, so that pruning hurts it and a prompt helps it."""

import shutil
from pathlib import Path

import torch
from tiny_models import tiny_tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig

from ctp_cli.data.sources import pydoc_text

STEPS, BATCH, SEQLEN = 300, 16, 64


def train(folder: Path) -> Path:
    """Train it into `folder`/small, or take what is there: about half a minute on one core."""
    finished = folder / "small"
    if (finished / "config.json").exists():
        return finished
    tokenizer = tiny_tokenizer(bos=False)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on matrices this small, threads only wait for one another
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    ids_T = torch.tensor(tokenizer(pydoc_text("train"), add_special_tokens=False)["input_ids"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=STEPS)
    for _ in range(STEPS):
        starts = torch.randint(ids_T.numel() - SEQLEN, (BATCH,))
        batch = torch.stack([ids_T[start : start + SEQLEN] for start in starts.tolist()])
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    torch.set_num_threads(threads)
    made = folder / "making"
    shutil.rmtree(made, ignore_errors=True)
    model.save_pretrained(made)
    tokenizer.save_pretrained(made)
    made.rename(finished)
    return finished
