"""The compiled attention against PyTorch's in float64."""

import pytest
import torch
from ctp_kernels import attention
from ctp_kernels.attention import causal_attention
from torch.nn.functional import scaled_dot_product_attention


@pytest.fixture(params=[torch.bfloat16, torch.float32], ids=["bf16", "f32"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    if attention._kernel(request.param) is None:
        pytest.skip(f"this processor has no instructions for {request.param}, or there is no C++ compiler")
    return request.param


def operands(
    tokens: int, prefix: int, heads: int, key_heads: int, width: int, dtype: torch.dtype
) -> tuple[torch.Tensor, ...]:
    """As models hand them over: heads cut out of (B, T, H * D). Some softmaxes are nearly one-hot, some flat."""
    generator = torch.Generator().manual_seed(tokens)
    q, k, v = (
        torch.randn(2, count, n * width, generator=generator).to(dtype).view(2, count, n, width).transpose(1, 2)
        for count, n in ((tokens, heads), (prefix + tokens, key_heads), (prefix + tokens, key_heads))
    )
    return q * 3, k, v


def mask(tokens: int, prefix: int) -> torch.Tensor:
    return torch.ones(tokens, prefix + tokens, dtype=torch.bool).tril(prefix)


@pytest.mark.parametrize(
    ("tokens", "prefix"),
    [(1, 0), (3, 0), (64, 0), (65, 0), (130, 0), (1, 7), (1, 130), (2, 63), (5, 64), (60, 9), (33, 100)],
)
@pytest.mark.parametrize(("heads", "key_heads"), [(3, 3), (6, 2)])
@pytest.mark.parametrize("width", [64, 128])
def test_every_query_attends_to_the_keys_up_to_it(
    tokens: int, prefix: int, heads: int, key_heads: int, width: int, dtype: torch.dtype
) -> None:
    q, k, v = operands(tokens, prefix, heads, key_heads, width, dtype)
    ours = causal_attention(q, k, v, 0.2)
    how = {"attn_mask": mask(tokens, prefix), "scale": 0.2, "enable_gqa": heads != key_heads}
    exact = scaled_dot_product_attention(q.double(), k.double(), v.double(), **how)
    sizes = scaled_dot_product_attention(q.double(), k.double(), v.double().abs(), **how)
    assert ours is not None and ours.shape == q.shape and ours.dtype == dtype
    # each weight, and the result, is rounded to bfloat16: half a unit in the eighth bit; else sums of float32 are
    rounding = 1.5 * 2**-9 if dtype == torch.bfloat16 else 1.2e-5
    assert ((ours.double() - exact).abs() <= rounding * (exact.abs() + sizes) + 1e-6).all()


@pytest.mark.parametrize(("tokens", "prefix"), [(1, 0), (3, 0), (64, 0), (130, 0), (1, 7), (60, 9), (33, 100)])
@pytest.mark.parametrize(("heads", "key_heads", "width"), [(3, 3, 64), (6, 2, 64), (2, 1, 128)])
def test_gradients_are_those_of_plain_attention(
    tokens: int, prefix: int, heads: int, key_heads: int, width: int, dtype: torch.dtype
) -> None:
    given = [x.detach().requires_grad_() for x in operands(tokens, prefix, heads, key_heads, width, dtype)]
    outer = torch.randn(2, heads, tokens, width, generator=torch.Generator().manual_seed(9)).to(dtype)
    ours = causal_attention(*given, 0.2)
    assert ours is not None
    ours.backward(outer)
    exact = [x.detach().double().requires_grad_() for x in given]
    how = {"attn_mask": mask(tokens, prefix), "scale": 0.2, "enable_gqa": heads != key_heads}
    scaled_dot_product_attention(*exact, **how).backward(outer.double())
    for made, wanted in zip(given, exact, strict=True):
        assert made.grad is not None and wanted.grad is not None and made.grad.shape == made.shape
        # of bfloat16 weights, the gradients of scores, and the result are rounded
        rounding = 0.005 if dtype == torch.bfloat16 else 1e-5
        assert (made.grad.double() - wanted.grad).norm() <= rounding * wanted.grad.norm() + 1e-6


def test_gradients_of_gradients_are_refused(dtype: torch.dtype) -> None:
    """The kernel's are numbers without a history, which would count as constants."""
    given = [x.detach().requires_grad_() for x in operands(33, 0, 3, 3, 64, dtype)]
    ours = causal_attention(*given, 0.2)
    assert ours is not None
    (gradient,) = torch.autograd.grad(ours.float().square().sum(), given[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.float().square().sum().backward()


def test_large_scores_neither_overflow_nor_leak_to_later_keys(dtype: torch.dtype) -> None:
    q = torch.full((1, 1, 70, 64), 30.0).to(dtype)
    v = torch.arange(70.0).view(1, 1, 70, 1).expand(1, 1, 70, 64).contiguous().to(dtype)
    ours = causal_attention(q, q, v, 1.0)
    wanted = torch.cumsum(torch.arange(70.0), 0) / torch.arange(1, 71)
    assert ours is not None
    torch.testing.assert_close(ours[0, 0, :, 0].float(), wanted, rtol=2e-2, atol=2e-2)


def test_weights_far_below_the_largest_vanish_and_nan_stays_nan(dtype: torch.dtype) -> None:
    k = torch.zeros(1, 1, 3, 64, dtype=dtype)
    k[0, 0, :, 0] = torch.tensor([-1e4, 10.0, float("nan")])
    ours = causal_attention(torch.ones_like(k), k, torch.eye(64, dtype=dtype)[:3].view(1, 1, 3, 64), 1.0)
    assert ours is not None
    torch.testing.assert_close(ours[0, 0, 1, :2].float(), torch.tensor([0.0, 1.0]), rtol=0, atol=1e-37)
    assert ours[0, 0, 2, :3].isnan().all() and not ours[0, 0, :2].isnan().any()


@pytest.mark.parametrize("queries", [1, 2, 47, 48, 97])
def test_nothing_is_read_or_written_beyond_the_tensors(queries: int, dtype: torch.dtype) -> None:
    """Rows between those of a head belong to others; what lies there changes no result, and stays as it is."""

    def within(count: int, heads: int, other: float) -> tuple[torch.Tensor, torch.Tensor]:
        whole = torch.full((1, count + 2, heads + 2, 64), other, dtype=dtype)
        generator = torch.Generator().manual_seed(count)
        whole[:, 1:-1, 1:-1] = torch.randn(1, count, heads, 64, generator=generator).to(dtype)
        return whole, whole[:, 1:-1, 1:-1].transpose(1, 2)

    results = []
    for other in (float("nan"), 1e30):
        made = [within(count, heads, other) for count, heads in ((queries, 4), (queries + 5, 2), (queries + 5, 2))]
        before = [whole.clone() for whole, _ in made]
        given = [inner.detach().requires_grad_() for _, inner in made]
        without_gradients = causal_attention(*(inner for _, inner in made), 0.2)
        ours = causal_attention(*given, 0.2)
        assert ours is not None and without_gradients is not None
        ours.float().square().sum().backward()
        assert all(
            torch.equal(whole.nan_to_num(), was.nan_to_num()) for (whole, _), was in zip(made, before, strict=True)
        )
        results.append([without_gradients, ours, *(x.grad for x in given)])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@pytest.mark.parametrize(
    ("dtype", "width", "key_tokens"),
    [(torch.float64, 64, 5), (torch.float32, 24, 5), (torch.bfloat16, 48, 5), (torch.bfloat16, 64, 4)],
)
def test_what_does_not_fit_is_left_to_others(dtype: torch.dtype, width: int, key_tokens: int) -> None:
    q, k = torch.zeros(1, 2, 5, width, dtype=dtype), torch.zeros(1, 2, key_tokens, width, dtype=dtype)
    assert causal_attention(q, k, k, 1.0) is None


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_a_masks_answer_is_remembered_for_this_mask_alone(dtype: torch.dtype) -> None:
    q, k, is_causal = torch.zeros(1, 1, 4, 8), torch.zeros(1, 1, 6, 8), attention.CausalMasks()

    def given(seen: torch.Tensor) -> torch.Tensor:
        return seen if dtype == torch.bool else torch.zeros(4, 6).masked_fill(~seen, -torch.inf)

    causal, windowed = given(mask(4, 2)), given(mask(4, 2).triu(1))
    for _ in range(2):
        assert is_causal(q, k, {"attn_mask": causal}) and not is_causal(q, k, {"attn_mask": windowed})
        assert is_causal(q, k, {"attn_mask": causal}) and is_causal(q, k, {"attn_mask": causal})
    assert not is_causal(q, k, {"is_causal": True}) and is_causal(k, k, {"is_causal": True})
    assert not is_causal(k, k, {}) and not is_causal(k, q, {"attn_mask": causal.T})
    assert is_causal(q[:, :, :1], k, {}), "one query sees all keys"
    assert not is_causal(q[:, :, :1], k, {"is_causal": True}), "PyTorch's one query sees the first key"


def test_a_mask_that_was_written_into_is_asked_again() -> None:
    q, k, is_causal = torch.zeros(1, 1, 4, 8), torch.zeros(1, 1, 6, 8), attention.CausalMasks()
    for made in (mask(4, 2), torch.inference_mode()(mask)(4, 2)):
        with torch.inference_mode():
            assert is_causal(q, k, {"attn_mask": made})
            made[:, 0] = False
            assert not is_causal(q, k, {"attn_mask": made})
