"""What whoever makes a batch says about it.

These classes alone tell the cases apart, never the type of what they hold: a batch may be a list,
None or an exception, and is delivered as it was returned.

Each tells by `was_read` whether a disk was read for it, as far as the kernel counts that
(loader.disk).
"""

import pickle
import traceback
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

Layout = list[tuple[np.dtype[Any], tuple[int, ...]]]  # type and shape of the parts of a batch


@dataclass(frozen=True)
class Written:
    """The batch lies in its buffer, like this."""

    layout: Layout
    was_read: bool = False


@dataclass(frozen=True)
class Returned:
    """The batch."""

    value: Any
    was_read: bool = False


@dataclass(frozen=True)
class Raised:
    """There is none: user code raised this."""

    error: BaseException
    was_read: bool = False


Message = Written | Returned | Raised


def packed(message: Message, worker_name: str) -> bytes:
    """The message as bytes, for the way out of a worker.

    An error takes its traceback along as a note. What cannot travel is packed as an error that
    says so; nothing is raised.
    """
    if isinstance(message, Raised):
        error = _fit_to_travel(message.error, worker_name)
        return pickle.dumps(Raised(error, message.was_read))
    try:
        return pickle.dumps(message)
    except BaseException as error:
        value = message.value if isinstance(message, Returned) else message
        text = (
            f"a batch of type {type(value).__name__} cannot be sent from {worker_name} "
            f"({_text(error)}): use num_workers=0"
        )
        return pickle.dumps(Raised(RuntimeError(text)))


def unpacked(data: bytes, worker_name: str) -> Message:
    """The message; or why what was sent cannot be made again here."""
    try:
        message: Message = pickle.loads(data)
        return message
    except Exception as error:
        text = (
            f"a batch sent from {worker_name} cannot be unpickled "
            f"({_text(error)}): use num_workers=0"
        )
        failed = RuntimeError(text)
        failed.__cause__ = error
        return Raised(failed)


def add_note(error: BaseException, text: str) -> None:
    """Add a note to an error, where its class allows it."""
    with suppress(Exception):  # an exception's class may forbid it
        error.add_note(text)


def _fit_to_travel(error: BaseException, worker_name: str) -> BaseException:
    """The error itself where a pickle makes it again as it is, else its text."""
    where_raised = "".join(traceback.format_exception(error))
    with suppress(BaseException):
        add_note(error, f"in {worker_name}\n{where_raised}")
        again = pickle.loads(pickle.dumps(error))
        if type(again) is type(error) and _text(again) == _text(error):
            return error
    return RuntimeError(f"in {worker_name}\n{where_raised}")


def _text(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:  # its __str__ is the user's too
        return type(error).__name__
