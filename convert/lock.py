"""One process at a time converts a set; a second is told who holds it."""

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .format import UserError


@contextmanager
def only_one(root: Path, name: str, wait: bool = False) -> Iterator[None]:
    """Hold a lock on `ROOT/.NAME.lock`; a second process waits or is told who holds it. A dead one holds nothing."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        handle = os.open(root / f".{name}.lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    except OSError as error:
        what = f"{root} cannot be made or written to ({error.strerror})"
        raise UserError(f"{what}. Run: make convert OUT=/a/writable/directory") from None
    with open(handle, "r+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            what = f"{root / name} is being converted by {file.read().strip() or 'another process'}"
            raise UserError(f"{what}. Wait for it, then run: make convert") from None
        except OSError:  # a file system without locks: go on
            pass
        file.truncate(0)
        file.write(f"pid {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}")
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)
