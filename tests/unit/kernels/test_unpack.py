"""Dense weights from packed rows against the codes they were packed from, compiled and not."""

import pytest
import torch
from ctp_kernels import unpack
from ctp_kernels.ragged import pack_bits, pack_kept, row_starts
from ctp_kernels.unpack import dense_rows


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(
    ("inputs", "groups", "share"), [(64, 2, 0.5), (72, 1, 0.7), (48, 3, 0.0), (8, 1, 0.5), (128, 1, 1.0), (40, 5, 0.3)]
)
def test_every_weight_is_what_its_code_says(
    inputs: int,
    groups: int,
    share: float,
    bits: int,
    dtype: torch.dtype,
    threads: int,
    compiled: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not compiled:
        monkeypatch.setattr(unpack, "_library", lambda: None)
    elif unpack._library() is None:
        pytest.skip("this processor has no AVX2, or there is no C++ compiler")
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    generator = torch.Generator().manual_seed(inputs + bits)
    outputs = 5
    codes = torch.randint(0, 2**bits, (outputs, inputs), generator=generator).to(torch.uint8)
    keep = torch.rand(outputs, inputs, generator=generator) >= share
    keep[1], keep[2] = True, False  # full and empty rows
    if share == 0:
        keep[:] = True
    scales = torch.rand(outputs, groups, generator=generator).half()
    zeros = torch.randint(0, 2**bits, (outputs, groups), generator=generator).to(torch.uint8)
    of_input = (torch.arange(inputs) // (inputs // groups)).long()
    wanted = (codes.float() - zeros.float()[:, of_input]) * scales.float()[:, of_input] * keep
    stream, starts = pack_kept(codes, keep, bits), row_starts(pack_bits(keep), bits)
    mask = None if share == 0 else pack_bits(keep)
    found = dense_rows(stream, mask, starts, scales, zeros, bits=bits, dtype=dtype)
    assert found.dtype == dtype
    assert torch.equal(found, wanted.to(dtype))
    strided = None if mask is None else mask.T.contiguous().T
    assert torch.equal(dense_rows(stream, strided, starts, scales, zeros, bits=bits, dtype=dtype), found)
    order = torch.randperm(inputs, generator=generator) % groups
    scattered = dense_rows(stream, mask, starts, scales, zeros, bits=bits, dtype=dtype, g_idx_I=order)
    wanted = (codes.float() - zeros.float()[:, order]) * scales.float()[:, order] * keep
    assert torch.equal(scattered, wanted.to(dtype))


@pytest.mark.parametrize("compiled", [True, False])
def test_streams_that_are_too_short_are_refused(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not compiled:
        monkeypatch.setattr(unpack, "_library", lambda: None)
    keep = torch.ones(3, 16, dtype=torch.bool)
    stream, starts = pack_kept(torch.ones(3, 16, dtype=torch.uint8), keep, 4), row_starts(pack_bits(keep), 4)
    with pytest.raises(ValueError, match="bytes of codes"):
        dense_rows(
            stream[:-1], pack_bits(keep), starts, torch.ones(3, 1), torch.ones(3, 1), bits=4, dtype=torch.float32
        )
