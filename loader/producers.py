"""Who makes the batches: the caller, one thread, or (loader.workers) processes.

A producer is given a plan (which rows make which batch, from a position on) by `seek`, and then
delivers one batch of it a `next`. Each has a `BatchMaker` make each batch in a buffer of a
`BufferPool`, so that a batch is the same whoever makes it.
"""

import threading
import weakref
from abc import ABC, abstractmethod
from dataclasses import dataclass
from queue import SimpleQueue

from loader.ahead import ReadAhead
from loader.batches import (
    BatchMaker,
    Delivery,
    Plan,
    end_of_plan,
)
from loader.buffers import (
    BufferPool,
)
from loader.forks import HOLDERS, use_one_thread_in_a_fork
from loader.threads import use_one_thread_here


class Producer(ABC):
    """Delivers the batches of a plan, in its order."""

    pool: BufferPool

    @abstractmethod
    def seek(self, plan: Plan) -> None:
        """Go on with this plan; what was made ahead for another is dropped."""

    @abstractmethod
    def next(self) -> Delivery:
        """The next batch. Raises RuntimeError where whoever should make it is gone."""

    @abstractmethod
    def close(self) -> None:
        """End whatever runs. A thread begins again with the next `seek`, processes do not."""

    @abstractmethod
    def forget(self) -> None:
        """In a forked child: what runs is the parent's, and nothing of it is ended here."""


class InlineProducer(Producer):
    """The caller makes a batch when it asks."""

    def __init__(self, maker: BatchMaker, pool: BufferPool, read_ahead: ReadAhead) -> None:
        self.maker = maker
        self.pool = pool
        self.read_ahead = read_ahead
        self._plan: Plan = iter(())

    def seek(self, plan: Plan) -> None:
        self._plan = self.read_ahead.plan(plan)

    def next(self) -> Delivery:
        try:
            planned = next(self._plan)
        except Exception as error:  # of the user's order
            return end_of_plan(error)
        buffer_id = self.pool.take()
        made = self.maker.make(self.pool.buffers[buffer_id], planned.request)
        self.read_ahead.learn(made.was_read)
        result = self.pool.deliver(buffer_id, made)
        return Delivery(result=result, position_after=planned.position_after)

    def close(self) -> None:
        """Nothing runs."""

    def forget(self) -> None:
        """Nothing is the parent's."""


class ThreadProducer(Producer):
    """A thread that does all there is to do for a batch: the user takes it out of a queue.

    A batch is lent out when the user comes for the one before it: what was had before that is back
    by then, or is kept for good. Python's lock is asked for once a batch, after the copy.
    """

    def __init__(self, maker: BatchMaker, pool: BufferPool, read_ahead: ReadAhead) -> None:
        self.maker = maker
        self.pool = pool
        self.read_ahead = read_ahead
        self._turns = SimpleQueue[bool]()
        self._ready = SimpleQueue[Delivery]()
        self._end: weakref.finalize | None = None  # of the thread that runs
        HOLDERS.add(self)

    def seek(self, plan: Plan) -> None:
        self.close()
        self._turns = SimpleQueue()
        self._ready = SimpleQueue()
        run = ThreadRun(
            maker=self.maker,
            pool=self.pool,
            read_ahead=self.read_ahead,
            plan=self.read_ahead.plan(plan),
            turns=self._turns,
            ready=self._ready,
        )
        thread = LoaderThread(target=run.work, name="loader", daemon=True)

        use_one_thread_in_a_fork()
        thread.start()
        self._end = weakref.finalize(self, _end_thread, self._turns, thread)

    def next(self) -> Delivery:
        self._turns.put(True)
        return self._ready.get()

    def close(self) -> None:
        if self._end is not None:
            self._end()

    def forget(self) -> None:
        if self._end is not None:
            self._end.detach()


@dataclass(frozen=True, kw_only=True)
class ThreadRun:
    """What the thread of a producer works with; the producer itself it never sees, else that would
    live as long as the thread.

    turns: True for each batch that may be lent out, False to end.
    """

    maker: BatchMaker
    pool: BufferPool
    read_ahead: ReadAhead
    plan: Plan
    turns: SimpleQueue[bool]
    ready: SimpleQueue[Delivery]

    def work(self) -> None:
        use_one_thread_here()  # the training step needs the other cores
        self.turns.put(True)  # the first batch is lent out at once
        try:
            for planned in self.plan:
                buffer_id = self.pool.take()
                made = self.maker.make(self.pool.buffers[buffer_id], planned.request)
                self.read_ahead.learn(made.was_read)
                if not self.turns.get():
                    self.pool.put_back(buffer_id)
                    return
                # In one expression: a local would hold the batch while the next is being made.
                self.ready.put(
                    Delivery(
                        result=self.pool.deliver(buffer_id, made),
                        position_after=planned.position_after,
                    )
                )
            end: BaseException = StopIteration()
        except BaseException as error:  # by the user's order
            end = error
        self.ready.put(end_of_plan(end))


class LoaderThread(threading.Thread):
    """is_to_end: whoever waits in it for something from far away gives up."""

    is_to_end = False


def _end_thread(turns: SimpleQueue[bool], thread: LoaderThread) -> None:
    """At exit too: a thread that comes back from torch to an interpreter that is gone takes the
    process down."""
    thread.is_to_end = True
    turns.put(False)
    if thread is not threading.current_thread():
        thread.join()
