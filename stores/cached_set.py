"""A set of which a cache holds some shards, read as a set is: by maps, as far as they are there.

A shard that a cache lets go is unmapped, so that its space on the disk is free, once nobody in this
process reads. That is the one exception to what shards/maps.py says; `CachedGather` sees to it:

    a read begins   the first of those under way: shards that have gone since are unmapped
    a read ends     nothing

Rows of shards that are not there, and will not come by themselves, are read one by one from where
the set lies.
"""

import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from types import TracebackType

import numpy as np

from shards.containers import fetch_row
from shards.dataset import ShardSet
from shards.errors import DamagedSet, StoreFailed
from shards.files import Folder, LocalFolder
from shards.gather import JoinedShards, RowGather
from shards.manifest import address, read_manifest
from shards.maps import AddressRange, FieldFiles, MappedShards, mapped_shards
from stores.cache import COMES, NOT_COMING, PASSES, SERVED, STATE, CacheState

ROWS_AT_ONCE = 8  # that are asked for at the same time
FAILED = ".failed-"  # and whose order could not be served any further
FIRST_PAUSE_S = 0.002
LONGEST_PAUSE_S = 0.05
PATIENCE_S = 30.0  # for shards that come when others are some batches on
LOOK_S = 0.5  # how often who waits looks whether it waits in vain


class NotAtHand(Exception):
    """Rows of shards that are not there and will not come by themselves."""


@dataclass(frozen=True, kw_only=True)
class CachedAddress:
    """How a cached set is opened again in another process. feed: see CachedSet."""

    path: Path
    source: Folder
    feed: int

    def opened(self) -> "CachedSet":
        return CachedSet(self.path, read_manifest(self.path), self.source, self.feed)


