"""Process-wide settings that make torch on the CPU faster; the command line applies them."""

from __future__ import annotations

import ctypes
import sys

__all__ = ["freed_memory", "keep_freed_memory"]

# malloc.h
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3


def keep_freed_memory() -> None:
    """Ask glibc to reuse freed memory instead of returning it to the kernel.

    A chain allocates the same activations at every step; by default each returns to the
    kernel and is faulted in again, a fifth to a quarter of a step's time. Costs: the
    process keeps its peak memory until it ends. Does nothing where there is no glibc.
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # musl has no mallopt
        return
    # glibc before 2.35 refuses a threshold above 32 MiB
    mallopt(M_MMAP_THRESHOLD, 1 << 30) or mallopt(M_MMAP_THRESHOLD, 32 << 20)
    mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)
    mallopt(M_TOP_PAD, 64 << 20)


class _MallInfo(ctypes.Structure):
    """`struct mallinfo2` of malloc.h."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd",
            "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
        )
    ]  # fmt: skip


def freed_memory() -> int:
    """Bytes that this process holds but no longer uses, which its next allocations take first.

    0 where the C library does not tell (glibc does, from 2.33 on).
    """
    if not sys.platform.startswith("linux"):
        return 0
    try:
        mallinfo = ctypes.CDLL(None).mallinfo2
    except (OSError, AttributeError):
        return 0
    mallinfo.restype = _MallInfo
    return mallinfo().fordblks
