"""Products and attention that take another way on this processor are the same products and attention."""

import os
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from ctp_kernels import arithmetic
from ctp_kernels.attention import prefix_attention
from ctp_kernels.prefix import cache_keyword
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

CPU = torch.device("cpu")


def test_elsewhere_pytorch_is_left_alone_but_for_attention_behind_a_prefix() -> None:
    gpu = torch.device("cuda")
    assert isinstance(arithmetic.fast_arithmetic(gpu), nullcontext)
    assert isinstance(arithmetic.fast_arithmetic(gpu, behind_prefix=True), prefix_attention)


@pytest.fixture
def without_amx(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arithmetic, "cpu_features", lambda: frozenset({"avx2"}))


@pytest.mark.usefixtures("without_amx")
@pytest.mark.parametrize("masked", [False, True])
def test_where_no_kernel_fits_attention_in_float32_is_nearer_to_float64_and_keeps_the_dtype(
    masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arithmetic, "_has_products", lambda dtype: False)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 65, 16, generator=generator).bfloat16() for _ in range(3))
    mask = torch.zeros(65, 65, dtype=torch.bfloat16).masked_fill(torch.ones(65, 65).triu(1) > 0, -torch.inf)
    exact = functional.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=True)
    how = {"attn_mask": mask} if masked else {"is_causal": True}
    plain = functional.scaled_dot_product_attention(q, k, v, **how)
    with arithmetic.fast_arithmetic(CPU):
        ours = functional.scaled_dot_product_attention(q, key=k, value=v, **how)
    assert ours.dtype == torch.bfloat16
    # only the last rounding to bfloat16 is left
    assert ((ours.double() - exact).abs() <= exact.abs() * 2**-8 + 1e-6).all()
    assert (ours.double() - exact).abs().mean() < (plain.double() - exact).abs().mean()


@pytest.mark.parametrize(
    ("dtype", "features", "products", "replaced"),
    [
        (torch.bfloat16, {"amx_bf16"}, True, False),
        (torch.bfloat16, {"avx2"}, True, True),
        (torch.bfloat16, {"avx2"}, False, True),
        (torch.float32, {"amx_bf16"}, True, True),
        (torch.float64, {"avx2"}, True, False),
    ],
)
def test_attention_is_left_alone_where_pytorchs_is_the_fastest(
    dtype: torch.dtype, features: set[str], products: bool, replaced: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    marked = torch.full((1, 2, 9, 64), 7.0).to(dtype)
    monkeypatch.setattr(arithmetic, "causal_attention", lambda *_: marked)
    monkeypatch.setattr(arithmetic, "cpu_features", lambda: frozenset(features))
    monkeypatch.setattr(arithmetic, "_has_products", lambda dtype: products)
    q = torch.randn(1, 2, 9, 64).to(dtype)
    with arithmetic.fast_arithmetic(CPU):
        made = functional.scaled_dot_product_attention(q, q, q, is_causal=True)
    assert (made is marked) == replaced


@pytest.fixture(params=[False, True], ids=["without bf16 products", "with"])
def has_products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(arithmetic, "_has_products", lambda dtype: request.param)
    return request.param


@pytest.mark.parametrize("rows", [1, 7, 8, 33])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_layers_output_and_gradients_are_those_of_float64(
    rows: int, bias: bool, dtype: torch.dtype, has_products: bool
) -> None:
    generator = torch.Generator().manual_seed(rows)
    x, W, b = (torch.randn(shape, generator=generator).to(dtype) for shape in ((1, rows, 48), (24, 48), (24,)))
    given = [t.requires_grad_() for t in ((x, W, b) if bias else (x, W))]
    exact = [t.detach().double().requires_grad_() for t in given]
    outer = torch.randn(1, rows, 24, generator=generator).to(dtype)
    with arithmetic.fast_arithmetic(CPU):
        made = functional.linear(*given)
        made.backward(outer)
    wanted = functional.linear(*exact)
    wanted.backward(outer.double())
    epsilon = torch.finfo(dtype).eps
    sizes = x.detach().double().abs() @ W.detach().double().abs().T
    assert made.dtype == dtype
    assert ((made.double() - wanted).abs() <= epsilon / 2 * wanted.abs() + 1e-5 * sizes).all()
    for ours, theirs in zip(given, exact, strict=True):
        assert ours.grad.dtype == dtype and ours.grad.shape == ours.shape
        assert (ours.grad.double() - theirs.grad).norm() <= epsilon * theirs.grad.norm()


def test_products_are_made_in_float32_where_16_bits_are_slow_and_nowhere_else(has_products: bool) -> None:
    x = torch.full((16, 64), 3.0).bfloat16()
    seen: list[torch.dtype] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm):
                seen.append(args[-1].dtype)
            return func(*args, **(kwargs or {}))

    W = torch.ones(64, 64).bfloat16()
    with torch.no_grad(), arithmetic.fast_arithmetic(CPU), Watch():
        results = [functional.linear(x, W), torch.addmm(W[0], x, W), x @ W, torch.bmm(x[None], W[None])[0]]
        results.append(W[None, :16].baddbmm(x[None], W[None])[0])
        wide_already = x.float() @ W.float()
    assert seen[:4] == [torch.bfloat16 if has_products else torch.float32] * 4 and seen[-1] == torch.float32
    assert all(result.dtype == torch.bfloat16 for result in results) and wide_already.dtype == torch.float32
    assert [result[0, 0].item() for result in results] == [192, 193, 192, 192, 193]


