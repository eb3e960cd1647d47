"""Attention in float32 is the same attention, more exactly."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from ctp_cli.models import attention


@pytest.mark.parametrize("masked", [False, True])
def test_float32_attention_is_nearer_to_float64_and_keeps_the_dtype(masked: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 65, 16, generator=generator).bfloat16() for _ in range(3))
    mask = torch.zeros(65, 65, dtype=torch.bfloat16).masked_fill(torch.ones(65, 65).triu(1) > 0, -torch.inf)
    exact = scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=True)
    how = {"attn_mask": mask} if masked else {"is_causal": True}
    plain = scaled_dot_product_attention(q, k, v, **how)
    with attention._Float32Attention():
        ours = scaled_dot_product_attention(q, key=k, value=v, **how)
    assert ours.dtype == torch.bfloat16
    # only the last rounding to bfloat16 is left
    assert ((ours.double() - exact).abs() <= exact.abs() * 2**-8 + 1e-6).all()
    assert (ours.double() - exact).abs().mean() < (plain.double() - exact).abs().mean()


def test_processors_with_amx_keep_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "cpu_features", lambda: frozenset({"amx_bf16"}))
    assert not isinstance(attention.fast_attention(), attention._Float32Attention)
    monkeypatch.setattr(attention, "cpu_features", frozenset)
    assert isinstance(attention.fast_attention(), attention._Float32Attention)
