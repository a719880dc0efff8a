"""One thread owns HDF5: files are opened, read and closed there; no h5py object leaves it.

HDF5 takes one call at a time. h5py's own lock does not see to that in every version:
`read_direct_chunk` took none before h5py 3.16, and reads from several threads have crashed with
later ones (h5py issues 2764, 2920). Beside another thread such a call ends the process, or answers
with an error that makes a right file look damaged. So nothing here relies on that lock: what other
threads want of a file they ask this thread for, and what they get are numbers, text and arrays.
Decoding, which is most of the work, needs no HDF5 at all (`chunks.py`).
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

from convert.sources.chunk_layout import ChunkGrid, ChunkIndex, block_at
from convert.sources.errors import Damaged, Unreadable

P = ParamSpec("P")
T = TypeVar("T")

VERSIONS = f"h5py {h5py.__version__} with HDF5 {h5py.version.hdf5_version}"
FARTHEST = 2**62  # no file has a byte there
CHUNKS_AT_ONCE = 65536  # put down together while the index is read
OUR_FAULTS = (
    AssertionError,
    AttributeError,
    ImportError,
    MemoryError,
    NameError,
    NotImplementedError,
)
NOT_THE_FILES = (*OUR_FAULTS, ConnectionError)  # errors that say nothing of the file


class _Calls:
    """What a fork leaves unusable in the child: the thread is not there, locks may be held."""

    def __init__(self) -> None:
        self.queue: SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = SimpleQueue()
        self.thread: threading.Thread | None = None
        self.starting = threading.Lock()
        self.in_call = threading.RLock()
        self.was_interrupted = False


class Hdf5Thread:
    """The thread, one for the whole process; a daemon: a call that hangs holds up no exit.

    A fork waits until the call under way has ended, else the child would hold HDF5 half-way through
    it, and h5py's lock in the hands of a thread that the child does not have. The child gets a
    thread of its own.
    """

    def __init__(self) -> None:
        self._calls = _Calls()
        os.register_at_fork(
            before=self._wait_for_call,
            after_in_parent=self._go_on,
            after_in_child=self._start_anew,
        )

    def submit(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> "Future[T]":
        """Have it called there, after what was asked for before."""
        calls = self._calls
        future: Future[T] = Future()
        calls.queue.put((future, partial(function, *args, **kwargs)))
        with calls.starting:
            if calls.thread is None:
                calls.thread = threading.Thread(target=self._serve, name="hdf5", daemon=True)
                calls.thread.start()
        return future

    def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """What it returns or raises there; called at once where the caller is that thread."""
        if threading.current_thread() is self._calls.thread:
            return function(*args, **kwargs)
        return self.submit(function, *args, **kwargs).result()

    def _serve(self) -> None:
        calls = self._calls
        while True:
            future, function = calls.queue.get()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                with calls.in_call:
                    result = function()
            except BaseException as error:
                _let_go(error)
                future.set_exception(error)
            else:
                future.set_result(result)
                del result
            del future, function  # nothing is kept until the next call comes

    def _wait_for_call(self) -> None:
        while True:  # Ctrl-C meanwhile would let the fork go on in the middle of the call
            try:
                self._calls.in_call.acquire()
                return
            except KeyboardInterrupt:
                self._calls.was_interrupted = True

    def _go_on(self) -> None:
        self._calls.in_call.release()
        if self._calls.was_interrupted:
            self._calls.was_interrupted = False
            threading.Timer(0, interrupt_main).start()  # what is raised in here is ignored

    def _start_anew(self) -> None:
        self._calls = _Calls()


def _let_go(error: BaseException | None) -> None:
    """Drop what the error's tracebacks keep alive.

    h5py objects would be freed with it, in another thread.
    """
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


class _IndexTable:
    """The index of a dataset as it is told, chunk by chunk, in any order."""

    def __init__(self, grid: ChunkGrid) -> None:
        self.grid = grid
        self.waiting: list[h5py.h5d.StoreInfo] = []
        self.offset = np.full(grid.n_chunks, -1, np.int64)
        self.n_bytes = np.full(grid.n_chunks, -1, np.int64)
        self.filter_mask = np.full(grid.n_chunks, -1, np.int64)

    def add(self, info: h5py.h5d.StoreInfo) -> None:
        self.waiting.append(info)
        if len(self.waiting) == CHUNKS_AT_ONCE:
            self.put_down()

    def put_down(self) -> None:
        """Into the arrays, many chunks at once. Raises Damaged."""
        if not self.waiting:
            return
        facts = [(info.byte_offset, info.size, info.filter_mask) for info in self.waiting]
        offset, n_bytes, filter_mask = np.array(facts, np.uint64).T
        if max(offset.max(), n_bytes.max()) >= FARTHEST:
            raise Damaged("a chunk lies beyond the end of any file")

        first_elements = np.array([info.chunk_offset for info in self.waiting])
        places = first_elements // self.grid.chunk_shape
        k = np.ravel_multi_index(tuple(places.T), self.grid.n_along)
        self.offset[k] = offset
        self.n_bytes[k] = n_bytes
        self.filter_mask[k] = filter_mask
        self.waiting.clear()

    def index(self) -> ChunkIndex:
        self.put_down()
        return ChunkIndex(self.offset, self.n_bytes, self.filter_mask)


class StoredDataset:
    """One dataset of an open file: plain facts, and what only HDF5 can answer.

    Made in HDF5's thread. shape: (rows, ...). chunks: of one chunk, None where it is contiguous.
    filters: HDF5's numbers of them, in the order in which they were applied. is_elsewhere: its
    bytes lie in other files.
    """

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
        """Where an unchunked dataset begins; None where it has no bytes of its own.

        Raises Unreadable.
        """
        with _reading():
            return self._dset.id.get_offset()

    @in_hdf5_thread
    def chunk_index(self, grid: ChunkGrid) -> ChunkIndex:
        """Where the chunks lie, as HDF5 says, in one pass over the file's own index.

        It takes 60 ms for 29,000 chunks; asking chunk by chunk takes 40 s. Raises Unreadable, or
        Damaged where it cannot be.
        """
        table = _IndexTable(grid)
        with _reading():
            self._dset.id.chunk_iter(table.add)
            return table.index()

    @in_hdf5_thread
    def read(self, start: tuple[int, ...], shape: tuple[int, ...]) -> np.ndarray:
        """The block of `shape` at `start`, without what lies outside the dataset.

        Raises Unreadable.
        """
        with _reading():
            return self._dset[block_at(start, shape)]
