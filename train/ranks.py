"""What torchrun's processes tell each other; with one process every function is the identity."""

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from shards.format import UserError

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def join() -> torch.device:
    """Meet the other ranks (nccl on GPUs, gloo on CPUs); the device of this one."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if WORLD > 1 and not dist.is_initialized():
        silence = timedelta(minutes=10)  # a rank that says nothing for so long is dead
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=silence)
    return device


def wrap(model: nn.Module, device: torch.device) -> nn.Module:
    """The same weights in every rank, gradients averaged."""
    if WORLD == 1:
        return model
    return DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)


def total(sums: Tensor) -> Tensor:
    """The sum over all ranks."""
    if WORLD > 1:
        dist.all_reduce(sums := sums.clone())
    return sums


def most(value: int, device: torch.device) -> int:
    """The greatest of what the ranks have."""
    if WORLD == 1:
        return value
    box = torch.tensor([value], device=device)
    dist.all_reduce(box, dist.ReduceOp.MAX)
    return int(box)


def first(make: Callable[[], Any]) -> Any:
    """What rank 0 makes, in every rank; a UserError there is one everywhere."""
    if WORLD == 1:
        return make()
    box: list[Any] = [None]
    try:
        box = [make() if RANK == 0 else None]
    except UserError as error:
        box = [error]
    dist.broadcast_object_list(box)
    if isinstance(box[0], UserError):
        raise box[0]
    return box[0]


def is_lost(error: RuntimeError) -> bool:
    """Whether it says that another rank is gone (gloo and nccl raise RuntimeErrors of many texts)."""
    return WORLD > 1 and (isinstance(error, dist.DistError) or any(w in str(error).lower() for w in ("gloo", "nccl")))
