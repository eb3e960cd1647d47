"""The layer Hessian and its factor against float64 numpy."""

import logging

import numpy as np
import pytest
import torch

from ctp_cli.compression.hessian import Hessian, inverse_factor
from ctp_cli.errors import ShapeError, SolverError


def random_inputs(tokens: int, width: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(tokens, width, generator=generator) + 0.3).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [48, 700])  # 700: one strip of 512 inputs and a shorter one
def test_batches_add_up_to_the_mean_outer_product(width: int, dtype: torch.dtype) -> None:
    batches = [random_inputs(tokens, width, dtype, seed) for seed, tokens in enumerate((7, 1, 64))]
    hessian = Hessian.zeros(width, torch.device("cpu"))
    for batch in batches:
        hessian.add(batch)
    x = torch.cat(batches).double().numpy()
    expected = x.T @ x / 72
    assert hessian.tokens == 72
    # products of bfloat16 or float16 operands are exact in float32; 72 of them are summed in float32
    np.testing.assert_allclose(hessian.mean().numpy(), expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
    assert torch.equal(hessian.mean(), hessian.mean().T)


def test_adding_inputs_leaves_torchs_matmul_precision_alone() -> None:
    before = torch.get_float32_matmul_precision()
    Hessian.zeros(8, torch.device("cpu")).add(random_inputs(4, 8, torch.bfloat16))
    assert torch.get_float32_matmul_precision() == before


def test_inputs_of_another_width_are_refused() -> None:
    hessian = Hessian.zeros(8, torch.device("cpu"))
    with pytest.raises(ShapeError, match=r"\(4, 9\).*width 8"):
        hessian.add(torch.zeros(4, 9))
    with pytest.raises(ShapeError):
        hessian.add(torch.zeros(2, 4, 8))


@pytest.mark.parametrize("tokens", [0, 16])
def test_a_layer_that_never_fires_has_the_identity(tokens: int) -> None:
    hessian = Hessian.zeros(8, torch.device("cpu"))
    hessian.add(torch.zeros(tokens, 8))
    assert torch.equal(hessian.mean(), torch.eye(8))


def test_an_input_that_never_fires_keeps_its_zero_row_and_still_factorizes() -> None:
    hessian = Hessian.zeros(16, torch.device("cpu"))
    x = random_inputs(64, 16, torch.float32)
    x[:, 5] = 0.0
    hessian.add(x)
    H = hessian.mean()
    assert torch.equal(H[5], torch.zeros(16))
    U, dampening = inverse_factor(H, dampening=0.01, layer="layer")
    assert dampening == 0.01
    assert torch.isfinite(U).all()


@pytest.mark.parametrize("dampening", [0.01, 0.1])
def test_the_factor_squares_to_the_inverse_of_the_dampened_hessian(dampening: float) -> None:
    x = random_inputs(200, 64, torch.float32).double()
    H = (x.T @ x / 200).float()
    U, used = inverse_factor(H, dampening=dampening, layer="layer")
    assert used == dampening
    assert torch.equal(U, torch.triu(U))
    dense = H.double().numpy()
    inverse = np.linalg.inv(dense + dampening * np.mean(np.diag(dense)) * np.eye(64))
    ours = (U.double().T @ U.double()).numpy()
    # condition number below 1e4 (the dampening is 1% of the mean eigenvalue), so float32 keeps three digits and more
    np.testing.assert_allclose(ours, inverse, rtol=0, atol=1e-3 * np.abs(inverse).max())


def test_dampening_rises_until_an_indefinite_hessian_can_be_factorized(caplog: pytest.LogCaptureFixture) -> None:
    H = torch.eye(8)
    H[0, 1] = H[1, 0] = 1.5  # an eigenvalue of -0.5: 0.01 and 0.1 of the mean diagonal do not lift it, 1 does
    with caplog.at_level(logging.WARNING):
        U, used = inverse_factor(H, dampening=0.01, layer="model.layers.3.mlp.up_proj")
    assert used == pytest.approx(1.0)
    assert "model.layers.3.mlp.up_proj" in caplog.text
    inverse = torch.linalg.inv(H.double() + torch.eye(8).double())
    torch.testing.assert_close((U.T @ U).double(), inverse, rtol=1e-4, atol=1e-5)


def test_a_hopeless_hessian_names_the_layer_and_what_to_do() -> None:
    H = torch.eye(8)
    H[0, 1] = H[1, 0] = 1e6
    with pytest.raises(SolverError, match=r"model\.layers\.3\.mlp\.up_proj.*not positive definite") as caught:
        inverse_factor(H, dampening=0.01, layer="model.layers.3.mlp.up_proj")
    assert "calibration" in caught.value.hint
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_inputs_that_are_not_finite_are_named(value: float) -> None:
    hessian = Hessian.zeros(8, torch.device("cpu"))
    x = random_inputs(4, 8, torch.float32)
    x[2, 3] = value
    hessian.add(x)
    with pytest.raises(SolverError, match=r"model\.layers\.0\.fc1: .*NaN"):
        inverse_factor(hessian.mean(), dampening=0.01, layer="model.layers.0.fc1")
