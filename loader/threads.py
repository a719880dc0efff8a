"""One of torch's threads for a thread of ours; everybody else keeps theirs.

`torch.set_num_threads` is no way to say so. It is the whole process's number, and a thread takes it
over when it first runs something in parallel: by then another may stand there. In two of three runs
the thread of a loader copied on both cores, beside the training step that needed one. OpenMP itself
has a number of its own for each thread, and torch asks for that.
"""

import ctypes
import os
from functools import cache
from pathlib import Path
from typing import Any

import torch


def use_one_thread_here() -> bool:
    """From now on torch uses one thread in the thread that calls this; whether that could be said.

    Where torch is built without OpenMP nothing changes.
    """
    torch.get_num_threads()  # the process's number is taken over now, not by the first operation
    set_num_threads = _openmp()
    if set_num_threads is None:
        return False
    set_num_threads(1)
    return torch.get_num_threads() == 1


@cache
def _openmp() -> Any:
    """`omp_set_num_threads` of the OpenMP that torch was linked with: there may be several."""
    path = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        # Its own names come first, then those of what it was linked with.
        library = ctypes.CDLL(str(path), mode=os.RTLD_LAZY | os.RTLD_NOLOAD)
        set_num_threads = library.omp_set_num_threads
    except (OSError, AttributeError):  # another system, or another build
        return None
    set_num_threads.argtypes = (ctypes.c_int,)
    set_num_threads.restype = None
    return set_num_threads
