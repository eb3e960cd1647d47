"""Sums of outer products against float64, through the compiled kernel and without it."""

import logging
import shutil

import pytest
import torch
from ctp_kernels import gram
from ctp_kernels.cpu import build
from ctp_kernels.gram import add_gram

SHAPES = [(1, 1), (7, 65), (255, 6), (257, 64), (300, 100), (513, 200), (1025, 192)]


def needs_kernel() -> None:
    if gram._kernel() is None:
        pytest.skip("this processor has no AVX-512 BF16, or there is no C++ compiler")


def sums(tokens: int, width: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, H before, and the upper triangle of H after, in float64. One column is far larger than the others."""
    generator = torch.Generator().manual_seed(tokens + width)
    x = torch.randn(tokens, width, generator=generator).to(dtype)
    x[:, width // 2] *= 64
    before = torch.randn(width, width, generator=generator)
    return x, before, torch.triu(before.double() + x.double().T @ x.double())


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("tokens", "width"), SHAPES)
def test_upper_triangle_is_the_sum_in_float32(
    tokens: int, width: int, dtype: torch.dtype, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if compiled:
        needs_kernel()
    else:
        monkeypatch.setattr(gram, "_kernel", lambda: None)
    x, H, wanted = sums(tokens, width, dtype)
    magnitude = torch.triu(H.abs().double() + x.abs().double().T @ x.abs().double())
    add_gram(H, x)
    # float32 sums of `tokens` terms: each entry is as good as the terms it is made of
    assert ((torch.triu(H).double() - wanted).abs() <= 3e-6 * magnitude).all()


def test_compiled_kernel_takes_strided_rows_and_gives_the_same_bits_on_any_number_of_threads() -> None:
    needs_kernel()
    wide, H, _ = sums(300, 130, torch.bfloat16)
    x = wide[:, :65]
    results = []
    for threads in (1, 2, 3):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        results.append(H[:65, :65].clone())
        add_gram(results[-1], x)
        torch.set_num_threads(before)
    wanted = torch.triu(H[:65, :65].double() + x.double().T @ x.double())
    torch.testing.assert_close(torch.triu(results[0]).double(), wanted, rtol=1e-5, atol=1e-3)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="does not fit"):
        add_gram(torch.zeros(4, 4), torch.zeros(3, 5))


def test_without_a_compiler_or_a_feature_the_kernel_is_left_out_and_the_log_says_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger=build.log.name)
    assert build.load.__wrapped__("gram_bf16", build.Level(("no_such_feature",), ())) is None
    assert "no_such_feature" in caplog.text
    monkeypatch.setattr(shutil, "which", lambda _name: None)
    assert build.load.__wrapped__("gram_bf16", build.Level((), ())) is None
    assert "no C++ compiler" in caplog.text
