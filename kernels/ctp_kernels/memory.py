"""How much memory a piece of work needs at its worst moment, beyond what was held before it began."""

import contextlib
import ctypes
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_SAMPLING_SECONDS = 0.002
# the kernel counts resident pages per thread in batches: mark and current size may disagree by a few of them
_SLACK_BYTES = 4 << 20
# of malloc.h; glibc refuses larger thresholds for mmap
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _LARGEST_THRESHOLD = -1, -3, 32 << 20
_KEPT_BYTES, _SMALL_BYTES = 1 << 30, 1 << 20


@dataclass
class PeakMemory:
    """Filled in when the watch ends. `growth_bytes` is None where the platform offers no way to know."""

    growth_bytes: int | None = None
    method: str = "not measured"


@contextlib.contextmanager
def watch_peak(device: torch.device) -> Iterator[PeakMemory]:
    """Measure the peak growth in memory of what runs inside: the device's on CUDA, the process's on the CPU.

    `method` says how: the CUDA allocator's peak; the kernel's high-water mark of the resident size (VmHWM),
    reset at the start; or, where it cannot be reset, the resident size sampled by a thread, which can miss
    short peaks.
    """
    peak = PeakMemory()
    if device.type == "cuda":
        yield from _watch_cuda(peak, device)
    elif device.type == "cpu" and _STATUS.exists():
        return_freed_memory()  # used again unseen, what was kept would hide the growth
        yield from (_watch_high_water(peak) if _reset_high_water() else _watch_samples(peak))
    else:
        yield peak


def keep_freed_memory() -> None:
    """Have glibc keep what is freed for the next tensor.

    By default it gives large pieces back to the system, which clears them page by page when the next tensor comes; of
    a compression that is one part in forty. Does nothing with another C library.
    """
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.mallopt(_M_MMAP_THRESHOLD, _LARGEST_THRESHOLD)
        library.mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)


def return_freed_memory() -> None:
    """Have glibc give the system what it keeps of freed memory. Does nothing with another C library."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def keep_no_freed_memory() -> None:
    """Have glibc give back every large piece as soon as it is freed: the opposite of `keep_freed_memory`.

    By default it learns from pieces of up to 32 MB to keep them. Where every layer is made dense in its turn, small
    tensors that stay come to lie between the large ones, and what was freed adds up to many times the weights.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _SMALL_BYTES)


def weight_bytes(model: nn.Module) -> int:
    """Bytes of the parameters and persistent buffers, counting tied ones once."""
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in model.state_dict().values()}
    return sum(sizes.values())


def _watch_cuda(peak: PeakMemory, device: torch.device) -> Iterator[PeakMemory]:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    yield peak
    torch.cuda.synchronize(device)
    peak.growth_bytes = torch.cuda.max_memory_allocated(device) - before
    peak.method = "torch.cuda.max_memory_allocated, growth during the run"


def _watch_high_water(peak: PeakMemory) -> Iterator[PeakMemory]:
    before = _resident_bytes("VmRSS")
    yield peak
    peak.growth_bytes = max(0, _resident_bytes("VmHWM") - before)
    peak.method = "resident high-water mark (VmHWM), growth during the run"


def _watch_samples(peak: PeakMemory) -> Iterator[PeakMemory]:
    before = highest = _resident_bytes("VmRSS")
    done = threading.Event()

    def sample() -> None:
        nonlocal highest
        while not done.wait(_SAMPLING_SECONDS):
            highest = max(highest, _resident_bytes("VmRSS"))

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()
    peak.growth_bytes = max(highest, _resident_bytes("VmRSS")) - before
    peak.method = f"resident size sampled every {_SAMPLING_SECONDS * 1000:g} ms, growth during the run"


def _reset_high_water() -> bool:
    """Bring VmHWM down to the present size; False where that is not permitted or has no effect."""
    try:
        _CLEAR_REFS.write_text("5")
        return _resident_bytes("VmHWM") <= _resident_bytes("VmRSS") + _SLACK_BYTES
    except (OSError, KeyError):
        return False


def _resident_bytes(field: str) -> int:
    values = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines() if ":" in line)
    return int(values[field].split()[0]) * 1024
