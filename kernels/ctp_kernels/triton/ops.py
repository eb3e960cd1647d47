"""Products with packed weights on a GPU: y = x W^T, its gradient, and the weights themselves.

    weight = pack(codes_NK, scales_NG, bits=4, keep_NK=keep_NK).to("cuda")
    y = matmul(x, weight)

Needs triton when called, not when imported. Accelerators: NVIDIA with compute capability 8.0 or later, and AMD gfx942,
for which the kernels are known to compile; see docs/kernels.md.

M=batch x tokens N=outputs K=inputs
"""

import functools
import importlib.util
import os
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ctp_kernels.triton.config import Config, Device, choose
from ctp_kernels.triton.layouts import PackedWeight, in_order

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def matmul(x: Tensor, weight: PackedWeight, *, config: Config | None = None) -> Tensor:
    """y = x W^T, differentiable with respect to x.

    Shapes: x (..., K) float16, bfloat16 or float32 on the weight's device; returns (..., N) in x's dtype. Products are
        added up in float32. `config` is chosen by the size of the batch where it is not given (`config.choose`).
    Errors against float64, relative: 3e-4 for float16, 3e-3 for bfloat16, 1e-6 for float32.
    Raises: ValueError for another dtype, width or device, and without triton.
    """
    _check(x, weight, weight.inputs, "inputs")
    y: Tensor = _Matmul.apply(x, weight, config)
    return y


def input_gradient(gy: Tensor, weight: PackedWeight) -> Tensor:
    """gx = gy W: the gradient with respect to x from that with respect to y, by weights that are made dense for it.

    Shapes: gy (..., N), dtypes as in `matmul`; returns (..., K) in gy's dtype. Weights are rounded to it, and the
        product is PyTorch's: float32 is TF32 where that was allowed.
    Raises: as `matmul`.
    """
    _check(gy, weight, weight.outputs, "outputs")
    return gy @ dequantize(weight, dtype=gy.dtype)


def dequantize(weight: PackedWeight, *, dtype: torch.dtype = torch.float16) -> Tensor:
    """The weights (N, K) in `dtype`, rounded once.

    Raises: ValueError for another dtype than `matmul` takes, and without triton.
    """
    from ctp_kernels.triton.weights import dequantize as kernel

    dense_NK = torch.empty(weight.outputs, weight.inputs, dtype=dtype, device=weight.codes.device)
    _check(dense_NK, weight, weight.inputs, "inputs")
    grid = (weight.padded_outputs // DEQUANTIZED_ROWS, weight.padded_inputs // weight.block)
    with _on(dense_NK):
        kernel[grid](
            dense_NK, *operands(weight).values(), weight.outputs, weight.inputs, weight.padded_outputs,
            **dequantize_constants(weight, dtype, nvidia=_on_nvidia(dense_NK)), **options(4, 1),
        )  # fmt: skip
    return in_order(dense_NK, weight)


class _Matmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: PackedWeight, config: Config | None) -> Tensor:
        ctx.weight = weight
        y_MN = _forward(x.reshape(-1, weight.inputs), weight, config)
        return y_MN.view(*x.shape[:-1], weight.outputs)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None, None]:
        return input_gradient(outer[0], ctx.weight), None, None


