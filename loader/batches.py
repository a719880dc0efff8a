"""One batch: which rows it is of, by a plan, and how it is made in a buffer.

BatchOrder    epoch -> the row numbers of each of its batches: the user's
plan_from     the requests from a position on, epoch after epoch
BatchMaker    a request -> what the dataset wrote, or a transform made, in a buffer
"""

import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from loader.buffers import (
    arrays_in,
    n_bytes_of,
    private_memory,
)
from loader.disk import disk_use
from loader.forks import ProcessLock, use_one_thread_in_a_fork
from loader.messages import (
    Layout,
    Message,
    Raised,
    Returned,
    Written,
    add_note,
)

# Room for what a transform makes of each number; a page of it exists once it is written.
BYTES_PER_VALUE = 16
N_TIMED = 5  # batches made to see how long one takes
NUMPY_HAS = {
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16,
    torch.float32, torch.float64, torch.complex64, torch.complex128,
    torch.uint16, torch.uint32, torch.uint64,
}  # fmt: skip
DRAWS = ProcessLock()  # whoever draws from the seeds of a batch: they are the whole process's

# epoch -> the row numbers of each of its batches. It may have `is_at(epoch, step) -> None` too: it
# is told which batch is delivered next, before the first is made and after each.
BatchOrder = Callable[[int], Sequence[np.ndarray]]
Transform = Callable[[tuple[Tensor, ...]], Any]


class RowDataset(Protocol):
    """What a loader needs of a dataset. Workers that are not forked get it pickled."""

    def batch(self, indices: np.ndarray) -> Any:
        """These rows in new memory.

        indices: [B] row numbers, as the order names them.

        Returns a tuple of tensors; anything else is delivered as it is, without a buffer.
        """

    def fill(self, buffer: memoryview, indices: np.ndarray) -> Layout | None:
        """Write the same into `buffer` (bytes; see `buffers.arrays_in`).

        Returns how it lies there, [(dtype, shape), ...]; or None, and `batch` is asked.
        """

    # It may have `read_ahead(indices) -> None` too: begin to read these rows, and return. It is
    # called before `batch` or `fill` is, for as long as rows come from a disk; see loader.ahead.


# ---------------------------------------------------------------- the plan


@dataclass(frozen=True, kw_only=True, slots=True)
class Position:
    """A place in the endless order of batches."""

    epoch: int
    step: int


@dataclass(frozen=True, kw_only=True)
class BatchRequest:
    """A batch to make; `indices` are the row numbers [B].

    ahead: those of later batches, whose reading begins now; None: nothing has to be read ahead.
    """

    epoch: int
    step: int
    indices: np.ndarray
    ahead: Sequence[np.ndarray] | None = None

    @property
    def n_bytes(self) -> int:
        """Of all row numbers."""
        return self.indices.nbytes + sum(later.nbytes for later in self.ahead or ())


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedBatch:
    """A request, and the position after it."""

    request: BatchRequest
    position_after: Position


@dataclass(frozen=True, kw_only=True, slots=True)
class Delivery:
    """A batch, or what was raised instead.

    position_after: where it goes on; None where that is not known, as the plan has ended.
    """

    result: Returned | Raised
    position_after: Position | None


Plan = Iterator[PlannedBatch]


def batches_of(order: BatchOrder, epoch: int) -> Sequence[np.ndarray]:
    """What the order says; TypeError where that cannot be asked for its length and its parts."""
    rows_of_batches = order(epoch)
    is_sequence = hasattr(rows_of_batches, "__len__") and hasattr(rows_of_batches, "__getitem__")
    if not is_sequence:
        kind = type(rows_of_batches).__name__
        text = f"batches({epoch}) returned a {kind}"
        raise TypeError(f"{text}: it returns a list of the row numbers of each batch")
    return rows_of_batches


def plan_from(order: BatchOrder, position: Position) -> Plan:
    """All batches from there on, epoch after epoch; ends before an epoch that has none."""
    epoch = position.epoch
    first_step = position.step
    while True:
        rows_of_batches = batches_of(order, epoch)
        n_batches = len(rows_of_batches)
        if not n_batches:
            return
        for step in range(first_step, n_batches):
            if step + 1 < n_batches:
                position_after = Position(epoch=epoch, step=step + 1)
            else:
                position_after = Position(epoch=epoch + 1, step=0)
            request = BatchRequest(epoch=epoch, step=step, indices=rows_of_batches[step])
            yield PlannedBatch(request=request, position_after=position_after)
        epoch += 1
        first_step = 0


def end_of_plan(error: BaseException) -> Delivery:
    """What ended the plan, raised by the user's order; StopIteration where it only ran out."""
    if isinstance(error, StopIteration):
        text = "batches(epoch) gave more batches when it was asked first than it does now"
        return Delivery(result=Raised(RuntimeError(text)), position_after=None)
    return Delivery(result=Raised(error), position_after=None)


# ---------------------------------------------------------------- one batch


@dataclass(frozen=True, kw_only=True)
class BufferNeed:
    """Bytes of a buffer: what a batch will use of it, and the room to reserve."""

    used_bytes: int
    reserved_bytes: int


