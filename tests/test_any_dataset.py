"""The loader without this dataset: the example of its package works, and so does any dataset, in
any kind of worker.
"""

import doctest
from collections.abc import Sequence

import numpy as np
import pytest

pytest.importorskip("torch", reason="needs torch")

import torch

import loader as loader_package
from loader.buffers import Layout, arrays_in
from loader.loader import Loader

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


class Table:
    """Rows (k, 2k) of two types, written into the buffer."""

    def batch(self, indices: np.ndarray) -> tuple[torch.Tensor, ...]:
        return torch.from_numpy(indices.astype(np.uint8)), torch.from_numpy(2.0 * indices)

    def fill(self, buffer: memoryview, indices: np.ndarray) -> Layout:
        layout: Layout = [(np.dtype(kind), (len(indices),)) for kind in ("u1", "f8")]
        for part, values in zip(arrays_in(buffer, layout), (indices, 2.0 * indices), strict=True):
            part[:] = values
        return layout


class Computed(Table):
    """The same rows from a dataset that cannot write into a buffer."""

    def fill(self, buffer: memoryview, indices: np.ndarray) -> None:  # type: ignore[override]
        return None


def uneven(epoch: int) -> Sequence[np.ndarray]:
    """Batches of 3, 3, 2 and 1 rows; one less in an odd epoch."""
    return np.split(np.random.default_rng(epoch).permutation(9), (3, 6, 8))[epoch % 2 :]


def test_the_example_of_the_package_works() -> None:
    assert doctest.testmod(loader_package) == (0, 6)


@pytest.mark.parametrize("dataset", [Table(), Computed()], ids=["filled", "computed"])
@pytest.mark.parametrize(
    ("workers", "method"), [(0, None), (2, "fork"), (1, "forkserver"), (1, "spawn")]
)
def test_any_dataset_and_batches_of_any_size(
    dataset: Table, workers: int, method: str | None
) -> None:
    loader = Loader(dataset, uneven, workers, method)
    for epoch in range(3):
        assert len(loader) == len(uneven(epoch))
        for (small, large), indices in zip(loader, uneven(epoch), strict=True):
            assert (small.tolist(), large.tolist()) == (indices.tolist(), (2 * indices).tolist())
            assert (small.dtype, large.dtype) == (torch.uint8, torch.float64)


def test_a_batch_larger_than_the_first_epochs_is_an_error_with_its_rows() -> None:
    loader = Loader(Table(), lambda epoch: [np.arange(10_000 if epoch else 1)])
    list(loader)
    with pytest.raises(TypeError, match="buffer is too small") as error:
        list(loader)
    assert "in the loader, epoch 1, step 0, rows 0, 1, 2" in error.value.__notes__[0]
