"""The inner loop against the update written out in float64: compiled, as Triton's kernels, and by PyTorch alone.

Kernels run on a GPU, or interpreted where TRITON_INTERPRET is 1 (test_triton_interpreted.py runs these tests so).
"""

import numpy as np
import pytest
import torch
from ctp_kernels import sweep
from ctp_kernels.sweep import Grids, improve_codes, rounding_errors, sweep_columns
from ctp_kernels.triton import ops

WAYS = ("compiled", "as_triton", "plain")


@pytest.fixture(params=WAYS)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """On which a test's operations go this way."""
    if request.param == "compiled":
        if sweep._library() is None:
            pytest.skip("this processor has no AVX2, or there is no C++ compiler")
        return "cpu"
    monkeypatch.setattr(sweep, "_library", lambda: None)
    if request.param == "plain":
        monkeypatch.setattr(sweep, "_kernels", lambda _: None)
        return "cpu"
    if not ops.available() or not (torch.cuda.is_available() or ops.interpreted()):
        pytest.skip("needs triton, and a GPU or TRITON_INTERPRET=1")
    return "cuda" if torch.cuda.is_available() else "cpu"


def problem(inputs: int, outputs: int, grids: int | None, pruned: bool) -> dict[str, torch.Tensor | None]:
    generator = torch.Generator().manual_seed(inputs * outputs)
    U = torch.triu(torch.randn(inputs, inputs, generator=generator) * 4.8 / inputs)
    U.diagonal().copy_(0.5 + torch.rand(inputs, generator=generator))
    return {
        "W": torch.randn(inputs, outputs, generator=generator),
        "U": U,
        "keep": torch.rand(inputs, outputs, generator=generator) < 0.5 if pruned else None,
        "scales": None if grids is None else 0.1 + 0.1 * torch.rand(grids, outputs, generator=generator),
        "zeros": None if grids is None else torch.randint(1, 15, (grids, outputs), generator=generator).float(),
    }


def written_out(given: dict[str, torch.Tensor | None], columns: range, group_of: list[int], top: int):
    W, U = given["W"].double().numpy().copy(), given["U"].double().numpy()
    errors, codes = np.full(W.shape, np.nan), np.zeros(W.shape)
    for c in columns:
        value = W[c].copy()
        if given["scales"] is not None:
            scale, zero = (given[name][group_of[c]].double().numpy() for name in ("scales", "zeros"))
            codes[c] = np.clip(np.rint(value / scale) + zero, 0, top)
            if given["keep"] is not None:
                codes[c] = np.where(given["keep"][c].numpy(), codes[c], zero)
            value = (codes[c] - zero) * scale
        if given["keep"] is not None:
            value = value * given["keep"][c].numpy()
        errors[c] = (W[c] - value) / U[c, c]
        W[c + 1 :] -= np.outer(U[c, c + 1 :], errors[c])
        W[c] = value
    return W, errors, codes


