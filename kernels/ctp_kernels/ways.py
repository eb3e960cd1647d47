"""Which way a product with a packed layer takes, and why none of the others.

Ways:

- triton: the kernels of `ctp_kernels.triton`, on GPUs;
- triton dense: for many rows of x, weights made dense by a kernel and multiplied by PyTorch's product;
- packed: codes decoded in registers on the CPU, for some rows (`ctp_kernels.packed`); packed int8: the same with x
  rounded to 8 bits, where that is asked for;
- int4: PyTorch's product with 4-bit weights on the CPU, for few rows of bfloat16, where there is no compiler;
- dense: weights made dense for each product (`ctp_kernels.unpack`), anywhere.

M=rows N=outputs K=inputs G=groups
"""

from dataclasses import dataclass, replace

import torch

from ctp_kernels import densified, packed
from ctp_kernels.cpu.build import cpu_features
from ctp_kernels.reference import PackedParts
from ctp_kernels.triton import ops

TRITON, TRITON_DENSE, INT4, DENSE = "triton", "triton dense", "int4", "dense"
PACKED_INT8, PACKED = "packed int8", "packed"
WAYS = (TRITON, TRITON_DENSE, PACKED_INT8, PACKED, INT4, DENSE)
"""In the order in which they are asked for."""
_WHY = {
    TRITON: "weights are multiplied as they are packed",
    TRITON_DENSE: "with this many rows, making weights dense once is little work beside the product",
    PACKED_INT8: "as packed, with activations rounded to 8 bits, as was asked for",
    PACKED: "codes are decoded in registers and multiplied at once",
    INT4: "PyTorch multiplies with 4-bit codes, and nothing is made dense",
    DENSE: "weights are made dense for each product, which works anywhere",
}
_MANY_ROWS, _MANY_ROWS_MASKED = 128, 16
"""Up to here weights are multiplied as they are packed on a GPU. With 4096 x 4096 weights on an H200 128 rows took
23 us with dense codes, where making them dense first took 26, 256 rows 38 and 27. 16 rows of 8:16 took 14 and 21, 64
as long; 16 rows of a bitmap 32 and 26, 32 rows 56 and 26, but less memory (`benchmarks/gpu_rows.py`)."""
SOME_ROWS = 128
"""Up to here decoding in registers was faster than dense weights on a processor with AVX2: 1.2 to 2.5 times with 4096 x
4096 weights, as fast with 576 x 576. They meet between 128 and 256 rows, with a bitmap later."""
FEW_ROWS = 16
"""Up to here PyTorch's int4 product, whose time grows with the rows, was over four times as fast as dense weights on a
processor with AVX2. They met near 64 rows there; where products are faster they meet earlier."""


@dataclass(frozen=True)
class Choice:
    """The way a product takes, and for each other way why not. `str` of it is one line for each.

    dense_codes: weights that a mask leaves out have codes, too.
    """

    way: str
    others: dict[str, str]
    dense_codes: bool = False

    def __str__(self) -> str:
        how = ", with a code for every weight" if self.dense_codes else ""
        lines = [f"{self.way}{how}: {_WHY[self.way]}", *(f"not {way}: {why}" for way, why in self.others.items())]
        return "\n".join(lines)


def explain(
    parts: PackedParts,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    rows: int,
    int8_activations: bool = False,
    dense_codes: bool = False,
) -> Choice:
    """Which way y = x W^T takes for `rows` rows of x in `dtype` on `device`, and why.

    Shapes and types of `parts` are what counts: they may be on the meta device. A GPU that is not there is taken for
    one that the kernels support.
    """
    densify = dense_codes and parts.mask is not None
    about = densified.described(parts) if densify else parts
    return replace(choose(about, torch.device(device), dtype, rows, {}, int8_activations), dense_codes=densify)


def dense_codes_pay(parts: PackedParts, *, device: torch.device | str) -> int:
    """Bytes that `dense_codes` would add, if it made products with such a layer faster on `device`; else 0.

    On CPUs it does where cutting codes out and expanding them takes longer than reading more of them: not where pairs
    of outputs share bytes (docs/kernels.md has times). GPUs differ too much to say. `parts` as in `explain`.
    """
    decoding = explain(parts, device=device, dtype=torch.float32, rows=1).way == PACKED
    if parts.mask is None or not decoding or packed.takes_pairs(parts):
        return 0
    return densified.described(parts).codes.numel() - parts.codes.numel()