def _forward(x_MK: Tensor, weight: PackedWeight, config: Config | None) -> Tensor:
    from ctp_kernels.triton import forward

    batch = x_MK.shape[0]
    y_MN = x_MK.new_empty(batch, weight.outputs)
    if not batch:
        return y_MN
    config = (
        choose(batch, weight, device_of(x_MK.device), element_bytes=x_MK.element_size()) if config is None else config
    )
    if weight.padded_outputs % config.block_n or config.splits > weight.padded_inputs // weight.block:
        raise ValueError(f"{config}: block_n divides {weight.padded_outputs}, splits are no more than blocks of inputs")
    x_MK = laid_out(x_MK, weight)
    grid = (weight.padded_outputs // config.block_n, -(-batch // config.block_m), config.splits)
    sums, arrived = None, None
    if config.splits > 1:
        sums = x_MK.new_empty(config.splits, *y_MN.shape, dtype=torch.float32)
        arrived = counts(x_MK.device, grid[0] * grid[1], _stream(x_MK.device))
    with _on(x_MK):
        forward.forward[grid](
            x_MK, y_MN, sums, arrived, *operands(weight).values(),
            batch, weight.outputs, weight.padded_outputs, weight.padded_inputs, config.splits,
            **constants(weight, config, x_MK.dtype, nvidia=_on_nvidia(x_MK)), **options(config.warps, config.stages),
        )  # fmt: skip
    return y_MN


def constants(weight: PackedWeight, config: Config, dtype: torch.dtype, *, nvidia: bool) -> dict[str, Any]:
    """What the forward kernel is compiled for, beside the types of its operands."""
    tiles = {"SCALE_AFTER": weight.scales_segments, "BM": config.block_m, "BN": config.block_n}
    return _decoding(weight, dtype, nvidia) | tiles


DEQUANTIZED_ROWS = 32
"""Outputs of a tile of `dequantize`, whose inputs are a block."""


def dequantize_constants(weight: PackedWeight, dtype: torch.dtype, *, nvidia: bool) -> dict[str, Any]:
    """As `constants`, of the kernel of `dequantize`."""
    return _decoding(weight, dtype, nvidia) | {"BN": DEQUANTIZED_ROWS}


def _decoding(weight: PackedWeight, dtype: torch.dtype, nvidia: bool) -> dict[str, Any]:
    one_zero = weight.zeros_GN is None or weight.scales_segments  # for all planes of a block
    return {
        "LAYOUT": weight.layout,
        "BITS": weight.bits,
        "GROUP": weight.group_size,
        "PTX": nvidia and weight.bits == 4 and one_zero and dtype != torch.float32,
        "BLOCK": weight.block,
    }


_COUNTS: dict[tuple[torch.device, int], list[Tensor]] = {}
"""Of each device and stream; the last is the one in use, graphs may hold the others."""
_FOR_GRAPHS: dict[torch.device, tuple[Tensor, int]] = {}
"""Of each device, and how many of them captured products have."""
_COUNTED = 1 << 14
_COUNTED_BY_GRAPHS = 1 << 18


def counts(device: torch.device, tiles: int, stream: int | None) -> Tensor:
    """Zeros (tiles or more,) int32, which kernels leave at 0, that no other product uses at the same time.

    stream: the current one, whose products follow one another; None while it is captured into a graph, of which nobody
    knows what it will run beside: then every product gets its own.
    """
    if stream is None:
        made, used = _FOR_GRAPHS.get(device, (None, 0))
        if made is None or used + tiles > len(made):
            return torch.zeros(tiles, dtype=torch.int32, device=device)  # made anew by every replay, in a microsecond
        _FOR_GRAPHS[device] = made, used + -(-tiles // 32) * 32  # addresses stay multiples of 16
        return made[used : used + tiles]
    if device not in _FOR_GRAPHS:  # memory that is taken while capturing is not zero before the first replay
        _FOR_GRAPHS[device] = torch.zeros(_COUNTED_BY_GRAPHS, dtype=torch.int32, device=device), 0
    found = _COUNTS.setdefault((device, stream), [])
    if not found or len(found[-1]) < tiles:
        found.append(torch.zeros(max(tiles, _COUNTED), dtype=torch.int32, device=device))
    return found[-1]


def _stream(device: torch.device) -> int | None:
    """For `counts`."""
    if device.type != "cuda":
        return 0
    return None if torch.cuda.is_current_stream_capturing() else torch.cuda.current_stream(device).cuda_stream


def laid_out(x_MK: Tensor, weight: PackedWeight) -> Tensor:
    """x (M, padded inputs), contiguous, with the inputs of a plane next to one another (M, stride, K / stride)."""
    if weight.order is not None:
        x_MK = x_MK[:, weight.order]
    if weight.padded_inputs != weight.inputs:
        x_MK = functional.pad(x_MK, (0, weight.padded_inputs - weight.inputs))
    if weight.stride == 1:
        return x_MK.contiguous()
    return x_MK.view(x_MK.shape[0], -1, weight.stride).transpose(1, 2).contiguous().flatten(1)


def operands(weight: PackedWeight) -> dict[str, Tensor | None]:
    """The weight's tensors under the names, and in the order, in which kernels take them."""
    return {
        "codes": weight.codes,
        "high": weight.high,
        "mask": weight.mask,
        "starts": weight.starts,
        "rows": weight.rows,
        "scales": weight.scales_GN,
        "zeros": weight.zeros_GN,
    }


def _check(x: Tensor, weight: PackedWeight, width: int, what: str) -> None:
    if x.dtype not in DTYPES:
        raise ValueError(f"{x.dtype}: the kernels take {', '.join(str(dtype) for dtype in DTYPES)}")
    if x.shape[-1] != width:
        raise ValueError(f"{tuple(x.shape)} does not end in the {width} {what} of the layer")
    if x.device != weight.codes.device:
        raise ValueError(f"activations on {x.device}, weights on {weight.codes.device}")
    if not available():
        raise ValueError("the kernels need triton, which is not installed: pip install 'ctp[gpu]'")
    if x.device.type != "cuda" and not interpreted():
        raise ValueError(f"the kernels need a GPU, not {x.device}; reference.matmul runs anywhere")


def available() -> bool:
    """Whether triton is installed."""
    return importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """Whether triton was told to run kernels in Python, which needs no GPU."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def options(warps: int, stages: int) -> dict[str, Any]:
    """Of a launch. Fused multiply-add is asked for: triton's default is about to change, and warns."""
    if interpreted():
        return {}
    return {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}


def _on_nvidia(x: Tensor) -> bool:
    return x.device.type == "cuda" and not torch.version.hip and not interpreted()


def _on(x: Tensor) -> Any:
    """Triton launches on the current GPU, which need not be the tensor's."""
    return torch.cuda.device_of(x)


@functools.cache
def device_of(device: torch.device) -> Device:
    """What configurations depend on."""
    if device.type != "cuda":
        return Device(device.type, (0, 0), 1)
    found = torch.cuda.get_device_properties(device)
    capability = (0, 0) if torch.version.hip else (found.major, found.minor)
    return Device(found.name, capability, found.multi_processor_count)
