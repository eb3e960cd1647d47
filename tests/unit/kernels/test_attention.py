"""The compiled attention against PyTorch's in float64."""

import pytest
import torch
from ctp_kernels import attention
from ctp_kernels.attention import causal_attention
from torch.nn.functional import scaled_dot_product_attention


def needs_kernel() -> None:
    if attention._library() is None:
        pytest.skip("this processor has no AVX-512 BF16, or there is no C++ compiler")


def operands(tokens: int, prefix: int, heads: int, key_heads: int, width: int) -> tuple[torch.Tensor, ...]:
    """As models hand them over: heads cut out of (B, T, H * D). Some softmaxes are nearly one-hot, some flat."""
    generator = torch.Generator().manual_seed(tokens)
    q, k, v = (
        torch.randn(2, count, n * width, generator=generator).bfloat16().view(2, count, n, width).transpose(1, 2)
        for count, n in ((tokens, heads), (prefix + tokens, key_heads), (prefix + tokens, key_heads))
    )
    return q * 3, k, v


def mask(tokens: int, prefix: int) -> torch.Tensor:
    return torch.ones(tokens, prefix + tokens, dtype=torch.bool).tril(prefix)


@pytest.mark.parametrize(("tokens", "prefix"), [(1, 0), (3, 0), (64, 0), (65, 0), (130, 0), (1, 7), (60, 9), (33, 100)])
@pytest.mark.parametrize(("heads", "key_heads"), [(3, 3), (6, 2)])
@pytest.mark.parametrize("width", [64, 128])
def test_every_query_attends_to_the_keys_up_to_it(
    tokens: int, prefix: int, heads: int, key_heads: int, width: int
) -> None:
    needs_kernel()
    q, k, v = operands(tokens, prefix, heads, key_heads, width)
    ours = causal_attention(q, k, v, 0.2)
    how = {"attn_mask": mask(tokens, prefix), "scale": 0.2, "enable_gqa": heads != key_heads}
    exact = scaled_dot_product_attention(q.double(), k.double(), v.double(), **how)
    sizes = scaled_dot_product_attention(q.double(), k.double(), v.double().abs(), **how)
    assert ours is not None and ours.shape == q.shape and ours.dtype == torch.bfloat16
    # each weight, and the result, is rounded to bfloat16: half a unit in the eighth bit
    assert ((ours.double() - exact).abs() <= 1.5 * 2**-9 * (exact.abs() + sizes) + 1e-6).all()


@pytest.mark.parametrize(("tokens", "prefix"), [(1, 0), (3, 0), (64, 0), (130, 0), (1, 7), (60, 9), (33, 100)])
@pytest.mark.parametrize(("heads", "key_heads", "width"), [(3, 3, 64), (6, 2, 64), (2, 1, 128)])
def test_gradients_are_those_of_plain_attention(
    tokens: int, prefix: int, heads: int, key_heads: int, width: int
) -> None:
    needs_kernel()
    given = [x.detach().requires_grad_() for x in operands(tokens, prefix, heads, key_heads, width)]
    outer = torch.randn(2, heads, tokens, width, generator=torch.Generator().manual_seed(9)).bfloat16()
    ours = causal_attention(*given, 0.2)
    assert ours is not None
    ours.backward(outer)
    exact = [x.detach().double().requires_grad_() for x in given]
    how = {"attn_mask": mask(tokens, prefix), "scale": 0.2, "enable_gqa": heads != key_heads}
    scaled_dot_product_attention(*exact, **how).backward(outer.double())
    for made, wanted in zip(given, exact, strict=True):
        assert made.grad is not None and wanted.grad is not None and made.grad.shape == made.shape
        # rounded are weights, the gradients of scores, and the result
        assert (made.grad.double() - wanted.grad).norm() <= 0.005 * wanted.grad.norm() + 1e-6


def test_large_scores_neither_overflow_nor_leak_to_later_keys() -> None:
    needs_kernel()
    q = torch.full((1, 1, 70, 64), 30.0).bfloat16()
    v = torch.arange(70.0).view(1, 1, 70, 1).expand(1, 1, 70, 64).contiguous().bfloat16()
    ours = causal_attention(q, q, v, 1.0)
    wanted = torch.cumsum(torch.arange(70.0), 0) / torch.arange(1, 71)
    torch.testing.assert_close(ours[0, 0, :, 0].float(), wanted, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("dtype", "width", "key_tokens"), [(torch.float32, 64, 5), (torch.bfloat16, 48, 5), (torch.bfloat16, 64, 4)]
)
def test_what_does_not_fit_is_left_to_others(dtype: torch.dtype, width: int, key_tokens: int) -> None:
    q, k = torch.zeros(1, 2, 5, width, dtype=dtype), torch.zeros(1, 2, key_tokens, width, dtype=dtype)
    assert causal_attention(q, k, k, 1.0) is None