@dataclass(frozen=True)
class CachedSet(ShardSet):
    """See the module. path: the cache's folder. source: where the set lies.

    feed: the number of who has shards fetched for this process; 0: nobody, so that what is not
    there is not waited for.
    """

    source: Folder
    feed: int = 0

    @property
    def address(self) -> Path | str:
        return address(self.source)

    @property
    def reopened(self) -> CachedAddress:
        return CachedAddress(path=self.path, source=self.source, feed=self.feed)

    @cached_property
    def state(self) -> CacheState:
        """What of it is there."""
        return CacheState(self.path / STATE, self.n_shards)

    def maps(self, fields: Iterable[str]) -> dict[str, Sequence[np.ndarray]]:
        """The shards of several fields; who reads them uses a CachedGather. Raises MissingField."""
        named = [self.field(name) for name in fields]
        waiting = Waiting(self.path, self.state, self.feed)
        made = partial(CachedShards, waiting=waiting)
        return dict(mapped_shards(self.path, self.manifest, named, made))

    def gather(self, fields: Sequence[str]) -> RowGather:
        """What takes many rows of several fields at once."""
        return CachedGather(self, fields)

    def row(self, field: str, row: int) -> np.ndarray:
        """One row, if need be from where the set lies; no more of it is fetched."""
        shard, place = divmod(row, self.settings.rows_per_shard)
        wanted = self.manifest, self.field(field), shard, place
        try:
            return fetch_row(LocalFolder(self.path), *wanted)
        except DamagedSet:  # it is not here
            return fetch_row(self.source, *wanted)

    def are_here(self, rows: np.ndarray) -> np.ndarray:
        """[B] whether these rows [B] are, without waiting for any."""
        return self.state.is_here(rows // self.settings.rows_per_shard)


class Waiting:
    """Waits for shards that are on their way."""

    def __init__(self, path: Path, state: CacheState, feed: int) -> None:
        """path: the cache's folder."""
        self.state = state
        self._path = path
        self._feed = feed

    def wait_for(self, shards: np.ndarray) -> None:
        """Return once these shards [n] are there.

        Raises NotAtHand where they will not come, StoreFailed where fetching has failed,
        RuntimeError where nobody waits for this thread any more.
        """
        if self.state.is_here(shards).all():
            return
        if not self._feed:
            raise NotAtHand
        n_passes = int(self.state.numbers[PASSES])
        pause_s = FIRST_PAUSE_S
        parent = os.getppid()
        began_at = looked_at = time.monotonic()
        while not self._have_come(shards, n_passes, time.monotonic() - began_at > PATIENCE_S):
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
            if _is_to_end() or os.getppid() != parent:
                raise RuntimeError("a batch was waited for that nobody wants any more")
            if time.monotonic() - looked_at > LOOK_S:
                looked_at = time.monotonic()
                self._look_for_failure()

    def _have_come(self, shards: np.ndarray, n_passes: int, is_impatient: bool) -> bool:
        """n_passes: of who fetches, when it was begun to wait: one that was under way then may not
        have seen what is wanted. Raises NotAtHand.
        """
        is_served = self._feed == int(self.state.numbers[SERVED])
        was_seen = is_served and int(self.state.numbers[PASSES]) >= n_passes + 2
        coming = self.state.coming[shards].copy()
        is_here = self.state.is_here(shards)  # after it: what has come need not be coming any more
        comes = coming == COMES if is_impatient else coming != NOT_COMING
        if was_seen and not (is_here | comes).all():
            raise NotAtHand
        return bool(is_here.all())

    def _look_for_failure(self) -> None:
        try:
            text = (self._path / f"{FAILED}{self._feed}").read_text()
        except OSError:
            return
        problem, right = json.loads(text)
        raise StoreFailed(problem, right)


def _is_to_end() -> bool:
    """Whether this thread is waited for by who ends it, or Python ends."""
    is_ended = getattr(threading.current_thread(), "is_to_end", False)
    return is_ended or not threading.main_thread().is_alive()


class CachedShards(MappedShards):
    """The shards of one field that come and go."""

    def __init__(
        self, files: FieldFiles, addresses: AddressRange, first: int, *, waiting: Waiting
    ) -> None:
        super().__init__(files, addresses, first)
        self.waiting = waiting
        self._seen = np.zeros(len(files.names), np.uint32)  # state.changes when it was mapped

    def need(self, shards: np.ndarray) -> None:
        """Have these shards mapped; those on their way are waited for. Raises as `wait_for`."""
        if not self._is_mapped[shards].all():
            self.waiting.wait_for(shards)
            super().need(shards)

    def unmap_gone(self) -> None:
        """Unmap what was removed since it was mapped. Nobody may be reading."""
        is_gone = self._is_mapped & (self._seen != self.waiting.state.changes)
        if is_gone.any():
            self.unmap(np.flatnonzero(is_gone))

    def _map(self, shard: int) -> None:
        seen = self.waiting.state.changes[shard]
        try:
            super()._map(shard)
        except DamagedSet:
            if seen == self.waiting.state.changes[shard] and seen % 2:
                raise
            raise NotAtHand from None  # it was removed just now
        self._seen[shard] = seen


class CachedGather(RowGather):
    """Rows of shards that come and go: see the module."""

    def __init__(self, found: ShardSet, fields: Sequence[str]) -> None:
        """found: a cached set, or several sets of which some are."""
        shards = found.maps(fields)
        super().__init__(shards, found.settings.size)
        self._found = found
        self._cached = cached_in(shards)
        self._under_way = UnderWay(self._unmap_gone)

    def into(
        self, fields: Sequence[str], rows: np.ndarray, buffer: memoryview | None = None
    ) -> np.ndarray:
        """See RowGather. Raises StoreFailed where rows cannot be had."""
        try:
            with self._under_way:
                return super().into(fields, rows, buffer)
        except NotAtHand:
            return self._row_by_row(fields, rows, buffer)

    def at_hand(self, rows: np.ndarray) -> np.ndarray:
        """Those of these rows that are not waited for."""
        return rows[self._found.are_here(rows)]

    def _row_by_row(
        self, fields: Sequence[str], rows: np.ndarray, buffer: memoryview | None
    ) -> np.ndarray:
        """The same bytes as `into`, each row asked for by itself."""
        wanted = [(field, row) for field in self.widest_first(fields) for row in rows.tolist()]
        with ThreadPoolExecutor(ROWS_AT_ONCE) as pool:
            found = pool.map(lambda each: self._found.row(*each).tobytes(), wanted)
            data = np.frombuffer(b"".join(found), np.uint8)
        if buffer is None:
            return data.copy()
        out = np.frombuffer(buffer, np.uint8, len(data))
        out[:] = data
        return out

    def _unmap_gone(self) -> None:
        for each in self._cached:
            each.unmap_gone()


def cached_in(shards: Mapping[str, Sequence[np.ndarray]]) -> list[CachedShards]:
    """Those that come and go, of all fields and all joined sets."""
    found: list[CachedShards] = []
    for each in shards.values():
        parts = each.parts if isinstance(each, JoinedShards) else [each]
        found += [part for part in parts if isinstance(part, CachedShards)]
    return found


class UnderWay:
    """The reads under way in this process; before the first of them something is done."""

    def __init__(self, before_the_first: Callable[[], None]) -> None:
        self._before_the_first = before_the_first
        self._begin_anew()

    def _begin_anew(self) -> None:
        self._owner = os.getpid()
        self._lock = threading.Lock()
        self._n_reads = 0

    def __enter__(self) -> None:
        if self._owner != os.getpid():  # forked: what was under way is the parent's
            self._begin_anew()
        with self._lock:
            if self._n_reads == 0:
                self._before_the_first()
            self._n_reads += 1

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with self._lock:
            self._n_reads -= 1
