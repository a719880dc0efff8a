"""What a transform or a dataset returns arrives as it was returned, and what it raises as raised:
in every loader.
"""

import pickle
import random
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="needs torch")

import torch
from helpers.loaders import METHODS, expected, make, same

from loader.buffers import N_BUFFERS, BufferPool
from loader.loader import Loader
from loader.messages import Raised, Returned, Written

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
KINDS: list[dict[str, Any]] = [
    {},
    {"workers": 1, "method": "fork"},
    {"workers": 1, "method": "spawn"},
]
kinds = pytest.mark.parametrize("kind", KINDS, ids=["inline", "fork", "spawn"])
LAYOUT = [(np.dtype("u1"), (4,))]
Pair = namedtuple("Pair", "rgb label")


class Odd(Exception):
    """Pickles to something else: it wants two values and keeps one text."""

    def __init__(self, a: str, b: str) -> None:
        super().__init__(f"{a} and {b}")


class Mangled(Exception):
    """Comes out of a pickle with another text."""

    def __init__(self, a: str) -> None:
        super().__init__(f"[{a}]")


VALUES: dict[str, Any] = {
    "None": None,
    "a layout": LAYOUT,
    "an empty list": [],
    "an exception": ValueError("a value"),
    "an exception class": KeyError,
    "a tuple subclass": Pair(torch.ones(2), torch.zeros(2)),
    "a dict": {"rgb": torch.arange(3)},
    "a tensor": torch.arange(5),
    "a message of ours": Raised(ValueError("x")),
    "another message of ours": Written(LAYOUT),  # type: ignore[arg-type]
    "a third": Returned(None),
    "an empty tuple": (),
    "a tuple of others": (torch.ones(2), None, "text"),
    "bfloat16": (torch.ones(3, dtype=torch.bfloat16),),
    "with a gradient": (torch.ones(3, requires_grad=True),),
    "sparse": (torch.eye(3).to_sparse(),),
    "conjugated": (torch.tensor([1 + 2j]).conj(),),
    "text": "Layout",
    "false": False,
    "a number": 0,
}


class Give:
    """A transform that returns what it was made with."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __call__(self, batch: Any) -> Any:
        return self.value


def alike(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        is_same = a.dtype == b.dtype and a.layout == b.layout and a.requires_grad == b.requires_grad
        return is_same and torch.equal(a.detach().to_dense(), b.detach().to_dense())
    if isinstance(a, BaseException | Raised):
        return type(a) is type(b) and repr(a) == repr(b)
    if isinstance(a, tuple | list):
        return type(a) is type(b) and len(a) == len(b) and all(map(alike, a, b))
    if isinstance(a, dict):
        return (
            type(a) is type(b) and a.keys() == b.keys() and all(alike(a[key], b[key]) for key in a)
        )
    return type(a) is type(b) and bool(a == b)


class Every:
    """A transform that returns one value after the other, by the first label it is given."""

    def __call__(self, batch: Any) -> Any:
        return list(VALUES.values())[int(batch[0][0])]


class Numbers:
    """Rows are their own numbers."""

    def batch(self, indices: np.ndarray) -> tuple[torch.Tensor, ...]:
        return (torch.from_numpy(indices),)

    def fill(self, buffer: Any, indices: np.ndarray) -> None:
        return None


class Values(Numbers):
    """Batches of a dataset itself are anything too."""

    def batch(self, indices: np.ndarray) -> Any:
        return list(VALUES.values())[int(indices[0])]


@kinds
@pytest.mark.parametrize("dataset", [Numbers(), Values()], ids=["transform", "dataset"])
def test_any_value_arrives_as_it_was_returned(kind: dict[str, Any], dataset: Any) -> None:
    rows = [np.array([k]) for k in range(len(VALUES))]
    how = {"transform": Every()} if type(dataset) is Numbers else {}
    loader = Loader(dataset, lambda epoch: rows, kind.get("workers", 0), kind.get("method"), **how)
    for name, got in zip(VALUES, loader, strict=True):
        assert alike(VALUES[name], got), (name, got)


def test_values_arrive_from_the_prefetch_thread_too() -> None:
    rows = [np.array([k]) for k in range(len(VALUES))]
    for name, got in zip(VALUES, Loader(Values(), lambda epoch: rows), strict=True):
        assert alike(VALUES[name], got), (name, got)


class Raise:
    """A dataset and a transform that raise."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __call__(self, batch: Any) -> Any:
        raise self.error

    def batch(self, indices: np.ndarray) -> Any:
        if len(indices) > 1:
            raise self.error
        return (torch.zeros(1),)

    def fill(self, buffer: Any, indices: np.ndarray) -> Any:
        raise self.error


