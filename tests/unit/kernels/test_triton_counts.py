"""Where programs that share a tile count themselves: never where another product does at the same time."""

import itertools

import pytest
import torch
from ctp_kernels.triton import ops

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _none_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "_COUNTS", {})
    monkeypatch.setattr(ops, "_FOR_GRAPHS", {})


def test_products_of_a_stream_share_and_streams_do_not() -> None:
    first, again, other = ops.counts(CPU, 40, 1), ops.counts(CPU, 50, 1), ops.counts(CPU, 40, 2)
    assert first.data_ptr() == again.data_ptr() != other.data_ptr()
    assert first.dtype == torch.int32 and not first.any()
    larger = ops.counts(CPU, ops._COUNTED + 1, 1)
    assert len(larger) > ops._COUNTED
    # a product in flight, or a graph, may still hold the smaller
    assert any(kept.data_ptr() == first.data_ptr() for kept in ops._COUNTS[CPU, 1])


def test_every_captured_product_gets_its_own() -> None:
    alone = ops.counts(CPU, 33, None)
    assert len(alone) == 33 and not alone.any()
    ops.counts(CPU, 1, 1)
    taken = [ops.counts(CPU, tiles, None) for tiles in (33, 5, 64)]
    spans = sorted((x.data_ptr(), x.data_ptr() + x.nbytes) for x in taken)
    assert [len(x) for x in taken] == [33, 5, 64]
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(spans))
    assert all((x.data_ptr() - taken[0].data_ptr()) % 16 == 0 for x in taken)
    whole, _ = ops._FOR_GRAPHS[CPU]
    outside = ops.counts(CPU, len(whole), None)
    assert outside.data_ptr() not in range(whole.data_ptr(), whole.data_ptr() + whole.nbytes)
    assert not outside.any()
