"""Compiling the kernels for GPUs that are not there, and reading off what came out: registers, spills, shared memory,
and whether the instructions a fast kernel needs are among the others.

Needs triton, and no GPU; not in a process that interprets kernels (TRITON_INTERPRET).
"""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ctp_kernels.triton.config import Config, Device, default
from ctp_kernels.triton.layouts import PackedWeight, pack
from ctp_kernels.triton.ops import constants, dequantize_constants, operands, options

TARGETS = {
    "sm_80": Device("A100", (8, 0), 108),
    "sm_86": Device("RTX 3090", (8, 6), 82),
    "sm_89": Device("L4", (8, 9), 58),
    "sm_90": Device("H100", (9, 0), 132),
    "sm_100": Device("B200", (10, 0), 148),
    "sm_120": Device("RTX 5090", (12, 0), 170),
    "gfx942": Device("MI300X", (0, 0), 304),
}
"""Architectures, and a GPU of each for which default configurations are worked out."""
DTYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
_POINTERS = {
    **DTYPES,
    torch.uint8: "u8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
}

_ANY_NUMBER = ("batch", "splits", "columns", "max_code", "U_stride", "groups")


@dataclass(frozen=True)
class Compiled:
    """What a kernel became. Instructions are those in its code, loops counted once."""

    target: str
    registers: int
    spilled: int
    """Bytes of stack per thread on NVIDIA GPUs, registers that were spilled on AMD's."""
    shared_bytes: int
    instructions: int
    tensor: Counter[str]
    """Instructions for tensor cores, by name."""
    asynchronous_copies: int


