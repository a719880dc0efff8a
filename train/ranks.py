"""What torchrun's processes tell each other; with one process every function is the identity."""

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from shards.errors import UserError

RANK = int(os.environ.get("RANK", 0))
WORLD = int(os.environ.get("WORLD_SIZE", 1))
SILENCE = timedelta(minutes=10)  # a rank that says nothing for so long is dead


def join() -> torch.device:
    """Meet the other ranks (nccl on GPUs, gloo on CPUs); the device of this one."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if WORLD > 1 and not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=SILENCE)
    return device


def wrap(model: nn.Module, device: torch.device) -> nn.Module:
    """The same weights in every rank, gradients averaged."""
    if WORLD == 1:
        return model
    return DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)


def all_reduce_sum(values: Tensor) -> Tensor:
    """The sum over all ranks; `values` themselves stay as they are."""
    if WORLD == 1:
        return values
    sums = values.clone()
    dist.all_reduce(sums)
    return sums


def all_reduce_max(value: int, device: torch.device) -> int:
    """The greatest of what the ranks have."""
    if WORLD == 1:
        return value
    box = torch.tensor([value], device=device)
    dist.all_reduce(box, dist.ReduceOp.MAX)
    return int(box)


def broadcast_from_first(make: Callable[[], Any]) -> Any:
    """What rank 0 makes, in every rank. A UserError that it raises is raised everywhere."""
    if WORLD == 1:
        return make()

    box: list[Any] = [None]
    if RANK == 0:
        try:
            box = [make()]
        except UserError as error:
            box = [error]
    dist.broadcast_object_list(box)

    if isinstance(box[0], UserError):
        raise box[0]
    return box[0]


def gather(value: Any) -> list[Any]:
    """What every rank has, in the ranks' order; small things, as they are pickled."""
    if WORLD == 1:
        return [value]
    box: list[Any] = [None] * WORLD
    dist.all_gather_object(box, value)
    return box


def is_lost(error: RuntimeError) -> bool:
    """Whether it says that another rank is gone: gloo and nccl have many texts for that."""
    if WORLD == 1:
        return False
    text = str(error).lower()
    return isinstance(error, dist.DistError) or "gloo" in text or "nccl" in text
