"""How a set larger than the disk is read: which order, how many shards in play, how many ahead.

Two orders are read at the same time, that of the train rows and that of the rows to score on; each
has a share of the cache's limit. Sizes are of the files of those fields that are read, b the
largest shard:

    whole    all that is read fits: nothing is ever removed, and train rows are shuffled all
             together
    wheel    scored rows   what they take, a quarter of the limit at most; less where the train
                           rows would not have what they need
             train rows    the rest: N = rest / b shards, of which
                 A = what the next batches can reach, and a share of N    on their way, ahead
                 W = the others, 64 at most                               in play

The share is half where rows were dealt to shards at random: any W mixes them well, and the first W
of the next epoch have room beside the last of this one. Else it is a quarter.
"""

import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shards.errors import WrongSetting
from shards.files import LocalFolder
from shards.progress import megabytes
from train.errors import CacheHasNoRoom, CacheTooSmall

# Batches that may be asked for at the same time: what the loader holds, and what one rank may be
# ahead of another.
REACH = 6
MOST_IN_PLAY = 64
FEWEST_IN_PLAY = 2
SHARE_OF_SCORED = 1 / 4  # of the limit
SHARE_AHEAD = 1 / 4  # of the train rows' shards
SHARE_AHEAD_OF_DEALT = 1 / 2
SHARE_OF_DISK = 0.9  # of what is free, where no limit is named
GB = 10**9
AUTO = "auto"
FULL = "full"
WHEEL = "wheel"
SHUFFLE = re.compile(r"(?P<name>auto|full|wheel)((?<=wheel):(?P<in_play>[1-9][0-9]{0,5}))?")


@dataclass(frozen=True, kw_only=True, eq=False)
class ReadShards:
    """The shards that an order reads. numbers: [S] of the set's, in row order. rows: [S] how many
    of its rows lie in each. n_bytes: [S] of the files. n_rows_of_batch: of all ranks. are_dealt:
    whether rows were dealt to shards at random.
    """

    numbers: np.ndarray
    rows: np.ndarray
    n_bytes: np.ndarray
    n_rows_of_batch: int
    are_dealt: bool = False

    @property
    def total_bytes(self) -> int:
        return int(self.n_bytes.sum())

    @property
    def largest_bytes(self) -> int:
        return int(self.n_bytes.max(initial=1))

    @property
    def n_in_reach(self) -> int:
        """How many shards the batches that may be asked for at once can lie in, beyond those in
        play: shards that come one after the other.
        """
        n_rows = REACH * self.n_rows_of_batch
        return min(len(self.rows), int(np.ceil(n_rows / max(1.0, float(self.rows.mean())))) + 1)


@dataclass(frozen=True, kw_only=True)
class Room:
    """What was worked out. in_play: of the wheel; 0: rows are shuffled all together.

    train_bytes, scored_bytes: what each order may keep. kept_bytes: of both, what both read once.
    removes: whether shards have to go. why: for who reads the log.
    """

    in_play: int
    train_bytes: int
    scored_bytes: int
    kept_bytes: int
    removes: bool
    why: str

    @property
    def shuffle(self) -> str:
        """As a setting."""
        return f"{WHEEL}:{self.in_play}" if self.in_play else FULL


def shuffle_of(value: Any) -> tuple[str, int]:
    """ "wheel:16" -> ("wheel", 16); 0 where no number is said. True and None are "auto", as of
    torch's loaders. Raises WrongSetting.
    """
    if value is True or value is None:
        return AUTO, 0
    if not isinstance(value, str):
        what = (
            "the train rows are shuffled in every epoch, those of the second loader never. Choose "
            "auto, full or wheel; for an order of your own loader.loader.Loader(dataset, batches)"
        )
        raise WrongSetting("shuffle", repr(value), what)
    found = SHUFFLE.fullmatch(value)
    if not found:
        raise WrongSetting("shuffle", repr(value), "choose auto, full, wheel or wheel:N")
    return found["name"], int(found["in_play"] or 0)


def shuffle_named(value: Any) -> str:
    """The same as one text. Raises WrongSetting."""
    name, in_play = shuffle_of(value)
    return f"{name}:{in_play}" if in_play else name


def limit_bytes_of(limit_gb: float) -> int:
    """A limit as a setting, in bytes: to the byte what it was made from."""
    return round(limit_gb * GB)