def sample(
    layout: str, bits: int, *, group_size: int = 128, symmetric: bool = True, outputs: int = 4096, inputs: int = 4096
) -> PackedWeight:
    """A weight of that size as far as its description goes: enough to compile for, not to compute with."""
    width = max(512, group_size)
    keep = torch.arange(width).repeat(64, 1) % 16 < 8 if layout == "8:16" else torch.arange(width).repeat(64, 1) % 4 < 2
    groups = torch.ones(64, width // group_size)
    small = pack(
        torch.zeros(64, width, dtype=torch.uint8),
        groups,
        bits=bits,
        keep_NK=None if layout == "dense" else keep,
        zeros_NG=None if symmetric else groups.to(torch.uint8),
        layout=layout,
    )
    scales = torch.empty(inputs // group_size, outputs, dtype=torch.float16, device="meta")
    return replace(small, outputs=outputs, inputs=inputs, group_size=group_size, scales_GN=scales)


def compile_forward(
    weight: PackedWeight,
    target: str,
    *,
    dtype: torch.dtype = torch.float16,
    batch: int = 16,
    config: Config | None = None,
) -> Compiled:
    """The kernel that `matmul` runs for a batch of that size, by default in its default configuration."""
    from ctp_kernels.triton.forward import forward

    config = default(batch, weight, TARGETS[target]) if config is None else config
    x = torch.empty(1, dtype=dtype, device="meta")
    split = config.splits > 1
    counts = torch.empty(1, dtype=torch.int32, device="meta")
    tensors = {"x": x, "y": x, "sums": x.float() if split else None, "arrived": counts if split else None}
    fixed = constants(weight, config, dtype, nvidia=target.startswith("sm_"))
    return _compile(forward, tensors | operands(weight), fixed, target, options(config.warps, config.stages))


def compile_dequantize(weight: PackedWeight, target: str, *, dtype: torch.dtype = torch.float16) -> Compiled:
    """The kernel that makes weights dense, for gradients and large batches."""
    from ctp_kernels.triton.weights import dequantize

    fixed = dequantize_constants(weight, dtype, nvidia=target.startswith("sm_"))
    dense = torch.empty(1, dtype=dtype, device="meta")
    return _compile(dequantize, {"dense": dense, **operands(weight)}, fixed, target, options(4, 1))


def compile_columns(target: str, *, without: tuple[str, ...] = ()) -> dict[str, Compiled]:
    """The solver's kernels, by name, with everything they can be asked for but the tensors named in `without`."""
    from ctp_kernels.triton import columns, spans

    real, byte, index = (
        torch.empty(1, dtype=dtype, device="meta") for dtype in (torch.float32, torch.uint8, torch.int32)
    )
    tensors = {name: real for name in ("W", "w", "U", "H", "errors", "residual", "changes", "scales", "zeros")}
    tensors |= {"keep": byte, "codes": byte, "group_of": index}
    fewer = {name: None if name in without else x for name, x in tensors.items()}
    some = tensors | {"keep": fewer["keep"]}
    tile = {"C": columns.SPAN, "O": columns.OUTPUTS}
    return {
        "take_span": _compile(spans.take_span, fewer, tile, target, options(1, 1)),
        "improve_span": _compile(spans.improve_span, some, tile, target, options(1, 1)),
        "round_all": _compile(spans.round_all, tensors, {"O": columns.CANDIDATE_OUTPUTS}, target, options(4, 1)),
    }


def _compile(
    kernel: Any,
    tensors: Mapping[str, torch.Tensor | None],
    fixed: Mapping[str, Any],
    target: str,
    settings: dict[str, Any],
) -> Compiled:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    settled = {**fixed, **{name: None for name, x in tensors.items() if x is None and name in names}}
    signature = {}
    for name in names:
        x = tensors.get(name)
        signature[name] = "constexpr" if name in settled else "i32" if x is None else f"*{_POINTERS[x.dtype]}"
    # what the launcher finds out by itself: sizes of layers and addresses are multiples of 16
    aligned = [index for index, name in enumerate(names) if name not in settled and name not in _ANY_NUMBER]
    gpu = GPUTarget("hip", target, 64) if target.startswith("gfx") else GPUTarget("cuda", int(target[3:]), 32)
    found = triton.compile(
        ASTSource(
            fn=kernel,
            signature=signature,
            constexprs={(names.index(name),): value for name, value in settled.items()},
            attrs={(index,): [["tt.divisibility", 16]] for index in aligned},
        ),
        target=gpu,
        options=settings,
    )
    read = _read_amd if target.startswith("gfx") else _read_nvidia
    return read(found, target)


def _read_nvidia(found: Any, target: str) -> Compiled:
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(found.asm["cubin"])
        usage = _output(knobs.nvidia.cuobjdump.path, "--dump-resource-usage", binary)
        listing = _output(knobs.nvidia.nvdisasm.path, "-c", binary)
    mnemonics = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)", listing, re.MULTILINE)
    counts = Counter(name for name in mnemonics if name != "NOP")
    return Compiled(
        target=target,
        registers=int(re.findall(r"REG:(\d+)", usage)[0]),
        spilled=int(re.findall(r"STACK:(\d+)", usage)[0]),
        shared_bytes=found.metadata.shared,
        instructions=counts.total(),
        tensor=Counter({name: counts[name] for name in ("HMMA", "HGMMA", "UTCHMMA") if counts[name]}),
        asynchronous_copies=counts["LDGSTS"],
    )


def _read_amd(found: Any, target: str) -> Compiled:
    text = found.asm["amdgcn"]
    mnemonics = Counter(re.findall(r"^\t([a-z][a-z0-9_]+)(?:\s|$)", text, re.MULTILINE))
    spills = re.findall(r"\.[sv]gpr_spill_count:\s*(\d+)", text)
    tensor = sum(count for name, count in mnemonics.items() if name.startswith("v_mfma"))
    return Compiled(
        target=target,
        registers=int(re.findall(r"\.vgpr_count:\s*(\d+)", text)[0]),
        spilled=sum(map(int, spills)),
        shared_bytes=found.metadata.shared,
        instructions=mnemonics.total(),
        tensor=Counter({"v_mfma": tensor} if tensor else {}),
        asynchronous_copies=0,
    )


def _output(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
