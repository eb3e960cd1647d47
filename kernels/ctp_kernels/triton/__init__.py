"""Fused products with packed weights. Importing needs neither triton nor a GPU; using it does.

from ctp_kernels.triton import matmul, pack
"""

from ctp_kernels.triton.layouts import PackedWeight, from_parts, pack
from ctp_kernels.triton.ops import dequantize, input_gradient, matmul

__all__ = ["PackedWeight", "dequantize", "from_parts", "input_gradient", "matmul", "pack"]
