"""Returns memory that XLA's compiler has freed to the operating system."""

import ctypes
import gc
import sys


def release() -> None:
    """Returns freed memory to the operating system, where the C library can (glibc); elsewhere it does nothing.

    A compiler allocates many small blocks. glibc keeps their pages for the process: of a small network's training step
    they are more than the step itself uses.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
