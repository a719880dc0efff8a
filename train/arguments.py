"""What `train.data` is given, checked before anything is opened.

Each mistake is one line that names the argument, what was given, and what is right.
"""

import multiprocessing as mp
import operator
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from shards.errors import WrongSetting
from shards.spec import is_whole

if TYPE_CHECKING:  # the order of rows does without it
    import torch

MOST_WORKERS = 64
TARGET = re.compile(r"scene|semantic([1-9]\d{0,4})?|depth|instance")


def refuse(name: str, given: Any, choices: str) -> WrongSetting:
    """The error for an argument that is none of `choices`."""
    return WrongSetting(name, repr(given), choices)


def check_whole(name: str, value: Any, low: int, high: int) -> int:
    """The number as an int; WrongSetting unless it is whole and from `low` to `high`."""
    if not (is_whole(value) and low <= value <= high):
        choices = str(low) if low == high else f"{low} to {high}"
        raise refuse(name, value, f"a whole number, {choices}")
    return int(value)


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """WrongSetting unless it is one of `choices`."""
    if not (isinstance(value, str) and value in choices):
        raise refuse(name, value, f"choose {', '.join(choices[:-1])} or {choices[-1]}")


def check_target(target: Any) -> tuple[str, ...]:
    """The names of one target or several; WrongSetting unless all are known, each once.

    The classes of semanticN are the dataset's to know.
    """
    names = target if isinstance(target, list | tuple) else (target,)
    are_known = all(isinstance(name, str) and TARGET.fullmatch(name) for name in names)
    if not names or not are_known or len(set(names)) < len(names):
        choices = "choose scene, semantic, semanticN, depth or instance"
        raise refuse("target", target, f"{choices}, or several of these, each once")
    return tuple(names)


def check_num_classes(num_classes: Any) -> None:
    """WrongSetting unless it is None or a number; which ones there are the dataset knows."""
    if num_classes is not None:
        check_whole("num_classes", num_classes, 1, 10_000)


def check_flags(**flags: Any) -> None:
    """WrongSetting unless each is True or False."""
    for name, value in flags.items():
        if not isinstance(value, bool | np.bool_):
            raise refuse(name, value, "True or False")


def check_function(name: str, value: Any) -> None:
    """WrongSetting unless it is a function or None."""
    if not (value is None or callable(value)):
        raise refuse(name, value, "a function, batch -> batch, or None")


def check_path(path: Any) -> None:
    """WrongSetting unless it can be the path of a set."""
    if not isinstance(path, str | Path) or not str(path) or "\0" in str(path):
        raise refuse(
            "dataset_path", path, "the path of a finished set, or of a folder that holds one"
        )
    there = os.path.expanduser(path)
    try:
        if os.path.isdir(there):
            os.scandir(there).close()
        else:
            os.stat(there)
    except FileNotFoundError:
        pass  # what to do about it is said where sets are looked for
    except OSError as error:
        what = f"cannot be read ({error.strerror}): choose another"
        raise WrongSetting("dataset_path", path, what) from None


def check_fields(fields: Any, known: Sequence[str]) -> tuple[str, ...]:
    """As a tuple; empty for None."""
    if fields is None:
        return ()
    names = list(fields) if isinstance(fields, tuple | list) else []
    are_known = all(isinstance(name, str) and name in known for name in names)
    if not names or not are_known or len(set(names)) < len(names):
        choices = f"a tuple such as ('rgb', 'depth'), from {', '.join(known)}, each once"
        raise refuse("fields", fields, choices)
    return tuple(names)


def check_workers(num_workers: Any) -> int | str:
    """A number, or "auto"; the command line's numbers are text."""
    if isinstance(num_workers, str) and num_workers == "auto":
        return "auto"
    if isinstance(num_workers, str) and re.fullmatch(r"[0-9]{1,4}", num_workers):
        num_workers = int(num_workers)
    if not (is_whole(num_workers) and 0 <= num_workers <= MOST_WORKERS):
        raise refuse("num_workers", num_workers, f"'auto' or a whole number, 0 to {MOST_WORKERS}")
    return int(num_workers)


