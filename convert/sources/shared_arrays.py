"""Arrays in nameless memory, which helper processes map and do not copy."""

import math
import mmap
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from convert.machine import shared_memory

ALIGNMENT = 64


class SharedArrays:
    """Named arrays, read-only. A pickle of them holds their places; the memory travels as `handle`,
    a descriptor of the same number in the process that unpickles it.
    """

    def __init__(self, shapes: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
        """shapes: type and shape of each array. All are 0 until they are written."""
        self._places: dict[str, tuple[str, tuple[int, ...], int]] = {}
        n_bytes = 0
        for name, (dtype, shape) in shapes.items():
            self._places[name] = (dtype, shape, n_bytes)
            size = math.prod(shape) * np.dtype(dtype).itemsize
            n_bytes += -(-size // ALIGNMENT) * ALIGNMENT
        self.handle = shared_memory(max(1, n_bytes))
        self._arrays = self._mapped()

    def write(self, name: str, array: np.ndarray) -> None:
        """Put it in its place, where every process sees it."""
        dtype, shape, offset = self._places[name]
        assert array.shape == shape
        data = np.ascontiguousarray(array, dtype).reshape(-1).view(np.uint8).data
        while data:
            n_written = os.pwrite(self.handle, data[: 1 << 30], offset)
            data = data[n_written:]
            offset += n_written

    def _mapped(self) -> dict[str, np.ndarray]:
        memory = mmap.mmap(self.handle, 0, prot=mmap.PROT_READ)
        return {
            name: np.ndarray(shape, dtype, memory, offset)
            for name, (dtype, shape, offset) in self._places.items()
        }

    def __getitem__(self, name: str) -> np.ndarray:
        return self._arrays[name]

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_arrays"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._arrays = self._mapped()

    def close(self) -> None:
        """Arrays that are in use stay mapped."""
        os.close(self.handle)
