"""Which split a table's rows are in where no column says so, and in which order they are stored.

Rows lie train first, then val, then test, each dealt by a hash of its line: any run of shards is
then a fair sample, and training on a few shards at a time is like training on a full shuffle.
"""

from dataclasses import dataclass

import numpy as np

from shards.errors import WrongSetting
from shards.spec import SPLITS

IN_ORDER = ("train", "val", "test")
USUAL_SHARES = (0.8, 0.1, 0.1)
FEWEST_PLACES = 3  # that can be dealt to three splits


def splitmix64(numbers: np.ndarray) -> np.ndarray:
    """[N] whole numbers -> uint64 that look random, the same everywhere; no two are equal."""
    mixed = numbers.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return mixed


def dealt_order(split: np.ndarray) -> np.ndarray:
    """[N] the line of each row of the set. split: [N] of the lines, numbers of SPLITS."""
    rank_of_split = np.array([IN_ORDER.index(name) for name in SPLITS], np.uint8)
    hashes = splitmix64(np.arange(len(split)))
    lines = np.lexsort((hashes, rank_of_split[split]))
    return lines.astype(np.uint32)


@dataclass(frozen=True, kw_only=True)
class SplitRule:
    """by: "scene", "row", or a column. shares: of the rows in train, val and test."""

    by: str
    shares: tuple[float, float, float] = USUAL_SHARES

    @classmethod
    def parse(cls, text: str) -> "SplitRule":
        """`scene`, `scene:0.8,0.1,0.1`. Raises WrongSetting."""
        by, colon, listed = text.partition(":")
        if not colon:
            return cls(by=by)
        try:
            train, val, test = (float(share) for share in listed.split(","))
        except ValueError:
            raise WrongSetting("split_by", text, "give three shares, train,val,test") from None
        is_share = 0 < train <= 1 and 0 <= val <= 1 and 0 <= test <= 1
        if not is_share or abs(train + val + test - 1) > 1e-6:
            raise WrongSetting("split_by", text, "give shares that add up to 1, some for train")
        return cls(by=by, shares=(train, val, test))

    def __str__(self) -> str:
        listed = ",".join(f"{share:g}" for share in self.shares)
        return self.by if self.shares == USUAL_SHARES else f"{self.by}:{listed}"

    def of_rows(self, n_rows: int) -> np.ndarray:
        """[N] |u1: rows dealt one by one."""
        return self.of_groups(np.arange(n_rows))

    def of_groups(self, groups: np.ndarray) -> np.ndarray:
        """[N] |u1: rows of one group are in one split. groups: [N] whole numbers from 0.

        Groups come in the order of a hash of their numbers; a split takes them until it has its
        share of rows. Where there are groups enough, each split with a share gets one.
        """
        sizes = np.bincount(groups)
        dealt = np.argsort(splitmix64(np.arange(len(sizes))), kind="stable")
        n_before = np.cumsum(sizes[dealt]) - sizes[dealt]
        bounds = np.cumsum(self.shares[:-1]) * len(groups)
        middle = n_before + sizes[dealt] / 2  # a group goes where its middle row does
        place = np.searchsorted(bounds, middle, side="right")
        self._give_each_a_group(place)
        numbers = np.array([SPLITS.index(name) for name in IN_ORDER], np.uint8)
        split_of_group = np.empty(len(sizes), np.uint8)
        split_of_group[dealt] = numbers[place]
        return split_of_group[groups]

    def _give_each_a_group(self, place: np.ndarray) -> None:
        """Of few large groups the last ones go to the splits that would have none."""
        wanted = [k for k, share in enumerate(self.shares) if share > 0]
        if len(place) < len(wanted):
            return
        for k in wanted:
            if not np.any(place == k):
                ranks = np.array([wanted.index(each) for each in wanted])
                place[-len(wanted) :] = np.array(wanted)[ranks]
                return
