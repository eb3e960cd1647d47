"""How packed models generate on the CPU: whose attention and whose dense products it is, and that they are the same."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ctp_kernels import arithmetic, attention, one_row
from tiny_models import VOCAB_SIZE, tiny_model
from transformers import AutoModelForCausalLM

import ctp_cli.integration  # noqa: F401 - registers the format
from ctp_cli.checkpoints import packed_generation
from ctp_cli.models.loading import load_model
from ctp_cli.models.resolve import resolve_model
from ctp_cli.recipe import CompressSection
from ctp_cli.stages.compress import compress


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    model = tiny_model("llama_tied_gqa", folder / "model", head_dim=64)  # as wide as the kernels need
    (folder / "text.txt").write_text("One query reads its keys where they lie. " * 40)
    section = CompressSection(
        **{"bits": 4, "group_size": 32, "windows": 4, "seqlen": 32, "format": "ctp"},
        calibration=str(folder / "text.txt"),
    )
    compress(section, model=resolve_model(str(model)), output=folder / "packed")
    return folder / "packed"


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many queries each product by our kernel had."""
    made: list[int] = []

    def counted(query: torch.Tensor, *given: Any) -> torch.Tensor | None:
        ours = attention.causal_attention(query, *given)
        if ours is not None:
            made.append(query.shape[2])
        return ours

    monkeypatch.setattr(arithmetic, "causal_attention", counted)
    return made


def load(path: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, **options).eval()


def ids() -> torch.Tensor:
    return torch.randint(3, VOCAB_SIZE, (2, 20), generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("loaded", [load, lambda path: load_model(path, packed=True)], ids=["transformers", "ctp"])
@torch.no_grad()
def test_texts_and_their_next_tokens_go_through_our_kernel(
    loaded: Callable[[Path], Any], packed: Path, taken: list[int]
) -> None:
    if attention._kernel(torch.float32) is None:
        pytest.skip("this processor has no instructions for float32, or there is no C++ compiler")
    ours, plain = loaded(packed), load(packed, attn_implementation="sdpa")
    layers = ours.config.num_hidden_layers
    wanted = plain.generate(ids(), max_new_tokens=4, do_sample=False)
    assert not taken
    assert torch.equal(ours.generate(ids(), max_new_tokens=4, do_sample=False), wanted)
    assert taken == [20] * layers + [1] * 3 * layers
    taken.clear()
    torch.testing.assert_close(ours(ids()).logits, plain(ids()).logits, rtol=1e-5, atol=1e-5)
    assert taken == [20] * layers


@torch.no_grad()
def test_padding_is_masked_as_pytorch_masks_it(packed: Path, taken: list[int]) -> None:
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[1, :5] = 0
    ours, plain = load(packed), load(packed, attn_implementation="sdpa")
    made, wanted = (m.generate(ids(), attention_mask=mask, max_new_tokens=4, do_sample=False) for m in (ours, plain))
    assert torch.equal(made, wanted) and not taken


@torch.no_grad()
def test_the_head_multiplies_one_row_by_our_kernel(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if one_row._kernel() is None:
        pytest.skip("this processor has no AVX2, or there is no C++ compiler")
    model = load(packed, dtype=torch.bfloat16)
    head = model.get_output_embeddings()
    assert isinstance(head, packed_generation.DenseLinear) and head.weight is model.get_input_embeddings().weight
    x = torch.randn(1, 1, head.in_features, generator=torch.Generator().manual_seed(1)).bfloat16()
    plain = torch.nn.functional.linear(x, head.weight)
    torch.testing.assert_close(head(x), plain, rtol=2**-7, atol=2**-7)
    monkeypatch.setattr(one_row, "linear", lambda *_: torch.full((1, 1, head.out_features), 7.0))
    assert bool((model(ids()[:1, :1]).logits == 7).all())


@torch.no_grad()
def test_other_models_and_those_with_an_attention_of_their_own_are_left_alone(
    packed: Path, tmp_path: Path, taken: list[int]
) -> None:
    dense = load(tiny_model("llama_tied_gqa", tmp_path / "dense", head_dim=64))
    for model in (dense, load(packed, attn_implementation="sdpa"), load(packed, attn_implementation="eager")):
        model(ids())
    assert not taken
