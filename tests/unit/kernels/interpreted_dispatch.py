"""Products by `dispatch` with Triton's interpreter, as JSON; a program of its own, as `interpreted_products` is."""

import json
import sys
from dataclasses import replace

import torch
from ctp_kernels import dispatch, reference, ways
from ctp_kernels.triton.layouts import PackedWeight
from packed_layers import random_parts
from test_dispatch import distance, same_bits


def checked(parts: reference.PackedParts, dtype: torch.dtype, *, dense_codes: bool = False) -> dict[str, object]:
    generator = torch.Generator().manual_seed(3)
    weight, errors, taken = dispatch.prepare(parts, dense_codes=dense_codes), [], []
    for rows in (2, 5):  # the second is many
        x = torch.randn(rows, parts.inputs, generator=generator).to(dtype).requires_grad_()
        gy = torch.randn(rows, parts.outputs, generator=generator).to(dtype)
        y = dispatch.matmul(x, weight)
        y.backward(gy)
        assert isinstance(weight.form, PackedWeight) and not weight.tensors().keys() & {"codes", "scales", "mask"}
        assert x.grad is not None
        errors.append(distance(y, reference.matmul(x.detach().double(), parts)))
        errors.append(distance(x.grad, reference.input_gradient(gy.double(), parts)))
        taken.append(weight.explain(dtype, rows).way)
    return {
        "errors": errors,
        "ways": taken,
        "same_bits": same_bits(weight.stored(), parts) and same_bits(weight.restore(), parts) and weight.form is None,
        "bfloat16": weight.explain(torch.bfloat16, 40).way,
    }


if __name__ == "__main__":
    ways._MANY_ROWS = ways._MANY_ROWS_MASKED = 4
    torch.set_num_threads(1)
    found = {}
    for number, layout in enumerate(("dense", "2:4", "8:16", "bitmap")):
        dtype, bits = (torch.float16, torch.float32)[number % 2], (3, 4, 2, 8)[number]
        parts = random_parts(layout, bits=bits, outputs=40, inputs=240, groups=(1, 3)[number % 2], symmetric=number < 2)
        parts = parts if layout == "bitmap" else replace(parts, codes=parts.codes.view(40, -1))
        if number == 3:
            parts = replace(parts, g_idx=(torch.arange(240) % 3).int())
        found[f"{layout} {dtype}"] = checked(parts, dtype)
        if layout in ("2:4", "bitmap"):
            found[f"{layout} {dtype}, dense codes"] = checked(parts, dtype, dense_codes=True)
    json.dump(found, sys.stdout)
