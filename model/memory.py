"""How this process treats the memory that models free."""

import ctypes

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # of glibc's malloc.h
HEAP = 2**26  # bytes that a thread other than the first asks the kernel for at a time


def keep_freed_memory() -> None:
    """Make this process keep what it frees for what it allocates next, where its C library is glibc.

    Else the kernel takes back every freed block of 32 MiB and more, as activations at 256 px are, and clears each page
    for the next layer: a fifth of the base tokenizer's time, a tenth of a training step's. The setting is the whole
    process's, so one that is there for models asks for it, and not the model.
    https://man7.org/linux/man-pages/man3/mallopt.3.html
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 2**30)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_TOP_PAD, HEAP)  # with less an empty heap of a thread's is given back