@pytest.mark.parametrize(("inputs", "columns"), [(24, range(24)), (24, range(8, 16)), (150, range(10, 145))])
@pytest.mark.parametrize(("grids", "pruned"), [(None, True), (1, False), (1, True), (3, False), (3, True)])
@pytest.mark.parametrize("outputs", [1, 63, 64, 130])
def test_columns_are_taken_as_the_papers_say(
    outputs: int, grids: int | None, pruned: bool, inputs: int, columns: range, device: str
) -> None:
    given = problem(inputs, outputs, grids, pruned)
    group_of = [0] * inputs if grids is None else [c % grids for c in range(inputs)]
    # a block of a wider factor, as the solver hands it over
    wide = torch.zeros(inputs, inputs + 6, device=device)
    wide[:, 3:-3] = given["U"]
    there = {name: None if x is None else x.to(device, copy=True) for name, x in given.items()}
    W, errors = there["W"], torch.full((inputs, outputs), torch.nan, device=device)
    codes = torch.zeros(inputs, outputs, dtype=torch.uint8, device=device)
    rule = grids and Grids(there["scales"], there["zeros"], torch.tensor(group_of, dtype=torch.int32), 15)
    sweep_columns(W, wide[:, 3:-3], errors, columns, grids=rule, keep_CO=there["keep"], codes_CO=codes)
    wanted_W, wanted_errors, wanted_codes = written_out(given, columns, group_of, 15)
    if grids is not None:
        # a weight in the middle between two codes may go either way in float32; here none does
        np.testing.assert_array_equal(codes.cpu().numpy(), wanted_codes)
    np.testing.assert_allclose(W.cpu().numpy(), wanted_W, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(errors.cpu().numpy(), wanted_errors, rtol=1e-4, atol=1e-4)
    if pruned:
        assert (W[columns.start : columns.stop][~there["keep"][columns.start : columns.stop]] == 0).all()


def test_any_number_of_threads_gives_the_same_bits() -> None:
    if sweep._library() is None:
        pytest.skip("this processor has no AVX2, or there is no C++ compiler")
    given = problem(64, 200, 1, True)
    grids = Grids(given["scales"], given["zeros"], torch.zeros(64, dtype=torch.int32), 15)
    results, before = [], torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        W, errors = given["W"].clone(), torch.empty(64, 200)
        sweep_columns(W, given["U"], errors, range(64), grids=grids, keep_CO=given["keep"], codes_CO=None)
        results.append(W)
    torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("outputs", [1, 63, 130])
def test_rounding_errors_are_those_of_each_grid(outputs: int, device: str) -> None:
    given = problem(24, outputs, 5, pruned=False)
    errors = rounding_errors(*(given[name].to(device) for name in ("W", "scales", "zeros")), 15).cpu()
    for scale, zero, error in zip(given["scales"].double(), given["zeros"].double(), errors, strict=True):
        W = given["W"].double()
        rounded = (((W / scale).round() + zero).clamp(0, 15) - zero) * scale
        torch.testing.assert_close(error.double(), (rounded - W).square().sum(0), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("pruned", [True, False])
@pytest.mark.parametrize(("inputs", "sweeps"), [(24, 1), (24, 50), (150, 1), (150, 50)])
def test_each_code_becomes_the_best_while_others_stay(inputs: int, sweeps: int, pruned: bool, device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x_TI = torch.randn(300, inputs, generator=generator) @ torch.randn(inputs, inputs, generator=generator)
    H, W = x_TI.T @ x_TI / 300, torch.randn(7, inputs, generator=generator)
    scales, zeros = 0.2 + 0.2 * torch.rand(7, 3, generator=generator), torch.randint(4, 12, (7, 3)).float()
    group_of = torch.arange(inputs, dtype=torch.int32) // (inputs // 3)
    scale, zero = scales[:, group_of.long()], zeros[:, group_of.long()]
    codes = ((W / scale).round() + zero).clamp(0, 15).to(torch.uint8)
    keep = torch.rand(7, inputs, generator=generator) < 0.6 if pruned else None
    if keep is not None:
        codes = torch.where(keep, codes, zero.to(torch.uint8))

    def loss(codes: torch.Tensor) -> torch.Tensor:
        D = (W - (codes.float() - zero) * scale).double()
        return ((D @ H.double()) * D).sum(1)

    before, given = codes.clone(), (H, scales, zeros)
    residual = ((W - (codes.float() - zero) * scale) @ H).to(device)
    codes, kept = codes.to(device), None if keep is None else keep.to(device)
    improve_codes(codes, residual, *(x.to(device) for x in given), group_of, keep_OI=kept, max_code=15, sweeps=sweeps)
    codes = codes.cpu()
    assert (loss(codes) <= loss(before) * (1 + 1e-6)).all()
    assert loss(codes).sum() < 0.9 * loss(before).sum()
    left = (W - (codes.float() - zero) * scale) @ H
    torch.testing.assert_close(residual.cpu(), left, rtol=1e-3, atol=1e-3 * float(left.abs().max()))
    if keep is not None:
        assert torch.equal(codes[~keep], before[~keep])
    if sweeps > 1:  # no single change helps any more
        for i in range(0, inputs, inputs // 24):
            for code in range(16):
                other = codes.clone()
                other[:, i] = code
                worse = loss(other) >= loss(codes) * (1 - 1e-4)
                assert (worse if keep is None else worse | ~keep[:, i]).all()


@pytest.mark.skipif(not ops.available() or ops.interpreted(), reason="needs triton, which compiles here")
@pytest.mark.skipif(torch.cuda.is_available(), reason="here kernels can run")
def test_where_triton_cannot_run_loops_are_pytorchs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU as far as PyTorch can tell; what Triton needs to launch something is missing."""
    from ctp_kernels.triton import columns

    one = torch.ones(1, 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(columns.torch, "ones", lambda *_, **__: one)
    assert not columns._usable.__wrapped__(torch.device("cuda"))
