"""The compiled attention against PyTorch's in float64."""

import pytest
import torch
from ctp_kernels import attention
from ctp_kernels.attention import causal_attention
from torch.nn.functional import scaled_dot_product_attention


def needs_kernel() -> None:
    if attention._kernel() is None:
        pytest.skip("this processor has no AVX-512 BF16, or there is no C++ compiler")


@pytest.mark.parametrize("tokens", [1, 3, 64, 65, 130])
@pytest.mark.parametrize(("heads", "key_heads"), [(3, 3), (6, 2)])
@pytest.mark.parametrize("width", [64, 128])
def test_every_query_attends_to_the_keys_up_to_it(tokens: int, heads: int, key_heads: int, width: int) -> None:
    needs_kernel()
    generator = torch.Generator().manual_seed(tokens)
    # as models hand them over: heads cut out of (B, T, H * D)
    q, k, v = (
        torch.randn(2, tokens, n * width, generator=generator).bfloat16().view(2, tokens, n, width).transpose(1, 2)
        for n in (heads, key_heads, key_heads)
    )
    q = q * 3  # some softmaxes are nearly one-hot, some flat
    ours = causal_attention(q, k, v, 0.2)
    how = {"is_causal": True, "scale": 0.2, "enable_gqa": heads != key_heads}
    exact = scaled_dot_product_attention(q.double(), k.double(), v.double(), **how)
    sizes = scaled_dot_product_attention(q.double(), k.double(), v.double().abs(), **how)
    assert ours is not None and ours.shape == q.shape and ours.dtype == torch.bfloat16
    # each weight, and the result, is rounded to bfloat16: half a unit in the eighth bit
    assert ((ours.double() - exact).abs() <= 1.5 * 2**-9 * (exact.abs() + sizes) + 1e-6).all()


def test_large_scores_neither_overflow_nor_leak_to_later_keys() -> None:
    needs_kernel()
    q = torch.full((1, 1, 70, 64), 30.0).bfloat16()
    v = torch.arange(70.0).view(1, 1, 70, 1).expand(1, 1, 70, 64).contiguous().bfloat16()
    ours = causal_attention(q, q, v, 1.0)
    wanted = torch.cumsum(torch.arange(70.0), 0) / torch.arange(1, 71)
    torch.testing.assert_close(ours[0, 0, :, 0].float(), wanted, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("dtype", "width", "key_tokens"), [(torch.float32, 64, 5), (torch.bfloat16, 48, 5), (torch.bfloat16, 64, 6)]
)
def test_what_does_not_fit_is_left_to_others(dtype: torch.dtype, width: int, key_tokens: int) -> None:
    q, k = torch.zeros(1, 2, 5, width, dtype=dtype), torch.zeros(1, 2, key_tokens, width, dtype=dtype)
    assert causal_attention(q, k, k, 1.0) is None
