"""Rows of batches to come are asked for early, as long as a disk has to be waited for.

A dataset that can be told has a method `read_ahead(indices)`: it begins to read these rows and
returns. Whether that is worth a call is measured, not guessed: whoever makes a batch says whether
anything of it came from a disk (loader.disk).

    on    before batch n is made, a batch some way ahead is asked for, and n once more: a page that
          n shares with a row read long ago may have been dropped since
    off   nothing is asked for: all of it is in memory

         a batch that came from a disk
    off  ----------------------------->  on
         <-----------------------------
          some batches that did not, one after the other

It begins on, as nothing is known. A few batches are asked for in vain where all is in memory. Where
asking hides what a disk does from the count (a file system over a network may), it would be turned
off and on again all the time: each time it was off for a short while only, it stays on longer.
"""

import math
from collections import deque
from dataclasses import dataclass, replace
from itertools import islice

from loader.batches import Plan, PlannedBatch

AHEAD_BYTES = 96 << 20  # of batches whose rows were asked for and are not used yet, at most
MOST_AHEAD = 32  # batches
# Of the memory that is left: more would push out what was asked for before it is used.
SHARE_OF_ROOM = 1 / 2
WORKER_BYTES = 12 << 20  # that a forked worker comes to hold
FIRST_QUIET = 2  # batches without a disk, before it is turned off
QUIET = 8  # the same, once a disk was seen
MOST_QUIET = 512
SHORT_WHILE = 64  # batches


@dataclass(frozen=True, kw_only=True)
class Reach:
    """How many batches are wanted from the disk at the same time.

    n_ahead: how far ahead of a batch that is handed out its rows are asked for. n_wanted: batches
    that were asked for and are not made yet, at most.
    """

    n_ahead: int
    n_wanted: int


def reach(batch_bytes: int, left_bytes: int, n_makers: int) -> Reach:
    """Of batches of this size, where so much memory is left for what is read.

    n_makers: how many are made at the same time. One that makes them alone always asks for another.
    """
    most_bytes = min(AHEAD_BYTES, int(left_bytes * SHARE_OF_ROOM))
    n_wanted = min(most_bytes // max(1, batch_bytes), MOST_AHEAD)
    n_ahead = max(n_wanted - n_makers, 1 if n_makers == 1 else 0)
    return Reach(n_ahead=n_ahead, n_wanted=max(1, n_wanted))


class ReadAhead:
    """Says for each batch which later ones to ask for; belongs to who hands the batches out.

    reach: how far; None: the dataset cannot be told.
    """

    def __init__(self, reach: Reach | None) -> None:
        self._reach = reach
        self.is_on = reach is not None
        self._n_quiet = 0  # batches without a disk, one after the other
        self._n_wanted = FIRST_QUIET  # of those, before it is turned off

    def learn(self, was_read: bool) -> None:
        """Whether anything of a batch that was made came from a disk."""
        if not was_read:
            self._n_quiet += 1
            self.is_on = self.is_on and self._n_quiet < self._n_wanted
            return
        if not self.is_on and self._reach is not None:
            was_short = self._n_quiet - self._n_wanted < SHORT_WHILE
            longer = min(2 * self._n_wanted, MOST_QUIET)
            self._n_wanted = longer if was_short else QUIET
            self.is_on = True
        self._n_wanted = max(self._n_wanted, QUIET)
        self._n_quiet = 0

    @property
    def most_in_work(self) -> float:
        """How many batches may be handed out before the first of them is made."""
        return self._reach.n_wanted if self.is_on and self._reach else math.inf

    def plan(self, plan: Plan) -> Plan:
        """The same batches; each says what to ask for before it is made.

        What the user's order raises while it is asked early is raised in its turn.
        """
        upcoming = deque[PlannedBatch]()
        n_asked_for = 0  # of those upcoming
        end: Exception | None = None
        while True:
            n_ahead = self._reach.n_ahead if self.is_on and self._reach else 0
            while end is None and len(upcoming) <= n_ahead:
                try:
                    upcoming.append(next(plan))
                except Exception as error:
                    end = error
            if not upcoming:
                if end is None or isinstance(end, StopIteration):
                    return
                raise end

            planned = upcoming.popleft()
            n_asked_for = max(0, n_asked_for - 1)
            if self.is_on:
                ahead = [later.request.indices for later in islice(upcoming, n_asked_for, None)]
                n_asked_for = len(upcoming)
                planned = replace(planned, request=replace(planned.request, ahead=ahead))
            yield planned
