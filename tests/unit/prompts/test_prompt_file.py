"""The prompt file comes back as it was saved, and damage is explained, never a traceback."""

import contextlib
import json
import struct

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_models import tiny_tokenizer
from tokenizers import processors
from transformers import AutoTokenizer

from ctp_cli.errors import InputError
from ctp_cli.prompts.file import (
    PROMPT_FILE,
    Prompt,
    PromptMetadata,
    check_fits,
    fingerprint_embedding,
    fingerprint_tokenizer,
    load_prompt,
    save_prompt,
)

FULL = PromptMetadata(
    layout="bos-prompt-text",
    base_model="tiny",
    tokenizer_fingerprint="a",
    embedding_fingerprint="b",
    compression='{"bits": 4}',
    data="pydoc:train",
    steps=120,
    seed=7,
    validation_perplexity=12.5,
)


def _prompt(metadata=FULL):
    return Prompt(torch.randn(5, 8, generator=torch.Generator().manual_seed(0)), metadata)


def _raw(path, header, data=b""):
    text = json.dumps(header).encode() if not isinstance(header, bytes) else header
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def test_a_prompt_comes_back_bit_for_bit_from_file_or_folder(tmp_path):
    prompt = _prompt()
    save_prompt(tmp_path / PROMPT_FILE, prompt)
    for path in (tmp_path, tmp_path / PROMPT_FILE):
        loaded = load_prompt(path)
        assert torch.equal(loaded.embeddings, prompt.embeddings)
        assert loaded.metadata == prompt.metadata
    assert [p.name for p in tmp_path.iterdir()] == [PROMPT_FILE]


def test_the_file_is_what_the_format_says(tmp_path):
    save_prompt(tmp_path / PROMPT_FILE, _prompt())
    with safe_open(tmp_path / PROMPT_FILE, "pt") as file:
        assert list(file.keys()) == ["prompt_embeddings"]
        assert file.get_tensor("prompt_embeddings").dtype == torch.float32
        assert file.metadata()["layout"] == "bos-prompt-text"
        assert file.metadata()["format_version"] == "1"


def test_unknown_facts_stay_unknown(tmp_path):
    save_prompt(tmp_path / PROMPT_FILE, _prompt(PromptMetadata()))
    assert load_prompt(tmp_path).metadata == PromptMetadata()


def test_a_foreign_file_with_only_the_tensor_is_read(tmp_path):
    rows = torch.randn(3, 8)
    save_file({"prompt_embeddings": rows.half()}, tmp_path / "adapter_model.safetensors")
    loaded = load_prompt(tmp_path / "adapter_model.safetensors")
    assert torch.equal(loaded.embeddings, rows.half().float())
    assert loaded.metadata.tokenizer_fingerprint is None


def test_a_file_cut_anywhere_is_refused(tmp_path):
    save_prompt(tmp_path / PROMPT_FILE, _prompt())
    whole = (tmp_path / PROMPT_FILE).read_bytes()
    for length in range(len(whole)):
        (tmp_path / PROMPT_FILE).write_bytes(whole[:length])
        with pytest.raises(InputError, match=r"prompt\.safetensors"):
            load_prompt(tmp_path)


def test_no_flipped_header_bit_leads_to_a_traceback(tmp_path):
    save_prompt(tmp_path / PROMPT_FILE, _prompt())
    whole = (tmp_path / PROMPT_FILE).read_bytes()
    header_end = 8 + int.from_bytes(whole[:8], "little")
    for position in range(header_end):
        for bit in (0, 4, 7):
            flipped = bytearray(whole)
            flipped[position] ^= 1 << bit
            (tmp_path / PROMPT_FILE).write_bytes(flipped)
            with contextlib.suppress(InputError):
                load_prompt(tmp_path)


@pytest.mark.parametrize(
    ("header", "data"),
    [
        ({"prompt_embeddings": {"dtype": "F32", "shape": [2**40, 2**20], "data_offsets": [0, 2**62]}}, b""),
        (
            {"prompt_embeddings": {"dtype": "F32", "shape": [100_000, 1], "data_offsets": [0, 400_000]}},
            bytes(400_000),
        ),
        ({"prompt_embeddings": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 8]}}, bytes(8)),
        ({"prompt_embeddings": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}, bytes(16)),
        ({"prompt_embeddings": {"dtype": "I64", "shape": [1, 2], "data_offsets": [0, 16]}}, bytes(16)),
        ({"prompt_embeddings": {"dtype": "F32", "shape": [0, 2], "data_offsets": [0, 0]}}, b""),
        ({"prompt_embeddings": {"dtype": "F32", "shape": [-1, 2], "data_offsets": [0, 8]}}, bytes(8)),
        ({"other": {"dtype": "F32", "shape": [1, 2], "data_offsets": [0, 8]}}, bytes(8)),
        ({"prompt_embeddings": {"shape": [1, 2]}}, bytes(8)),
        ({"prompt_embeddings": [1, 2]}, bytes(8)),
        ([1, 2], b""),
        (b"\xff" * 20, b""),
        (b"[" * 100_000, b""),
    ],
)
def test_sizes_and_shapes_are_checked(header, data, tmp_path):
    with pytest.raises(InputError):
        load_prompt(_raw(tmp_path / PROMPT_FILE, header, data))


