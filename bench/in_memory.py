"""What people write first, to compare with: the two arrays of the .mat in RAM.

Each process of torch's DataLoader has them: shared where it was forked, a copy where it was
spawned.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset

SIZE = 224
N_CLASSES = 13


class ArraysInRam(Dataset[Any]):
    """Pictures and depths in RAM at 640x480, a row resized when it is asked for."""

    def __init__(self, arrays: Path) -> None:
        self.images = np.load(arrays / "images.npy")
        self.depths = np.load(arrays / "depths.npy")

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor, int]:
        """(rgb [3, S, S], depth [1, S, S], a label: any will do)."""
        rgb = torch.from_numpy(self.images[i])[None].float()
        depth = torch.from_numpy(self.depths[i])[None, None]
        rgb = F.interpolate(rgb, (SIZE, SIZE), mode="bilinear", antialias=True)
        depth = F.interpolate(depth, (SIZE, SIZE), mode="nearest-exact")
        return rgb[0], depth[0], i % N_CLASSES


def save_arrays(mat: Path, out: Path) -> None:
    """The two arrays as .npy, so that not every process measured inflates the .mat again."""
    import h5py  # here alone: it would count in the memory of the processes that are measured

    with h5py.File(mat) as file:
        for name in ("images", "depths"):
            np.save(out / f"{name}.npy", file[name][()].swapaxes(-1, -2))


def in_memory_loader(
    arrays: Path, batch_size: int, n_workers: int, method: str | None = None
) -> DataLoader[Any]:
    """torch's DataLoader over what `save_arrays` wrote. `method`: how workers are started."""
    return DataLoader(
        ArraysInRam(arrays),
        batch_size,
        shuffle=True,
        num_workers=n_workers,
        multiprocessing_context=method if n_workers else None,
        persistent_workers=n_workers > 0,
    )
