"""The attention that calibration uses is the same attention."""

import pytest
import torch
from torch.nn import functional

from ctp_cli.models import attention


@pytest.fixture
def without_amx(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "cpu_features", lambda: frozenset({"avx2"}))


@pytest.mark.usefixtures("without_amx")
@pytest.mark.parametrize("masked", [False, True])
def test_where_no_kernel_fits_attention_in_float32_is_nearer_to_float64_and_keeps_the_dtype(masked: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 65, 16, generator=generator).bfloat16() for _ in range(3))
    mask = torch.zeros(65, 65, dtype=torch.bfloat16).masked_fill(torch.ones(65, 65).triu(1) > 0, -torch.inf)
    exact = functional.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=True)
    how = {"attn_mask": mask} if masked else {"is_causal": True}
    plain = functional.scaled_dot_product_attention(q, k, v, **how)
    with attention.fast_attention():
        ours = functional.scaled_dot_product_attention(q, key=k, value=v, **how)
    assert ours.dtype == torch.bfloat16
    # only the last rounding to bfloat16 is left
    assert ((ours.double() - exact).abs() <= exact.abs() * 2**-8 + 1e-6).all()
    assert (ours.double() - exact).abs().mean() < (plain.double() - exact).abs().mean()


def test_it_is_replaced_meanwhile_and_not_on_processors_with_amx(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = functional.scaled_dot_product_attention
    for features, replaced in ((frozenset({"amx_bf16"}), False), (frozenset(), False), (frozenset({"avx2"}), True)):
        monkeypatch.setattr(attention, "cpu_features", lambda features=features: features)
        with attention.fast_attention():
            assert (functional.scaled_dot_product_attention is not plain) == replaced
        assert functional.scaled_dot_product_attention is plain


@pytest.mark.usefixtures("without_amx")
@pytest.mark.parametrize("scale", [None, 0.3])
def test_the_kernel_is_given_plain_causal_attention_only(scale: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[float] = []
    marked = torch.full((1, 2, 9, 64), 7.0).bfloat16()
    monkeypatch.setattr(attention, "causal_attention", lambda *given: (calls.append(given[3]), marked)[1])
    q = torch.randn(1, 2, 9, 64).bfloat16()
    with attention.fast_attention():
        assert functional.scaled_dot_product_attention(q, q, q, is_causal=True, scale=scale) is marked
        functional.scaled_dot_product_attention(q, q, q, scale=scale)
        functional.scaled_dot_product_attention(q, q, q, attn_mask=torch.ones(9, 9, dtype=torch.bool), scale=scale)
        functional.scaled_dot_product_attention(q.float(), q.float(), q.float(), is_causal=True, scale=scale)
    assert calls == [scale or 0.125]


@pytest.mark.usefixtures("without_amx")
@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("kind", ["bool", "minimum", "infinite"])
def test_a_mask_that_says_causal_behind_a_prefix_is_known(
    prefix: int, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    marked = torch.full((2, 2, 9, 64), 7.0).bfloat16()
    monkeypatch.setattr(attention, "causal_attention", lambda *given: (calls.append(given[1].shape[2]), marked)[1])
    q, k = torch.randn(2, 2, 9, 64).bfloat16(), torch.randn(2, 2, 9 + prefix, 64).bfloat16()

    def masked(seen: torch.Tensor) -> torch.Tensor:
        if kind == "bool":
            return seen
        least = torch.finfo(torch.bfloat16).min if kind == "minimum" else -torch.inf
        return torch.zeros(seen.shape, dtype=torch.bfloat16).masked_fill(~seen, least)

    causal = torch.ones(2, 1, 9, 9 + prefix, dtype=torch.bool).tril(prefix)
    padded, windowed, ahead = causal.clone(), causal.clone(), causal.clone()
    padded[1, :, :, 0] = False
    windowed[..., 8, :3] = False
    ahead[..., 0, prefix + 1] = True
    with attention.fast_attention():
        assert functional.scaled_dot_product_attention(q, k, k, attn_mask=masked(causal)) is marked
        for other in (padded, windowed, ahead):
            assert functional.scaled_dot_product_attention(q, k, k, attn_mask=masked(other)) is not marked
        soft = masked(causal).to(torch.bfloat16)
        soft[..., 0, 0] = -1.0
        assert functional.scaled_dot_product_attention(q, k, k, attn_mask=soft) is not marked
    assert calls == [9 + prefix]


@pytest.mark.usefixtures("without_amx")
def test_gradients_go_through_whichever_attention_is_taken() -> None:
    generator = torch.Generator().manual_seed(0)
    for width in (64, 16):  # our kernel's, where there is one, and PyTorch's
        q, k, v = (torch.randn(2, 3, 20, width, generator=generator).bfloat16().requires_grad_() for _ in range(3))
        exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
        functional.scaled_dot_product_attention(*exact, is_causal=True).square().sum().backward()
        with attention.fast_attention():
            functional.scaled_dot_product_attention(q, k, v, is_causal=True).float().square().sum().backward()
        for made, wanted in zip((q, k, v), exact, strict=True):
            assert (made.grad.double() - wanted.grad).norm() <= 0.02 * wanted.grad.norm()