@pytest.mark.parametrize(
    ("field", "value", "match"),
    [
        ("steps", "many", "not a number"),
        ("format_version", "2", "update ctp|this ctp reads"),
        ("kind", "hologram", "kind"),
        ("layout", "text-prompt", "layout"),
    ],
)
def test_a_header_that_makes_no_sense_is_named(field, value, match, tmp_path):
    save_file({"prompt_embeddings": torch.ones(1, 2)}, tmp_path / PROMPT_FILE, metadata={field: value})
    with pytest.raises(InputError, match=match):
        load_prompt(tmp_path)


def test_nan_is_refused(tmp_path):
    save_file({"prompt_embeddings": torch.tensor([[1.0, float("nan")]])}, tmp_path / PROMPT_FILE)
    with pytest.raises(InputError, match="NaN"):
        load_prompt(tmp_path)


def test_a_missing_file_says_what_to_give(tmp_path):
    for path in (tmp_path, tmp_path / "none.safetensors"):
        with pytest.raises(InputError) as caught:
            load_prompt(path)
        assert PROMPT_FILE in caught.value.hint


def test_tokenizer_fingerprint_is_about_text_to_ids_only(tmp_path):
    tokenizer = tiny_tokenizer(bos=True)
    fingerprint = fingerprint_tokenizer(tokenizer)
    tokenizer.save_pretrained(tmp_path)
    assert fingerprint_tokenizer(AutoTokenizer.from_pretrained(tmp_path)) == fingerprint
    assert fingerprint_tokenizer(tiny_tokenizer(bos=False, chat=False)) == fingerprint
    tokenizer(["a", "b c d e f"], padding=True, truncation=True, max_length=4)
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel()
    assert fingerprint_tokenizer(tokenizer) == fingerprint
    tokenizer.add_tokens(["<new>"])
    assert fingerprint_tokenizer(tokenizer) != fingerprint


def test_tokenizers_with_the_same_tokens_but_other_merges_differ():
    tokenizer = tiny_tokenizer(bos=False)
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content["model"]["merges"].reverse()
    other = tiny_tokenizer(bos=False)
    other._tokenizer = other.backend_tokenizer.from_str(json.dumps(content))
    assert fingerprint_tokenizer(other) != fingerprint_tokenizer(tokenizer)


def test_embedding_fingerprint_survives_casts_and_sees_changes():
    table = torch.randn(40, 33, generator=torch.Generator().manual_seed(0)).bfloat16()
    table[0] *= 1e-9  # lost in float16, their signs are not
    fingerprint = fingerprint_embedding(table)
    for cast in (torch.float32, torch.float16):
        assert fingerprint_embedding(table.to(cast)) == fingerprint
    changed = table.clone()
    changed[39, 32] *= -1
    assert fingerprint_embedding(changed) != fingerprint
    assert fingerprint_embedding(table.reshape(33, 40)) != fingerprint


def test_a_prompt_fits_its_model_and_no_other():
    tokenizer = tiny_tokenizer(bos=False)
    table = torch.randn(320, 8)
    facts = PromptMetadata(
        tokenizer_fingerprint=fingerprint_tokenizer(tokenizer),
        embedding_fingerprint=fingerprint_embedding(table),
        compression='{"bits": 3}',
    )
    assert check_fits(_prompt(facts), tokenizer=tokenizer, embedding=table.bfloat16(), model="m") == ()
    assert len(check_fits(_prompt(PromptMetadata()), tokenizer=tokenizer, embedding=table, model="m")) == 2
    with pytest.raises(InputError, match=r"8 wide.* 16"):
        check_fits(_prompt(PromptMetadata()), tokenizer=tokenizer, embedding=torch.ones(320, 16), model="m")
    with pytest.raises(InputError, match="embedding table"):
        check_fits(_prompt(facts), tokenizer=tokenizer, embedding=-table, model="m")
    tokenizer.add_tokens(["<new>"])
    with pytest.raises(InputError, match="tokenizer"):
        check_fits(_prompt(facts), tokenizer=tokenizer, embedding=table, model="m")
