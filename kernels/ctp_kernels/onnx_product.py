"""ONNX Runtime's product with 4-bit weights (MatMulNBits), to compare with. Needs onnxruntime and onnx when called.

M=rows of x N=outputs K=inputs G=groups
"""

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def available() -> bool:
    """Whether the packages are installed: onnx writes the graph that onnxruntime runs."""
    return all(importlib.util.find_spec(name) is not None for name in ("onnxruntime", "onnx"))


def int4_product(codes_NB: Tensor, scales_NG: Tensor) -> Callable[[Tensor], Tensor]:
    """A function from x (M, K) float32 to y (M, N) float32 on the CPU, with as many threads as torch has.

    Shapes: codes_NB (N, K / 2) uint8, two 4-bit codes in a byte, the first one low; scales_NG (N, G); weights are
        scale * (code - 8), groups of 16 inputs or a larger power of two.
    x is rounded to 8 bits per group of inputs (accuracy level 4), where the others here compute with 16 or 32.
    All sessions of the process share their threads from then on, and have to say so (`use_per_session_threads`).
    Raises: RuntimeError where they cannot, or are not as many as torch has now.
    """
    import onnxruntime
    from onnx import TensorProto, helper

    outputs, groups = scales_NG.shape
    inputs = codes_NB.shape[1] * 2
    size = inputs // groups
    codes, scales = codes_NB.contiguous().numpy(), scales_NG.float().contiguous().numpy()
    node = helper.make_node(
        *("MatMulNBits", ["x", "codes", "scales"], ["y"]),
        domain="com.microsoft", K=inputs, N=outputs, bits=4, block_size=size, accuracy_level=4,
    )  # fmt: skip
    graph = helper.make_graph(
        [node],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", inputs])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", outputs])],
        [
            helper.make_tensor("codes", TensorProto.UINT8, (outputs, groups, size // 2), codes.tobytes(), raw=True),
            helper.make_tensor("scales", TensorProto.FLOAT, (outputs * groups,), scales.tobytes(), raw=True),
        ],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    options: Any = onnxruntime.SessionOptions()
    _share_threads()
    options.use_per_session_threads = False
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])

    def run(x_MK: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {"x": x_MK.numpy()})[0])

    return run


def _share_threads() -> None:
    """With threads for each product, those of the last ones would wait, busily, for more work beside the next one's."""
    if _shared_threads() != torch.get_num_threads():
        raise RuntimeError(
            f"ONNX Runtime has {_shared_threads() or 'its own'} threads in this process, not torch's "
            f"{torch.get_num_threads()}, and cannot change: use a process for each number of threads"
        )


@functools.cache
def _shared_threads() -> int:
    """As many as torch had at the first product; 0 where another session came before it."""
    import onnxruntime

    count = torch.get_num_threads()
    try:
        onnxruntime.set_global_thread_pool_sizes(count, 1)
    except Exception:  # the only class that all of its errors have
        return 0
    return count
