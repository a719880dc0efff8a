"""One process at a time works in a place; a second is told who does. A dead one holds nothing."""

import errno
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from shards.errors import Busy, WrongPlace

try:
    import fcntl
except ImportError:  # a system without locks: batches are read there all the same
    fcntl = None  # type: ignore[assignment]

HELD: set[int] = set()  # descriptors of the locks that this process holds
# A fork waits while a lock's file is open and not in HELD: the child would hold that lock too.
_OPENING = threading.RLock()


def _let_go_in_child() -> None:
    """A forked child shares its parent's locks: it would keep them when the parent is killed."""
    for handle in HELD:
        null = os.open(os.devnull, os.O_RDWR)
        # The number stays taken: whoever closes it closes nothing else.
        os.dup2(null, handle, inheritable=False)
        os.close(null)
    HELD.clear()
    _OPENING.release()


if hasattr(os, "register_at_fork"):  # else nothing forks
    os.register_at_fork(
        before=_OPENING.acquire, after_in_parent=_OPENING.release, after_in_child=_let_go_in_child
    )


def _flock(handle: int, *, shared: bool, wait: bool) -> None:
    """Raises BlockingIOError where another process has it, OSError where there are no locks."""
    if fcntl is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    how = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    fcntl.flock(handle, how if wait else how | fcntl.LOCK_NB)


@contextmanager
def hold(
    path: Path, place: Path, doing: str, *, wait: bool = False, shared: bool = False
) -> Iterator[None]:
    """Hold `place` by a lock on the file `path`; a second process waits, or gets Busy.

    doing: what is done there, "converted". shared: others who share it may hold it too. Raises
    WrongPlace where `path` cannot be made. On a file system without locks everybody goes on.
    """
    handle = _open(path)
    try:
        _take(handle, place, doing, shared=shared, wait=wait)
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        who = f"pid {os.getpid()} on {socket.gethostname()} since {since}"
        _write(handle, who.encode())
        try:
            yield
        finally:
            if handle in HELD:  # else this is a child
                _write(handle, b"")
    finally:
        _close(handle)


def take(path: Path) -> int | None:
    """Lock a file, which is made if need be, until `let_go` or the end of this process.

    Returns its descriptor; None where another process holds it. Nothing is written into it. Raises
    WrongPlace.
    """
    handle = _open(path)
    try:
        _flock(handle, shared=False, wait=False)
    except BlockingIOError:
        let_go(handle)
        return None
    except OSError:  # a file system without locks
        pass
    return handle


def let_go(handle: int) -> None:
    """Of what `take` gave; another process may have been given the lock meanwhile, and keeps it."""
    _close(handle)


def _close(handle: int) -> None:
    with _OPENING:
        HELD.discard(handle)
        os.close(handle)


def is_held(path: Path) -> bool:
    """Whether a process holds a lock on the file."""
    try:
        handle = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        _flock(handle, shared=True, wait=False)
        return False
    except OSError:
        return True
    finally:
        os.close(handle)


def _open(path: Path) -> int:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _OPENING:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
            HELD.add(handle)
        return handle
    except OSError as error:
        what = f"cannot be made or written to ({error.strerror})"
        raise WrongPlace(path.parent, what) from None


def _take(handle: int, place: Path, doing: str, *, shared: bool, wait: bool) -> None:
    """Lock the open file, or raise Busy with what its holder has written into it."""
    try:
        _flock(handle, shared=shared, wait=wait)
    except BlockingIOError:
        who = os.pread(handle, 200, 0).decode(errors="replace").strip() or "another process"
        raise Busy(place, f"is being {doing} by", who) from None
    except OSError:  # a file system without locks
        pass


def _write(handle: int, who: bytes) -> None:
    """It is for people only: a full disk does not matter."""
    with suppress(OSError):
        os.ftruncate(handle, 0)
        os.pwrite(handle, who, 0)


@contextmanager
def only_one(root: Path, name: str, *, wait: bool = False, shared: bool = False) -> Iterator[None]:
    """Hold the set NAME under ROOT, by `ROOT/.NAME.lock`, while it is converted.

    shared: together with the other parts of the same conversion.
    """
    with hold(root / f".{name}.lock", root / name, "converted", wait=wait, shared=shared):
        yield
