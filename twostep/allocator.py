"""What the C library does with memory that is freed."""

from __future__ import annotations

import ctypes


def keep_freed_memory() -> None:
    """Makes glibc reuse freed memory of any size. By default it returns large blocks to the kernel, and a call pays
    for the page faults of every tensor that it makes: a fused operator for its outputs, eager code for every step. For
    a process to decide, as its first act; training the miniature on two CPUs becomes a quarter faster."""
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
    except OSError:
        return  # another C library: its own policy stands
