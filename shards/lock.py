"""One process at a time works in a place; a second is told who does. A dead one holds nothing."""

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from shards.errors import UserError, WrongPlace

HELD: set[int] = set()  # descriptors of the locks that this process holds


def _let_go_in_child() -> None:
    """A forked child shares its parent's locks: it would keep them when the parent is killed."""
    for handle in HELD:
        null = os.open(os.devnull, os.O_RDWR)
        # The number stays taken: whoever closes it closes nothing else.
        os.dup2(null, handle, inheritable=False)
        os.close(null)
    HELD.clear()


os.register_at_fork(after_in_child=_let_go_in_child)


@contextmanager
def hold(
    path: Path, *, is_held: str, then: str, elsewhere: str, wait: bool = False
) -> Iterator[None]:
    """Hold a lock on the file `path`; a second process waits, or gets a UserError.

    Its text: `is_held` ("DIR is being converted by"), who holds it, `then` (what to do). Where
    `path` cannot be made it is a WrongPlace, with `elsewhere` (what to do). On a file system
    without locks everybody goes on.
    """
    handle = _open(path, elsewhere)
    try:
        _take(handle, is_held, then, wait)
        HELD.add(handle)
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        who = f"pid {os.getpid()} on {socket.gethostname()} since {since}"
        _write(handle, who.encode())
        try:
            yield
        finally:
            if handle in HELD:  # else this is a child
                _write(handle, b"")
    finally:
        HELD.discard(handle)
        os.close(handle)


def _open(path: Path, elsewhere: str) -> int:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    except OSError as error:
        what = f"cannot be made or written to ({error.strerror})"
        raise WrongPlace(path.parent, what, elsewhere) from None


def _take(handle: int, is_held: str, then: str, wait: bool) -> None:
    """Lock the open file, or raise UserError with what its holder has written into it."""
    how = fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB
    try:
        fcntl.flock(handle, how)
    except BlockingIOError:
        who = os.pread(handle, 200, 0).decode(errors="replace").strip() or "another process"
        raise UserError(f"{is_held} {who}", then) from None
    except OSError:  # a file system without locks
        pass


def _write(handle: int, who: bytes) -> None:
    """It is for people only: a full disk does not matter."""
    with suppress(OSError):
        os.ftruncate(handle, 0)
        os.pwrite(handle, who, 0)


@contextmanager
def only_one(root: Path, name: str, wait: bool = False) -> Iterator[None]:
    """Hold the set NAME under ROOT, by `ROOT/.NAME.lock`, while it is converted."""
    is_held = f"{root / name} is being converted by"
    then = "Wait for it, then run: make convert"
    elsewhere = "Run: make convert OUT=/a/writable/directory"
    lock = root / f".{name}.lock"
    with hold(lock, is_held=is_held, then=then, elsewhere=elsewhere, wait=wait):
        yield