@dataclass(frozen=True, kw_only=True)
class BatchMaker:
    """Makes one batch in a buffer. Every worker has a copy.

    transform: batch -> batch, or None: what the dataset writes is delivered.
    seed: of what a transform draws, with epoch and step.
    """

    dataset: RowDataset
    transform: Transform | None
    seed: int

    def make(self, buffer: memoryview, request: BatchRequest) -> Message:
        """What became of the batch; it raises nothing."""
        use_one_thread_in_a_fork()
        before = disk_use()
        made = self._made(buffer, request)
        return made if disk_use() == before else replace(made, was_read=True)

    def _made(self, buffer: memoryview, request: BatchRequest) -> Message:
        try:
            self._ask_ahead(request)
            if self.transform is None:
                return self._filled(buffer, request.indices)
            # The same draws wherever the batch is made.
            with _seeded(self.seed, request.epoch, request.step):
                return _stored(self.transform(self.dataset.batch(request.indices)), buffer)
        except Exception as error:
            self._note_rows(error, request)
            return Raised(error)
        except BaseException as error:
            return Raised(error)

    def _ask_ahead(self, request: BatchRequest) -> None:
        """This batch once more: of what was asked for earlier, some may have been dropped."""
        if request.ahead is None or not can_read_ahead(self.dataset):
            return
        for indices in (request.indices, *request.ahead):
            with suppress(Exception):  # of rows that do not exist: raised when they are made
                self.dataset.read_ahead(indices)  # type: ignore[attr-defined]

    def buffer_need(self, n_rows: int) -> BufferNeed:
        """Of a batch of so many rows, judged by the dataset's first row."""
        use_one_thread_in_a_fork()
        first = BatchRequest(epoch=0, step=0, indices=np.zeros(1, np.int64), ahead=())
        self._ask_ahead(first)  # a first touch would read around that row
        made = self.dataset.batch(first.indices)
        row = [part for part in made if _is_plain(part)] if type(made) is tuple else []
        used_bytes = n_rows * sum(part.nbytes for part in row)
        if self.transform is None:
            return BufferNeed(used_bytes=used_bytes, reserved_bytes=used_bytes)
        n_values = n_rows * sum(part.numel() for part in row)
        return BufferNeed(used_bytes=used_bytes, reserved_bytes=n_values * BYTES_PER_VALUE)

    def seconds(self, n_rows: int) -> float:
        """What the first `n_rows` take to make: the least of five, as the first touches what is
        cold. Raises what is no Exception: Ctrl-C."""
        buffer = private_memory(self.buffer_need(n_rows).used_bytes)
        request = BatchRequest(epoch=0, step=0, indices=np.arange(n_rows), ahead=())
        seconds = []
        for _ in range(N_TIMED):
            started = time.perf_counter()
            made = self.make(buffer, request)
            if isinstance(made, Raised) and not isinstance(made.error, Exception):
                raise made.error
            seconds.append(time.perf_counter() - started)
        return min(seconds)

    def _filled(self, buffer: memoryview, indices: np.ndarray) -> Message:
        layout = self.dataset.fill(buffer, indices)
        if layout is None:
            return _stored(self.dataset.batch(indices), buffer)
        return Written(self._checked(layout))

    def _checked(self, layout: Any) -> Layout:
        if type(layout) is list and all(type(part) is tuple and len(part) == 2 for part in layout):
            return layout
        raise TypeError(
            f"{type(self.dataset).__name__}.fill() returned a {type(layout).__name__}: it returns "
            "the layout of what it wrote, a list of (dtype, shape), or None, and then batch() is "
            "asked"
        )

    def _note_rows(self, error: Exception, request: BatchRequest) -> None:
        with suppress(Exception):  # of the dataset's __repr__
            rows = ", ".join(map(str, np.asarray(request.indices).tolist()))
            place = f"epoch {request.epoch}, step {request.step}, rows {rows} of {self.dataset!r}"
            add_note(error, f"in the loader, {place}")


def can_read_ahead(dataset: RowDataset) -> bool:
    """Whether it can be told which rows come."""
    return callable(getattr(dataset, "read_ahead", None))


def _stored(made: Any, buffer: memoryview) -> Written | Returned:
    """A tuple of plain tensors goes into `buffer`, contiguous; what is no such tuple, or too large,
    stays as it is."""
    if type(made) is not tuple or not all(map(_is_plain, made)):
        return Returned(made)
    sources = [part.numpy() for part in made]
    layout: Layout = [(source.dtype, source.shape) for source in sources]
    if n_bytes_of(layout) > len(buffer):
        return Returned(made)
    for target, source in zip(arrays_in(buffer, layout), sources, strict=True):
        target[...] = source
    return Written(layout)


def _is_plain(part: Any) -> bool:
    """Nothing is lost where its numbers are copied by numpy."""
    if type(part) is not Tensor or not part.is_cpu or part.layout != torch.strided:
        return False
    if part.dtype not in NUMPY_HAS or part.is_nested or part.requires_grad:
        return False
    return not (part.is_conj() or part.is_neg() or part.__dict__)


@contextmanager
def _seeded(*parts: int) -> Iterator[None]:
    """Torch, numpy and random draw from these numbers, and go on from where they were afterwards.

    They draw through their global states, as that is what a user's transform may draw from.
    """
    seed = int(np.random.SeedSequence(parts).generate_state(1)[0])
    with DRAWS.held():
        numpy_state = np.random.get_state()  # noqa: NPY002 (see above)
        python_state = random.getstate()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            np.random.seed(seed)  # noqa: NPY002
            random.seed(seed)
            try:
                yield
            finally:
                np.random.set_state(numpy_state)  # noqa: NPY002
                random.setstate(python_state)
