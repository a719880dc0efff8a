"""One thread owns HDF5: every file is opened, read and closed there, and what it gives out is no h5py object.

HDF5 takes one call at a time. h5py's own lock does not see to that in every version: `read_direct_chunk` took none
before h5py 3.16, and reads from several threads have crashed with later ones (h5py issues 2764, 2920). Beside another
thread such a call ends the process, or answers with an error that makes a right file look damaged. So nothing here
relies on that lock: what other threads want of a file they ask this thread for, and what they get are numbers, text
and arrays. Decoding, which is most of the work, needs no HDF5 at all (`convert/chunks.py`).
"""

import os
import threading
import traceback
from _thread import interrupt_main
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial, wraps
from queue import SimpleQueue
from typing import Any, ParamSpec, TypeVar

import h5py
import numpy as np

from convert.sources.chunks import ChunkIndex, Damaged, Unreadable

P = ParamSpec("P")
T = TypeVar("T")

VERSIONS = f"h5py {h5py.__version__} with HDF5 {h5py.version.hdf5_version}"
FARTHEST = 2**62  # no file has a byte there
OUR_FAULTS = (
    AssertionError,
    AttributeError,
    ImportError,
    MemoryError,
    NameError,
    NotImplementedError,
)
NOT_THE_FILES = (*OUR_FAULTS, ConnectionError)  # errors that say nothing of the file


class Hdf5Thread:
    """The thread, one for the whole process; a daemon, so that a call which hangs on a network holds up no exit.

    A fork waits until the call under way has ended, else the child would hold HDF5 half-way through it, and h5py's
    lock in the hands of a thread that the child does not have. The child gets a thread of its own.
    """

    def __init__(self) -> None:
        self._start()
        os.register_at_fork(
            before=self._wait_for_call, after_in_parent=self._go_on, after_in_child=self._start
        )

    def _start(self) -> None:
        self._in_call = threading.RLock()
        self._calls: SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = SimpleQueue()
        self._starting = threading.Lock()
        self._thread: threading.Thread | None = None
        self._was_interrupted = False

    def submit(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> "Future[T]":
        """Have it called there, after what was asked for before."""
        future: Future[T] = Future()
        self._calls.put((future, partial(function, *args, **kwargs)))
        with self._starting:
            if self._thread is None:
                self._thread = threading.Thread(target=self._serve, name="hdf5", daemon=True)
                self._thread.start()
        return future

    def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """What it returns or raises there; called at once where the caller is that thread."""
        if threading.current_thread() is self._thread:
            return function(*args, **kwargs)
        return self.submit(function, *args, **kwargs).result()

    def _serve(self) -> None:
        while True:
            future, function = self._calls.get()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                with self._in_call:
                    result = function()
            except BaseException as error:
                _let_go(error)
                future.set_exception(error)
            else:
                future.set_result(result)
            del future, function  # nothing is kept until the next call comes

    def _wait_for_call(self) -> None:
        while True:  # Ctrl-C meanwhile would let the fork go on in the middle of the call
            try:
                self._in_call.acquire()
                return
            except KeyboardInterrupt:
                self._was_interrupted = True

    def _go_on(self) -> None:
        self._in_call.release()
        if self._was_interrupted:
            self._was_interrupted = False
            threading.Timer(0, interrupt_main).start()  # what is raised in here is ignored


def _let_go(error: BaseException | None) -> None:
    """Drop what the error's tracebacks keep alive: h5py objects would be freed with it, in another thread."""
    while error:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


HDF5 = Hdf5Thread()


def in_hdf5_thread(function: Callable[P, T]) -> Callable[P, T]:
    """A function or method that may be called from any thread and runs in HDF5's."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        return HDF5.run(function, *args, **kwargs)

    return call


@contextmanager
def _reading() -> Iterator[None]:
    """Unreadable for whatever h5py raises on damaged data: nearly every type there is."""
    try:
        yield
    except (Damaged, *NOT_THE_FILES):
        raise
    except Exception as error:
        raise Unreadable(f"{VERSIONS} cannot read it ({error})") from None


class StoredDataset:
    """One dataset of an open file: plain facts, and what only HDF5 can answer. Made in HDF5's thread."""

    def __init__(self, dset: h5py.Dataset) -> None:
        plist = dset.id.get_create_plist()
        self._dset = dset
        self.dtype: np.dtype = dset.dtype
        self.shape: tuple[int, ...] = dset.shape
        self.chunks: tuple[int, ...] | None = dset.chunks
        self.fill_value = 0 if dset.fillvalue is None else dset.fillvalue
        self.filters: list[int] = [plist.get_filter(i)[0] for i in range(plist.get_nfilters())]
        self.is_elsewhere = plist.get_external_count() > 0
        self.user_block_bytes: int = dset.file.userblock_size

    @in_hdf5_thread
    def contiguous_offset(self) -> int | None:
        """Where an unchunked dataset begins; None where it has no bytes of its own."""
        with _reading():
            return self._dset.id.get_offset()  # type: ignore[no-any-return]

    @in_hdf5_thread
    def chunk_index(self, grid: tuple[int, ...]) -> ChunkIndex:
        """One pass over the file's own index (60 ms for 29,000 chunks; asking chunk by chunk takes 40 s).

        `grid`: the number of chunks along each axis. Raises Unreadable, or Damaged where it cannot be.
        """
        table = np.full((3, int(np.prod(grid))), -1, np.int64)
        infos: list[h5py.h5d.StoreInfo] = []

        def put_down() -> None:
            if not infos:
                return
            facts = np.array(
                [(info.byte_offset, info.size, info.filter_mask) for info in infos], np.uint64
            )
            if facts.max() >= FARTHEST:
                raise Damaged("a chunk lies beyond the end of any file")
            place = np.array([info.chunk_offset for info in infos]) // self.chunks
            table[:, np.ravel_multi_index(tuple(place.T), grid)] = facts.T.astype(np.int64)
            infos.clear()

        def visit(info: h5py.h5d.StoreInfo) -> None:
            infos.append(info)
            if len(infos) == 65536:
                put_down()

        with _reading():
            self._dset.id.chunk_iter(visit)
            put_down()
        return ChunkIndex(*table)

    @in_hdf5_thread
    def read(self, start: tuple[int, ...], shape: tuple[int, ...]) -> np.ndarray:
        """The block of `shape` at `start`, without what lies outside the dataset. Raises Unreadable."""
        block = tuple(slice(begin, begin + n) for begin, n in zip(start, shape, strict=True))
        with _reading():
            return self._dset[block]  # type: ignore[no-any-return]
