"""An order for sets of which only some shards are at hand: shuffled, from a few shards at a time.

The shards lie in a ring, shuffled anew each epoch. At any time W of them that follow one another
are in play; the wheel turns by one shard a slot:

    ring     s0 s1 s2 s3 s4 s5 ...       each shard's rows are shuffled, and cut into W hands
    slot 2   [h2 h1 h0]                  of s0 the third hand, of s1 the second, of s2 the first
    slot 3      [h2 h1 h0]               shuffled together: a slot, of about a shard's rows

So every row is read once, every batch mixes rows of W shards, and before a slot one shard has to
come, after it one may go. Everything is a pure function of (seed, epoch): any slot is worked out
alone, and a run is continued from two numbers, the epoch and the batch.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import numpy as np

from train.arguments import check_whole
from train.order import RowOrder, Visits, steps_per_epoch

# What a generator is seeded with besides (seed, epoch): what it is for.
FOR_DECKS = 1
FOR_SLOTS = 2


def _rng(*seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(seed))


class Wheel:
    """One epoch of it.

    shard_rows: [S] how many of the positions 0 .. n-1 lie in each shard, in their order. in_play:
    W, at most S.
    """

    def __init__(self, shard_rows: np.ndarray, in_play: int, seed: int, epoch: int) -> None:
        self.n_shards = len(shard_rows)
        self.in_play = min(in_play, self.n_shards)
        self.ring = _rng(seed, epoch).permutation(self.n_shards)
        self._shard_rows = shard_rows
        self._first_rows = np.cumsum(shard_rows) - shard_rows
        self._seed = seed
        self._epoch = epoch
        # [S + 1] where each slot begins in the epoch.
        self.starts = np.concatenate([[0], np.cumsum(self._slot_rows())])
        self._decks = Remembered(self._deck, 2 * self.in_play)
        self._slots = Remembered(self._slot, 4)

    def _slot_rows(self) -> np.ndarray:
        """[S] how many rows a slot has."""
        rows_on_ring = self._shard_rows[self.ring]
        n_rows = np.zeros(self.n_shards, np.int64)
        for hand in range(self.in_play):
            start, stop = self._bounds_of_hand(rows_on_ring, hand)
            n_rows += np.roll(stop - start, hand)
        return n_rows

    def _bounds_of_hand(self, n_rows: Any, hand: int) -> tuple[Any, Any]:
        """Where a hand begins and ends in a deck of so many rows."""
        return n_rows * hand // self.in_play, n_rows * (hand + 1) // self.in_play

    def rows(self, start: int, stop: int) -> np.ndarray:
        """The positions that come at start .. stop of the epoch, int64."""
        first = int(np.searchsorted(self.starts, start, side="right")) - 1
        parts = []
        slot = first
        while self.starts[slot] < stop:
            begin = int(self.starts[slot])
            parts.append(self._slots[slot][max(0, start - begin) : stop - begin])
            slot += 1
        return np.concatenate(parts)

    def _slot(self, number: int) -> np.ndarray:
        """The positions of a slot, shuffled."""
        hands = []
        for hand in range(self.in_play):
            shard = int(self.ring[(number - hand) % self.n_shards])
            start, stop = self._bounds_of_hand(int(self._shard_rows[shard]), hand)
            hands.append(self._decks[shard][start:stop])
        dealt = np.concatenate(hands)
        return _rng(self._seed, self._epoch, FOR_SLOTS, number).permutation(dealt)

    def _deck(self, shard: int) -> np.ndarray:
        """The positions of a shard, shuffled."""
        shuffled = _rng(self._seed, self._epoch, FOR_DECKS, shard).permutation(
            int(self._shard_rows[shard])
        )
        return shuffled + int(self._first_rows[shard])

    def visits_in_slots(self) -> Visits:
        """In which slots each shard is in play; the last W - 1 of the ring are so at both ends."""
        numbers = np.arange(self.n_shards + self.in_play - 1)
        return Visits(
            shards=self.ring[(numbers - (self.in_play - 1)) % self.n_shards],
            first=np.maximum(numbers - (self.in_play - 1), 0),
            last=np.minimum(numbers, self.n_shards - 1),
        )


T = TypeVar("T")


class Remembered(Generic[T]):
    """What a function gave for the last few numbers that it was asked about."""

    def __init__(self, made: Callable[[int], T], most: int) -> None:
        self._made = made
        self._most = most
        self._known = OrderedDict[int, T]()

    def __getitem__(self, number: int) -> T:
        found = self._known.get(number)
        if found is None:  # threads that come at once may each make it: it is the same
            found = self._known[number] = self._made(number)
            while len(self._known) > self._most:
                self._known.popitem(last=False)
        return found


@dataclass(frozen=True, eq=False)
class WheelBatches(RowOrder):
    """A rank's batches of the wheel's order; a remainder is left out.

    shard_rows: see Wheel. in_play: W.
    """

    shard_rows: np.ndarray
    in_play: int
    batch_size: int
    seed: int
    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        """Raises UserError."""
        check_whole("in_play", self.in_play, 1, 2**31)
        check_whole("batch_size", self.batch_size, 1, 2**62)
        check_whole("world", self.world, 1, 2**31)
        check_whole("rank", self.rank, 0, self.world - 1)
        check_whole("seed", self.seed, 0, 2**64 - 1)

    @property
    def n_rows(self) -> int:
        return int(np.sum(self.shard_rows))

    def __call__(self, epoch: int) -> Sequence[np.ndarray]:
        """The positions of each batch, worked out when it is asked for."""
        wheel = Wheel(self.shard_rows, self.in_play, self.seed, epoch)
        n_steps = steps_per_epoch(self.n_rows, self.batch_size, self.world)
        return WheelEpoch(wheel, n_steps, self._rows_of_rank, self.rank, self.world)

    @property
    def _rows_of_rank(self) -> int:
        """Of a batch."""
        return min(self.batch_size, self.n_rows // self.world)

    @property
    def drop_last(self) -> bool:
        """Rows that fill no whole batch of all ranks are left out."""
        return True

    def of_all_ranks(self) -> "WheelBatches":
        return replace(self, batch_size=self._rows_of_rank * self.world, rank=0, world=1)

    def visits(self, epoch: int, shard_rows: np.ndarray | None = None) -> Visits:
        """When the shards are read; of which `shard_rows` was told already."""
        wheel = Wheel(self.shard_rows, self.in_play, self.seed, epoch)
        in_slots = wheel.visits_in_slots()
        n_rows = self._rows_of_rank * self.world  # of a batch of all ranks
        n_steps = steps_per_epoch(self.n_rows, self.batch_size, self.world)
        first = wheel.starts[in_slots.first] // n_rows
        last = (wheel.starts[in_slots.last + 1] - 1) // n_rows
        is_read = first < n_steps  # else it is of the remainder
        return Visits(
            shards=in_slots.shards[is_read],
            first=first[is_read],
            last=np.minimum(last[is_read], n_steps - 1),
        )


class WheelEpoch(Sequence[np.ndarray]):
    """The batches of one rank and epoch."""

    def __init__(self, wheel: Wheel, n_steps: int, n_rows: int, rank: int, world: int) -> None:
        """n_rows: of a batch of this rank."""
        self._wheel = wheel
        self._n_steps = n_steps
        self._n_rows = n_rows
        self._rank = rank
        self._world = world

    def __len__(self) -> int:
        return self._n_steps

    def __getitem__(self, step: Any) -> Any:
        """Positions [B], ascending. A slice gives a list. Raises IndexError."""
        if isinstance(step, slice):
            return [self[k] for k in range(*step.indices(self._n_steps))]
        number = range(self._n_steps)[step]
        start = (number * self._world + self._rank) * self._n_rows
        return np.sort(self._wheel.rows(start, start + self._n_rows))
