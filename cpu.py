"""Set this process up for NumPy on a CPU. Import it before NumPy: a BLAS reads its settings once, as it loads.

Two settings, neither of which changes what is computed:

1. One BLAS thread. The matrices of a small model are too small to share between cores; `threads` in
   grassmann.py splits the batch instead. (A variable that is set already stays as it is.)
2. With glibc, keep freed memory. By default the space of large temporaries goes back to the system when
   they are freed, and the next step has to fault it in anew, page by page: a third of a step on one thread.
"""

import ctypes
import os
import sys

for _variable in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "BLIS_NUM_THREADS", "VECLIB_MAXIMUM_THREADS"):
    os.environ.setdefault(_variable, "1")

if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):  # musl has none
    for _option, _bytes in ((-1, (1 << 31) - 1), (-2, 1 << 26), (-3, 1 << 25)):
        ctypes.CDLL(None).mallopt(_option, _bytes)  # M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD (its maximum)


def available_cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
