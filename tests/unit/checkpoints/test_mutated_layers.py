"""Layers from files that anybody may have written: codes or a refusal, in every format, whatever the parts are."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ctp_cli.checkpoints.compressed_tensors import CompressedTensorsSettings
from ctp_cli.checkpoints.formats import LayerFormat
from ctp_cli.checkpoints.gptq import GPTQSettings
from ctp_cli.checkpoints.packed import PackedSettings
from ctp_cli.compression.solver import Codes
from ctp_cli.errors import InputError

DTYPES = (torch.uint8, torch.int8, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.bool)
FORMS: list[LayerFormat] = [
    GPTQSettings(4, 32, True, False),
    GPTQSettings(3, 32, False, False, zero_offset=0),
    PackedSettings(4, 32, True),
    PackedSettings(3, 32, False, (2, 4)),
    CompressedTensorsSettings(4, 32, True),
    CompressedTensorsSettings(8, 32, False),
]


def codes_for(form: LayerFormat) -> Codes:
    """(32, 64) codes, half of them zero points."""
    generator = torch.Generator().manual_seed(form.bits)
    middle = 2 ** (form.bits - 1)
    codes = torch.randint(0, 2**form.bits, (32, 64), generator=generator)
    pruned = torch.rand(32, 16, 4, generator=generator).argsort(2).flatten(1) < 2
    return Codes(
        torch.where(pruned, middle, codes).to(torch.uint8),
        torch.rand(32, 2, generator=generator).half().float(),
        torch.full((32, 2), middle, dtype=torch.uint8),
        (torch.arange(64) // 32).int(),
    )


@pytest.mark.parametrize("form", FORMS, ids=lambda form: f"{form.name}-{form.bits}")
@settings(deadline=None, max_examples=300)
@given(st.data())
def test_parts_of_any_type_and_shape_are_codes_or_refused(form: LayerFormat, data: st.DataObject) -> None:
    codes = codes_for(form)
    parts = {name.removeprefix("layer."): tensor for name, tensor in form.pack("layer", codes).items()}
    for _ in range(data.draw(st.integers(1, 3))):
        part = data.draw(st.sampled_from(form.parts))
        change = data.draw(st.sampled_from(["drop", "other", "dtype", "cut", "row", "value"]))
        if change == "drop":
            parts.pop(part, None)
        elif change == "other" or part not in parts:
            shape = data.draw(st.lists(st.sampled_from([0, 1, 2, 3, 8, 32, 64]), max_size=3))
            parts[part] = torch.ones(shape, dtype=data.draw(st.sampled_from(DTYPES)))
        elif change == "dtype":
            parts[part] = parts[part].to(data.draw(st.sampled_from(DTYPES)))
        elif change == "cut":
            dimension = data.draw(st.integers(0, max(parts[part].dim() - 1, 0)))
            if parts[part].dim() and parts[part].shape[dimension]:
                parts[part] = parts[part].narrow(dimension, 0, parts[part].shape[dimension] - 1)
        elif change == "row":
            parts[part] = parts[part].flatten()
        elif parts[part].numel():
            value = data.draw(st.sampled_from([-1, 0, 1, 255, 2**31 - 1]))
            parts[part] = parts[part].clone()
            place = data.draw(st.integers(0, parts[part].numel() - 1))
            parts[part].view(-1)[place] = torch.tensor(value).to(parts[part].dtype)
    try:
        found = form.unpack("layer", parts)
    except InputError as error:
        assert "layer" in str(error)
        return
    assert found.codes_OI.dim() == 2
    assert found.values().shape == found.codes_OI.shape