def choose(
    parts: PackedParts,
    device: torch.device,
    dtype: torch.dtype,
    rows: int,
    refused: dict[str, str],
    int8_activations: bool,
) -> Choice:
    """As `explain`, for parts as they are multiplied; refused: ways that this layer is known not to go, and why."""
    kernels = _against_triton(parts, device, dtype)
    on_cpu = _against_packed(parts, device, dtype, rows)
    most = most_rows(parts)
    obstacles = {
        TRITON: kernels or (f"more than {most} rows" if rows > most else ""),
        TRITON_DENSE: kernels or (f"no more than {most} rows" if rows <= most else ""),
        PACKED_INT8: on_cpu or ("" if int8_activations else "rounding activations to 8 bits was not asked for"),
        PACKED: on_cpu,
        INT4: _against_int4(parts, device, dtype, rows),
        DENSE: "",
    }
    obstacles |= {way: obstacles[way] or why for way, why in refused.items()}
    chosen = next(way for way in WAYS if not obstacles[way])
    return Choice(chosen, {way: obstacles[way] or f"{chosen} comes first" for way in WAYS if way != chosen})


def most_rows(parts: PackedParts) -> int:
    """Of x, that are multiplied with weights as they are packed on a GPU."""
    return _MANY_ROWS if parts.mask is None else _MANY_ROWS_MASKED


def _against_triton(parts: PackedParts, device: torch.device, dtype: torch.dtype) -> str:
    """Why the kernels cannot take this product; empty if they can."""
    groups, inputs = parts.scales.shape[1], parts.inputs
    if device.type != "cuda" and not ops.interpreted():
        return f"needs a GPU, and this is {device.type}"
    if not ops.available():
        return "triton is not installed: pip install 'ctp[gpu]'"
    if device.type == "cuda" and torch.cuda.is_available() and not torch.version.hip:
        major, minor = torch.cuda.get_device_capability(device)
        if major < 8:
            return f"needs compute capability 8.0, this GPU has {major}.{minor}"
    if dtype not in ops.DTYPES:
        return f"does not take {dtype}"
    if ops.interpreted() and dtype == torch.bfloat16:
        return "triton's interpreter gets bfloat16 wrong"
    if groups > 1 and inputs // groups % 16:
        return f"groups of {inputs // groups} inputs are no multiple of 16"
    if parts.g_idx is not None and not parts.g_idx.is_meta:
        return unequal_groups(parts)
    return ""


def _against_packed(parts: PackedParts, device: torch.device, dtype: torch.dtype, rows: int) -> str:
    """Why products that decode in registers cannot take this one, or should not; empty if one is the one to take."""
    if device.type != "cpu":
        return f"for the CPU, and this is {device.type}"
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"does not take {dtype}"
    if not 1 <= rows <= SOME_ROWS:
        return f"is faster up to {SOME_ROWS} rows, not with {rows}"
    if not packed.available():
        return "needs a processor with AVX2, and a C++ compiler"
    return packed.refusal(parts)


def _against_int4(parts: PackedParts, device: torch.device, dtype: torch.dtype, rows: int) -> str:
    """Why PyTorch's int4 product cannot take this one, or should not; empty if it is the one to take."""
    group_size = parts.inputs // parts.scales.shape[1]
    if device.type != "cpu":
        return f"for the CPU, and this is {device.type}"
    if parts.bits != 4 or parts.mask is not None:
        return f"takes 4 bits without a mask, not {parts.bits} bits{'' if parts.mask is None else ' with a mask'}"
    if parts.g_idx is not None or group_size not in (32, 64, 128, 256):
        return "takes groups that are runs of 32, 64, 128 or 256 inputs"
    if parts.outputs % 64:
        return f"takes outputs in blocks of 64, not {parts.outputs}"
    if dtype != torch.bfloat16:
        return f"is fast with bfloat16, and many times slower with {dtype}"
    if not 1 <= rows <= FEW_ROWS:
        return f"is faster up to {FEW_ROWS} rows, not with {rows}"
    if "avx2" not in cpu_features():
        return "this processor has no AVX2, without which it is slow"
    return ""


def unequal_groups(parts: PackedParts) -> str:
    """Why kernels that want groups of as many inputs each cannot take such a layer, by its g_idx; empty if they can."""
    assert parts.g_idx is not None
    groups = parts.scales.shape[1]
    equal = bool((parts.g_idx.long().bincount(minlength=groups) * groups == parts.inputs).all())
    return "" if equal else "needs groups of as many inputs each"