def check_start_method(start_method: Any) -> None:
    """WrongSetting unless multiprocessing has it."""
    if start_method is not None:
        check_choice("start_method", start_method, mp.get_all_start_methods())


def check_target_size(target_size: Any) -> None:
    """None, a number, or two."""
    if target_size is None:
        return
    is_pair = isinstance(target_size, tuple | list) and len(target_size) == 2
    sizes = target_size if is_pair else [target_size]
    if not all(is_whole(size) and 0 < size < 2**31 for size in sizes):
        choices = "a whole number, two of them, or None for the set's own"
        raise refuse("target_size", target_size, choices)


def check_cache(cache: Any, device: Any) -> None:
    """WrongSetting unless `cache` and `device` go together."""
    if not (cache is None or (isinstance(cache, str) and cache == "device")):
        raise refuse("cache", cache, "'device' or None")
    if device is not None and cache is None:
        raise refuse("device", device, "for cache='device' alone, which keeps the train rows there")


def check_limit(name: str, value: Any) -> float | None:
    """A number of gigabytes above 0, or None."""
    if value is None:
        return None
    is_number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    if not is_number or not 0 < value < 1e9:
        raise refuse(name, value, "a number of gigabytes above 0, or None")
    return float(value)


def check_device(device: Any) -> "torch.device | None":
    """A device that can hold tensors here."""
    if device is None:
        return None
    import torch

    try:
        if isinstance(device, bool):
            raise ValueError("a number or a name")
        found = torch.device(device)
        torch.zeros(1, device=found).cpu()
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise refuse(
            "device", device, f"no tensor can be kept there ({reason}). Use 'cuda' or 'cpu'"
        ) from None
    return found


def one_whole_number(index: Any) -> int:
    """What `ds[...]` takes: one row's position. Raises TypeError."""
    kind: Any = getattr(index, "dtype", None)
    is_bool = isinstance(index, bool | np.bool_) or str(kind) in ("bool", "torch.bool")
    try:
        if is_bool or getattr(index, "ndim", None):
            raise TypeError
        return operator.index(index)
    except TypeError:
        what = " ".join(repr(index).split())[:80]
        raise TypeError(
            f"ds[{what}]: one whole number; for several rows ds.batch([0, 1, 2])"
        ) from None


def whole_numbers(indices: Any) -> np.ndarray:
    """What `batch()` takes: positions [B] of any whole type. Raises TypeError."""
    positions = _as_array(indices)
    kind = positions.dtype.kind
    if kind in "iu" and positions.ndim == 1:
        return positions

    if kind == "O" and positions.ndim == 1 and len(positions) and all(map(is_whole, positions)):
        raise IndexError(f"positions {min(positions)}..{max(positions)}: no set has so many rows")
    given = f"{positions.dtype} of shape {positions.shape}"
    hint = "batch([0, 1, 2])"
    if kind == "b":
        given = "a mask"
        hint = "batch(np.flatnonzero(mask))"
    raise TypeError(
        f"batch() takes the positions of rows, whole numbers in one row, not {given}: {hint}"
    )


def _as_array(indices: Any) -> np.ndarray:
    """As numpy takes them, but for [] (whole numbers here) and for True among numbers (a mask)."""
    try:
        positions = np.asarray(indices)
    except (ValueError, TypeError, RuntimeError):  # rows of different lengths; a tensor on a GPU
        positions = np.empty(0, object)

    is_sequence = isinstance(indices, list | tuple | range)
    if is_sequence and any(isinstance(index, bool | np.bool_) for index in indices):
        return positions.astype(bool)  # numpy would make 0 and 1 of them
    if is_sequence and len(indices) == 0:
        return np.empty(0, np.int64)
    return positions
