"""What nobody can undercut: C's memcpy of the same rows into memory that is used again."""

import ctypes
from collections.abc import Sequence

import numpy as np

from bench.peers.rows import Rows


class Memcpy:
    """An epoch's rows copied one by one, by one thread, into one batch buffer or several in turn.

    Addresses are worked out before. Buffers that lie in a cache are faster than those that do not:
    with as many as a loader holds, the copy meets what the loader meets.
    """

    def __init__(self, rows: Rows, batches: Sequence[np.ndarray], n_buffers: int) -> None:
        most = max(map(len, batches))
        self._rows = rows  # the addresses live as long as the maps and the buffers
        self.buffers = [np.zeros(most * rows.row_bytes, np.uint8) for _ in range(n_buffers)]
        self._copies: list[tuple[int, int, int]] = []
        for k, numbers in enumerate(batches):
            self._plan(numbers, self.buffers[k % n_buffers].ctypes.data)
        self._n_rows = sum(map(len, batches))
        self._memmove = ctypes.PyDLL(None).memmove
        self._memmove.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
        self._memmove.restype = None

    def _plan(self, numbers: np.ndarray, target: int) -> None:
        """memcpy's arguments for a batch: all pictures, then all depths."""
        found = [self._rows[number] for number in numbers.tolist()]
        for arrays in ([row.rgb for row in found], [row.depth for row in found]):
            for array in arrays:
                self._copies.append((target, array.ctypes.data, array.nbytes))
                target += array.nbytes

    def __call__(self) -> int:
        """Copy an epoch; its number of rows."""
        memmove = self._memmove
        for copy in self._copies:
            memmove(*copy)
        return self._n_rows