def test_the_backward_pass_keeps_operands_as_they_came(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arithmetic, "_has_products", lambda dtype: False)
    layer, kept = nn.Linear(64, 64).bfloat16().requires_grad_(False), []
    x = torch.randn(16, 64).bfloat16().requires_grad_()
    watch = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t)
    with watch, arithmetic.fast_arithmetic(CPU):
        layer(x).sum().backward()
    assert kept and all(t.dtype == torch.bfloat16 for t in kept)


@pytest.mark.usefixtures("without_amx")
@pytest.mark.parametrize("scale", [None, 0.3])
def test_the_kernel_is_given_plain_causal_attention_only(scale: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[float] = []
    marked = torch.full((1, 2, 9, 64), 7.0).bfloat16()
    monkeypatch.setattr(arithmetic, "causal_attention", lambda *given: (calls.append(given[3]), marked)[1])
    q = torch.randn(1, 2, 9, 64).bfloat16()
    with arithmetic.fast_arithmetic(CPU):
        assert functional.scaled_dot_product_attention(q, q, q, is_causal=True, scale=scale) is marked
        functional.scaled_dot_product_attention(q, q, q, scale=scale)
        functional.scaled_dot_product_attention(q, q, q, attn_mask=torch.ones(9, 9, dtype=torch.bool), scale=scale)
        functional.scaled_dot_product_attention(q.double(), q.double(), q.double(), is_causal=True, scale=scale)
        functional.scaled_dot_product_attention(q, q, q, is_causal=True, dropout_p=0.5, scale=scale)
    assert calls == [scale or 0.125]


@pytest.mark.usefixtures("without_amx")
@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("kind", ["bool", "minimum", "infinite"])
def test_a_mask_that_says_causal_behind_a_prefix_is_known(
    prefix: int, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    marked = torch.full((2, 2, 9, 64), 7.0).bfloat16()
    monkeypatch.setattr(arithmetic, "causal_attention", lambda *given: (calls.append(given[1].shape[2]), marked)[1])
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
    with arithmetic.fast_arithmetic(CPU):
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
        with arithmetic.fast_arithmetic(CPU):
            functional.scaled_dot_product_attention(q, k, v, is_causal=True).float().square().sum().backward()
        for made, wanted in zip((q, k, v), exact, strict=True):
            assert (made.grad.double() - wanted.grad).norm() <= 0.02 * wanted.grad.norm()


def test_shared_keys_and_values_are_handed_over_once_and_the_setting_is_put_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=256,  # heads of 64 fit every kernel of ours
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model, heads = LlamaForCausalLM(config).eval(), []
    attend = arithmetic.causal_attention
    monkeypatch.setattr(
        arithmetic,
        "causal_attention",
        lambda q, k, v, scale: (heads.append((q.shape[1], k.shape[1])), attend(q, k, v, scale))[1],
    )
    ids, prefix = torch.arange(20).view(2, 10), DynamicCache()
    monkeypatch.setenv(arithmetic._UNREPEATED, "0")
    keyword = cache_keyword(model)
    with torch.no_grad():
        wanted = model(ids).logits
        with arithmetic.fast_arithmetic(CPU):
            with arithmetic.fast_arithmetic(CPU):
                model(ids[:, :3], **{keyword: prefix, "use_cache": True})
            made = model(ids[:, 3:], **{keyword: prefix}).logits
    assert heads == [(4, 2)] * 2
    assert os.environ[arithmetic._UNREPEATED] == "0"
    torch.testing.assert_close(made, wanted[:, 3:], rtol=1e-4, atol=1e-5)


def test_keys_shared_under_another_mask_are_repeated_for_pytorch() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 9, 16, generator=generator) for heads in (6, 2, 2))
    mask = torch.rand(9, 9, generator=generator) < 0.7
    mask.fill_diagonal_(True)
    wanted = functional.scaled_dot_product_attention(
        q.double(), k.double(), v.double(), attn_mask=mask, enable_gqa=True
    )
    with arithmetic.fast_arithmetic(CPU):
        made = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    torch.testing.assert_close(made, wanted.float(), rtol=1e-5, atol=1e-6)


def test_behind_a_prefix_pytorchs_attention_needs_no_mask_either(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ...]] = []

    class Seen(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is functional.scaled_dot_product_attention:
                assert (kwargs["attn_mask"] is None) == kwargs["is_causal"]
                seen.append(tuple(args[0].shape))
            return func(*args, **kwargs or {})

    monkeypatch.setattr(arithmetic, "causal_attention", lambda *_: None)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, t, 16, generator=generator) for heads, t in ((4, 9), (2, 14), (2, 14)))
    mask = torch.ones(9, 14, dtype=torch.bool).tril(5)
    wanted = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    with Seen(), arithmetic.fast_arithmetic(CPU):
        made = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=False, enable_gqa=True)
    assert seen == [(2, 4, 14, 16)]
    torch.testing.assert_close(made, wanted)
