"""What a training program keeps in memory from one step to the next."""

from __future__ import annotations

import ctypes
import os

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # names of glibc's malloc.h


def keep_compiled_kernels() -> None:
    """Room for 256 of the kernels that a CPU compiles for one shape (bf16 products, GELU).

    They take a megabyte or more each; the libraries' own limit would fill gigabytes. To be called
    before torch is imported.
    """
    for name in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
        os.environ.setdefault(name, "256")


def keep_freed_memory() -> bool:
    """Lets glibc keep large freed blocks for the next step instead of returning them to the system.

    It returns freed blocks of 32 MB and more, and the free end of its heap; the kernel then zeroes
    their pages again. Keeping them saves up to 5 % of a step (benchmarks/results/lora_step.md).
    Thresholds that are set in the environment stay.

    Returns:
        Whether it was done (another C library has no such setting).
    """
    if any(name in os.environ for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(_MMAP_THRESHOLD, 1 << 30) and mallopt(_TRIM_THRESHOLD, 2**31 - 1))
