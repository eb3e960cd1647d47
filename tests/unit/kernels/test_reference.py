"""The oracle against the reader that the format's documentation prints, and against autograd."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ctp_kernels import reference
from packed_layers import random_parts

FORMAT = Path(__file__).parents[3] / "docs" / "format-ctp.md"


def documented_reader() -> Any:
    source = re.search(r"```python\n(.*?)```", FORMAT.read_text(), re.DOTALL)
    assert source is not None
    names: dict[str, Any] = {"np": np}
    exec(source[1], names)
    return names["weights"]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("layout", ["dense", "2:4", "8:16", "bitmap"])
def test_weights_are_what_the_documented_reader_finds(layout: str, bits: int, symmetric: bool) -> None:
    parts = random_parts(layout, bits=bits, outputs=33, inputs=288, groups=3, symmetric=symmetric)
    stored = {"codes": parts.codes, "scales": parts.scales, "mask": parts.mask, "zeros": parts.zeros}
    arrays = {name: x.numpy() for name, x in stored.items() if x is not None}
    wanted = documented_reader()(arrays, bits, 96, symmetric)
    assert torch.equal(reference.decode(parts, dtype=torch.float32), torch.from_numpy(wanted))
    for (n, m), name in (((2, 4), "2:4"), ((8, 16), "8:16")):
        # 2:4 is also 8:16
        assert reference.keeps_exactly(parts, n, m) == (layout == name or (layout, name) == ("2:4", "8:16"))


def test_groups_may_be_scattered() -> None:
    parts = random_parts("bitmap", bits=4, outputs=9, inputs=288, groups=3, symmetric=False)
    g_idx = torch.arange(288) % 3
    arrays = {"codes": parts.codes, "scales": parts.scales, "mask": parts.mask, "zeros": parts.zeros, "g_idx": g_idx}
    wanted = documented_reader()({name: x.numpy() for name, x in arrays.items() if x is not None}, 4, 96, False)
    found = reference.decode(replace(parts, g_idx=g_idx), dtype=torch.float32)
    assert torch.equal(found, torch.from_numpy(wanted))


def test_the_gradient_is_autograds() -> None:
    parts = random_parts("8:16", bits=4, outputs=9, inputs=288, groups=3, symmetric=False)
    x = torch.randn(5, 288, dtype=torch.float64, requires_grad=True)
    outer = torch.randn(5, 9, dtype=torch.float64)
    reference.matmul(x, parts).backward(outer)
    torch.testing.assert_close(reference.input_gradient(outer, parts), x.grad)


def test_a_stream_that_does_not_fit_the_mask_is_refused() -> None:
    parts = random_parts("bitmap", bits=4, outputs=9, inputs=288, groups=3, symmetric=True)
    with pytest.raises(ValueError, match="bytes of codes"):
        reference.decode(replace(parts, codes=parts.codes[:-1]))
