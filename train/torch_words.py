"""What torch's DataLoader is given and `create_dataloaders` calls otherwise, or does anyway.

Taken where nothing would change, else refused in one line with the word for it here.
"""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from shards.errors import WrongSetting
from shards.spec import is_whole


class TorchWords(TypedDict, total=False):
    """Arguments of torch's DataLoader that are not among those of `create_dataloaders`."""

    pin_memory: Any
    pin_memory_device: Any
    persistent_workers: Any
    in_order: Any
    prefetch_factor: Any
    timeout: Any
    drop_last: Any
    collate_fn: Any
    worker_init_fn: Any
    sampler: Any
    batch_sampler: Any
    generator: Any
    multiprocessing_context: Any


# The values that change nothing, and why.
TAKEN: dict[str, tuple[tuple[Any, ...], str]] = {
    "pin_memory": ((True, False), "buffers are pinned where there is a GPU. Use True or False"),
    "pin_memory_device": (("", "cuda"), "buffers are pinned where there is a GPU. Use 'cuda'"),
    "persistent_workers": ((True, False), "workers stay between epochs. Use True or False"),
    "in_order": ((True,), "batches come in their order, always. Use True"),
    "drop_last": (
        (True,),
        "train rows that fill no whole batch are left out, of the second loader's none. Use True; "
        "for batches of your own loader.loader.Loader(dataset, batches)",
    ),
}

OWN_ORDER = "Leave it out; for an order of your own loader.loader.Loader(dataset, batches)"
# What has another name, or none.
CALLED = {
    "collate_fn": "rows come as a batch. Use transform, a function batch -> batch",
    "worker_init_fn": "workers draw from (seed, epoch, step). Use transform for what they do",
    "sampler": f"the order follows from seed and epoch. {OWN_ORDER}",
    "batch_sampler": f"the order follows from seed and epoch. {OWN_ORDER}",
    "generator": "the order follows from seed and epoch. Use seed, a whole number",
    "multiprocessing_context": "Use start_method, 'fork', 'spawn' or 'forkserver'",
}


def check_torch_words(given: Mapping[str, Any], known: Sequence[str]) -> None:
    """None stands for torch's own choice, and is taken.

    known: the other arguments, to name the one that was meant. Raises WrongSetting, and TypeError
    for an argument that nobody has.
    """
    for name, value in given.items():
        if name not in TorchWords.__annotations__:
            raise TypeError(_no_such(name, known))
        right = _what_is_right(name, value)
        if value is not None and right:
            raise WrongSetting(name, repr(value), right)


def _what_is_right(name: str, value: Any) -> str:
    """'' where the value changes nothing."""
    if name in CALLED:
        return CALLED[name]
    if name in TAKEN:
        values, why = TAKEN[name]
        is_taken = any(type(value) is type(each) and value == each for each in values)
        return "" if is_taken else why
    if name == "prefetch_factor":  # four buffers, whatever is given
        is_taken = is_whole(value) and value >= 1
        return "" if is_taken else "four batches are held, always. Use a whole number, 1 or more"

    # timeout: a worker that is gone is seen at once.
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    is_taken = is_number and value >= 0
    return "" if is_taken else "a lost worker is seen at once. Use a number, 0 or more"


def _no_such(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    meant = f"Did you mean {close[0]}?" if close else f"There are {', '.join(known)}"
    return f"create_dataloaders() has no argument {name}. {meant}"
