"""MosaicML Streaming: MDS files with columns of arrays of a fixed type and shape."""

import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from bench.peers.rows import BATCH, Batch, Rows


def stand_in_for_torchvision() -> None:
    """Names that its picture datasets import, and arrays do not use.

    torchvision fits one build of torch alone, and would have to be fetched for that build.
    """
    modules: dict[str, dict[str, Any]] = {
        "torchvision": {},
        "torchvision.datasets": {"VisionDataset": object},
        "torchvision.transforms": {},
        "torchvision.transforms.functional": {"to_tensor": None},
    }
    for name, attributes in modules.items():
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)  # which is looked at, to see what is there
        vars(module).update(attributes)
        sys.modules[name] = module


stand_in_for_torchvision()

from streaming import MDSWriter, StreamingDataLoader, StreamingDataset  # noqa: E402
from streaming.base.util import clean_stale_shared_memory  # noqa: E402


def build(rows: Rows, store: Path) -> None:
    """Columns whose type and shape stand in the index, not in every row."""
    first = rows[0]
    columns = {"rgb": encoding("uint8", first.rgb), "depth": encoding("int16", first.depth)}
    columns["row"] = "int"
    with MDSWriter(out=str(store / "mds"), columns=columns) as writer:
        for row in rows:
            writer.write({"rgb": row.rgb, "depth": row.depth, "row": row.number})


def encoding(dtype: str, array: Any) -> str:
    """Such as ndarray:uint8:3,224,224."""
    return f"ndarray:{dtype}:{','.join(map(str, array.shape))}"


class Loaded:
    """Its batches as three tensors."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.loader:
            yield batch["rgb"], batch["depth"], batch["row"]


def batches(rows: Rows, store: Path, n_workers: int) -> Loaded:
    """Its own loader over the files where they lie."""
    clean_stale_shared_memory()
    dataset = StreamingDataset(local=str(store / "mds"), shuffle=True, batch_size=BATCH)
    loader = StreamingDataLoader(
        dataset,
        batch_size=BATCH,
        num_workers=n_workers,
        persistent_workers=n_workers > 0,
        drop_last=True,
    )
    return Loaded(loader)
