"""What schedulers send: SIGTERM and SIGHUP end a run after the step it is in, SIGUSR1 does not.

All of them save it first.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

NOTHING, DUE, SAVE, STOP = range(4)  # the greatest of all ranks is done


class Stopped(Exception):
    """The run is saved and ends, as a signal asked; its text is one line."""


class Requests:
    """Signals are noted while a run trains, and looked at between its steps.

    Elsewhere a STOP ends the process at once.
    """

    def __init__(self) -> None:
        self.wanted = NOTHING
        self.is_training = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take the signals meanwhile.

        None that was ignored (nohup, a shell's &), and none outside the main thread.
        """
        before = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
                if signal.getsignal(number) is not signal.SIG_IGN:
                    before[number] = signal.signal(number, self._note)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        wanted = SAVE if number == signal.SIGUSR1 else STOP
        self.wanted = max(self.wanted, wanted)
        if wanted == STOP and not self.is_training:
            raise KeyboardInterrupt

    @contextmanager
    def training(self) -> Iterator[None]:
        """Only note signals meanwhile.

        Once a run is stopped, more of them change nothing: it ends already.
        """
        self.is_training = True
        try:
            yield
        except Stopped:
            raise
        except BaseException:
            self.is_training = False
            raise
        self.is_training = False
        if self.take() == STOP:
            raise KeyboardInterrupt

    def take(self) -> int:
        """The greatest that was asked for since the last look."""
        wanted = self.wanted
        self.wanted = NOTHING
        return wanted


REQUESTS = Requests()