ERRORS = [
    ValueError("a"),
    KeyboardInterrupt("mine"),
    SystemExit(3),
    GeneratorExit("x"),
    EOFError("end"),
    OSError(5, "io"),
]


def raised(dataset: Any, kind: dict[str, Any], **how: Any) -> BaseException:
    loader = Loader(
        dataset, lambda epoch: [np.arange(2)] * 2, kind.get("workers", 0), kind.get("method"), **how
    )
    try:
        list(loader)
    except BaseException as error:
        return error
    raise AssertionError("nothing was raised")


@pytest.mark.parametrize("where", ["transform", "fill"])
@pytest.mark.parametrize("kind", [{}, {"workers": 1, "method": "fork"}], ids=["here", "fork"])
@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_any_error_arrives_as_it_was_raised(
    error: BaseException, kind: dict[str, Any], where: str
) -> None:
    """`fill` without workers runs in the prefetch thread."""
    dataset, how = (
        (Raise(error), {}) if where == "fill" else (Numbers(), {"transform": Raise(error)})
    )
    got = raised(dataset, kind, **how)
    assert type(got) is type(error)
    assert (str(got), got.args) == (str(error), error.args)


@pytest.mark.parametrize("kind", [{}, {"workers": 1, "method": "fork"}], ids=["thread", "fork"])
def test_stop_iteration_does_not_end_a_loop_without_a_word(kind: dict[str, Any]) -> None:
    for got in (
        raised(Raise(StopIteration(7)), kind),
        raised(Numbers(), kind, transform=Raise(StopIteration(7))),
    ):
        assert type(got) is RuntimeError
        assert "StopIteration" in str(got)


@pytest.mark.parametrize("error", [Odd("a", "b"), Mangled("a")], ids=["no pickle", "another text"])
def test_an_error_that_cannot_travel_arrives_as_its_text(error: Exception) -> None:
    got = raised(Numbers(), {"workers": 1, "method": "fork"}, transform=Raise(error))
    assert type(got) is RuntimeError
    assert f"{type(error).__name__}: {error}" in str(got)
    assert "in loader-0" in str(got)


class Hidden:
    """Cannot be unpickled."""

    def __reduce__(self) -> Any:
        return bytes.decode, (b"\xff",)


@pytest.mark.parametrize("value", [lambda: 0, Hidden()], ids=["no pickle", "no unpickling"])
def test_a_batch_that_cannot_travel_says_so_and_the_loader_goes_on(value: Any) -> None:
    loader = Loader(Numbers(), lambda epoch: [np.arange(2)] * 3, 1, "fork", transform=Give(value))
    for _ in range(2):
        with pytest.raises(RuntimeError, match="num_workers=0"):
            list(loader)


class Wrong(Numbers):
    """The protocol misunderstood: `fill` returns the batch."""

    def fill(self, buffer: Any, indices: np.ndarray) -> Any:
        return self.batch(indices)


def test_a_fill_that_returns_a_batch_is_told_the_protocol() -> None:
    with pytest.raises(TypeError, match=r"Wrong.fill\(\) returned a tuple: it returns the layout"):
        list(Loader(Wrong(), lambda epoch: [np.arange(2)]))


def later(epoch: int) -> Any:
    if epoch:
        raise LookupError("no second epoch")
    return [np.arange(2)] * 5


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("prefetch", [True, False])
def test_an_error_of_the_order_arrives_when_its_epoch_is_reached(
    workers: int, prefetch: bool
) -> None:
    loader = Loader(Numbers(), later, workers, "fork", prefetch=prefetch)
    assert [batch[0].tolist() for batch in loader] == [[0, 1]] * 5
    with pytest.raises(LookupError, match="no second epoch"):
        list(loader)


def draws(batch: Any) -> Any:
    return [random.random() for _ in range(3)]


def test_pythons_own_draws_are_the_same_with_any_number_of_workers(small_set: Path) -> None:
    before = random.getstate()
    one, many = (
        list(make(small_set, transform=draws)),
        list(make(small_set, 2, "fork", transform=draws)),
    )
    assert one == many
    assert len({tuple(each) for each in one}) == 9
    assert random.getstate() == before


@pytest.mark.parametrize("method", METHODS)
def test_without_a_transform_nothing_is_pickled_on_the_way_back(
    small_set: Path, method: str
) -> None:
    assert same(list(make(small_set, 1, method)), expected(small_set))


def test_a_message_is_the_only_thing_a_pool_looks_at() -> None:
    pool = BufferPool(64, False)
    for value in (LAYOUT, ValueError("a"), None):
        buffer_id = pool.take()
        got = pool.deliver(buffer_id, Returned(value))
        assert isinstance(got, Returned)
        assert got.value is value
        assert len(pool.free) == N_BUFFERS
    assert pickle.loads(pickle.dumps(Returned(LAYOUT))) == Returned(LAYOUT)
