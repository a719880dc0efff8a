"""Rows of batches to come are asked for early, as long as a disk has to be waited for.

A dataset that can be told has a method `read_ahead(indices)`: it begins to read these rows and
returns. Whether that is worth a call is measured, not guessed: whoever makes a batch says whether
anything of it came from a disk (loader.disk).

    on    before batch n is made, batch n + N_AHEAD is asked for, and n once more: a page that n
          shares with a row read long ago may have been dropped since
    off   nothing is asked for: all of it is in memory

         a batch that came from a disk
    off  ----------------------------->  on
         <-----------------------------
          some batches that did not, one after the other

It begins on, as nothing is known. A few batches are asked for in vain where all is in memory. Where
asking hides what a disk does from the count (a file system over a network may), it would be turned
off and on again all the time: each time it was off for a short while only, it stays on longer.
"""

from collections import deque
from dataclasses import replace
from itertools import islice

from loader.batches import Plan, PlannedBatch, RowDataset

AHEAD_BYTES = 64 << 20  # of batches that are asked for and not made yet; at least one batch
MOST_AHEAD = 32  # batches
SHARE_OF_ROOM = 1 / 4  # of the memory that is left: more would push out what was asked for
FIRST_QUIET = 2  # batches without a disk, before it is turned off
QUIET = 8  # the same, once a disk was seen
MOST_QUIET = 512
SHORT_WHILE = 64  # batches


def batches_ahead(batch_bytes: int, left_bytes: int | None, n_in_work: int) -> int:
    """How many batches ahead are asked for.

    left_bytes: of memory; None: not known. n_in_work: batches that are made at the same time, whose
    rows are wanted now.
    """
    most_bytes = AHEAD_BYTES
    if left_bytes is not None:
        most_bytes = min(most_bytes, int(left_bytes * SHARE_OF_ROOM))
    n_batches = most_bytes // max(1, batch_bytes)
    return min(max(1, n_batches), MOST_AHEAD) + n_in_work - 1


class ReadAhead:
    """Says for each batch which later ones to ask for; belongs to who hands the batches out.

    n_batches: how far ahead; 0: never anything.
    """

    def __init__(self, n_batches: int) -> None:
        self.n_batches = n_batches
        self.is_on = n_batches > 0
        self._n_quiet = 0  # batches without a disk, one after the other
        self._n_wanted = FIRST_QUIET  # of those, before it is turned off

    def learn(self, was_read: bool) -> None:
        """Whether anything of a batch that was made came from a disk."""
        if not was_read:
            self._n_quiet += 1
            self.is_on = self.is_on and self._n_quiet < self._n_wanted
            return
        if not self.is_on and self.n_batches:
            was_short = self._n_quiet - self._n_wanted < SHORT_WHILE
            longer = min(2 * self._n_wanted, MOST_QUIET)
            self._n_wanted = longer if was_short else QUIET
            self.is_on = True
        self._n_wanted = max(self._n_wanted, QUIET)
        self._n_quiet = 0

    def plan(self, plan: Plan) -> Plan:
        """The same batches; each says what to ask for before it is made.

        What the user's order raises while it is asked early is raised in its turn.
        """
        upcoming = deque[PlannedBatch]()
        n_asked_for = 0  # of those upcoming
        end: Exception | None = None
        while True:
            n_wanted = 1 + self.n_batches if self.is_on else 1
            while end is None and len(upcoming) < n_wanted:
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


def can_read_ahead(dataset: RowDataset) -> bool:
    """Whether it can be told which rows come."""
    return callable(getattr(dataset, "read_ahead", None))
