"""A linear layer's product of one row, against float64, and what is left to PyTorch."""

import pytest
import torch
from ctp_kernels import arithmetic, one_row
from torch import nn
from torch.nn import functional


@pytest.fixture(autouse=True)
def _there() -> None:
    if one_row._kernel() is None:
        pytest.skip("this processor has no AVX2, or there is no C++ compiler")


class _Elsewhere(torch.Tensor):
    """One of the kinds whose memory is not where `data_ptr` says."""


def operands(outputs: int, inputs: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(outputs)
    x, weight, bias = (
        torch.randn(*shape, generator=generator) for shape in ((1, inputs), (outputs, inputs), (outputs,))
    )
    return x.bfloat16(), weight.bfloat16(), (9 * bias).bfloat16()


@pytest.mark.parametrize(("outputs", "inputs"), [(1, 32), (3, 64), (50, 96), (333, 160), (64, 2048)])
@pytest.mark.parametrize("biased", [True, False])
def test_sums_are_float32_and_rounded_once(outputs: int, inputs: int, biased: bool) -> None:
    x, weight, bias = operands(outputs, inputs)
    bias_or_none = bias if biased else None
    made = one_row.linear(x, weight, bias_or_none)
    exact = functional.linear(x.double(), weight.double(), bias.double() if biased else None)
    assert made is not None and made.shape == (1, outputs) and made.dtype == torch.bfloat16
    in_sum = 1e-6 * functional.linear(x.double().abs(), weight.double().abs())
    assert ((made.double() - exact).abs() <= exact.abs() * 2**-8 + in_sum).all()


def test_rows_of_a_larger_matrix_and_other_shapes_of_x() -> None:
    x, weight, _ = operands(40, 256)
    made = one_row.linear(x[:, ::2].view(1, 1, 128), weight[:, 128:])
    assert made is not None and made.shape == (1, 1, 40)
    wanted = functional.linear(x[:, ::2].float(), weight[:, 128:].float())
    torch.testing.assert_close(made.float()[0], wanted, rtol=2**-8, atol=1e-4)


def test_infinite_and_nan_stay_what_they_are() -> None:
    x, weight, _ = operands(3, 32)
    weight[0, 5], weight[1, 7] = torch.inf, torch.nan
    x[0, 5] = 2.0
    made = one_row.linear(x, weight)
    assert made is not None and made[0, 0] == torch.inf and made[0, 1].isnan() and made[0, 2].isfinite()


def test_what_does_not_fit_is_left_to_pytorch() -> None:
    x, weight, bias = operands(8, 64)
    assert one_row.linear(x.expand(2, -1), weight) is None
    assert one_row.linear(x.float(), weight.float()) is None
    assert one_row.linear(x, weight, bias.float()) is None
    assert one_row.linear(x[:, :40], weight[:, :40]) is None
    assert one_row.linear(x, operands(64, 8)[1].T) is None
    assert one_row.linear(x, nn.Parameter(weight)) is None
    assert one_row.linear(x[:0], weight) is None
    assert one_row.linear(x, weight[0]) is None
    assert one_row.linear(x, weight, bias[:1]) is None
    assert one_row.linear(x, torch.Tensor._make_subclass(_Elsewhere, weight)) is None
    with torch.no_grad():
        assert one_row.linear(x, nn.Parameter(weight)) is not None


def test_models_in_fast_arithmetic_take_it(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias = operands(8, 64)
    marked = torch.zeros(1, 8)
    monkeypatch.setattr(one_row, "linear", lambda *given: marked if len(given[0]) == 1 else None)
    with arithmetic.fast_arithmetic(torch.device("cpu")):
        assert functional.linear(x, weight, bias) is marked
        assert functional.linear(x.expand(2, -1), weight, bias) is not marked