def limit_of_disk(root: Path, folders: list[Path]) -> int:
    """Bytes of shards that the cache's disk has room for: what is free, and what is there."""
    return int(SHARE_OF_DISK * _room_on_disk(root, folders))


def check_disk(root: Path, folders: list[Path], n_bytes: int) -> None:
    """Raise CacheHasNoRoom where the cache's disk does not hold what will be kept there."""
    has_bytes = _room_on_disk(root, folders)
    if has_bytes < n_bytes:
        raise CacheHasNoRoom(root, n_bytes, has_bytes)


def _room_on_disk(root: Path, folders: list[Path]) -> int:
    here = sum(sum((LocalFolder(path).sizes() or {}).values()) for path in folders)
    return shutil.disk_usage(root).free + here


def make_room(train: ReadShards, scored: ReadShards, shuffle: str, limit_bytes: int) -> Room:
    """See the module. Raises CacheTooSmall, with the sum."""
    name, in_play = shuffle_of(shuffle)
    all_bytes = _bytes_of_both(train, scored)
    sizes = f"{megabytes(all_bytes)} are read, the cache may hold {megabytes(limit_bytes)}"
    if all_bytes > limit_bytes:
        if name == FULL:
            what = f"rows that are shuffled all together need all {megabytes(all_bytes)} there"
            raise CacheTooSmall(what, all_bytes, limit_bytes)
        return _room_in_part(train, scored, in_play, limit_bytes, sizes)
    if name == WHEEL and not in_play:
        in_play = min(MOST_IN_PLAY, len(train.numbers))
    return Room(
        in_play=in_play,
        train_bytes=train.total_bytes,
        scored_bytes=scored.total_bytes,
        kept_bytes=all_bytes,
        removes=False,
        why=sizes,
    )


def _room_in_part(
    train: ReadShards, scored: ReadShards, in_play: int, limit_bytes: int, why: str
) -> Room:
    """in_play: 0: as many as there is room for."""
    fewest = min(in_play or FEWEST_IN_PLAY, len(train.numbers))
    train_at_once = _bytes_at_once(train, fewest)
    scored_at_once = _bytes_at_once(scored, 1)
    if limit_bytes < train_at_once + scored_at_once:
        raise _too_small(train, scored, fewest, limit_bytes)

    share = min(scored.total_bytes, int(limit_bytes * SHARE_OF_SCORED))
    scored_bytes = max(scored_at_once, min(share, limit_bytes - train_at_once))
    train_bytes = limit_bytes - scored_bytes
    if not in_play:
        n_shards = train_bytes // train.largest_bytes
        share_ahead = SHARE_AHEAD_OF_DEALT if train.are_dealt else SHARE_AHEAD
        n_ahead = max(train.n_in_reach, int(n_shards * share_ahead))
        most = min(MOST_IN_PLAY, n_shards - n_ahead, len(train.numbers))
        in_play = max(fewest, most)
    return Room(
        in_play=in_play,
        train_bytes=train_bytes,
        scored_bytes=scored_bytes,
        kept_bytes=limit_bytes,
        removes=True,
        why=why,
    )


def _bytes_at_once(read: ReadShards, in_play: int) -> int:
    """Of so many shards in play and those that the next batches reach."""
    n_shards = in_play + read.n_in_reach
    return min(read.total_bytes, n_shards * read.largest_bytes)


def _too_small(
    train: ReadShards, scored: ReadShards, in_play: int, limit_bytes: int
) -> CacheTooSmall:
    train_bytes = _bytes_at_once(train, in_play)
    scored_bytes = _bytes_at_once(scored, 1)
    needed = train_bytes + scored_bytes
    of_all = _bytes_of_both(train, scored)
    if needed >= of_all:
        what = f"of so few shards all {megabytes(of_all)} have to be there"
        return CacheTooSmall(what, of_all, limit_bytes)
    what = (
        f"{in_play} shards in play and {train.n_in_reach} that the next batches reach, of up to "
        f"{megabytes(train.largest_bytes)} each, and {megabytes(scored_bytes)} of the rows to "
        f"score on make {megabytes(needed)}"
    )
    return CacheTooSmall(what, needed, limit_bytes)


def _bytes_of_both(train: ReadShards, scored: ReadShards) -> int:
    sizes = dict(zip(train.numbers.tolist(), train.n_bytes.tolist(), strict=True))
    sizes |= dict(zip(scored.numbers.tolist(), scored.n_bytes.tolist(), strict=True))
    return sum(sizes.values())
