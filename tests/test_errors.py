"""What library code says: facts, and settings as in Python; the command lines say it with flags."""

import ast
import pickle
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import REPO

from shards.copy import codecs_of
from shards.errors import ConflictingSettings, NeedsSetting, UserError, WrongSetting
from shards.flags import as_flag
from train.errors import (
    BatchTooSmall,
    CannotUnpack,
    Diverged,
    MissingDepth,
    NoKnownPixel,
    OtherNetwork,
    OtherRun,
    OtherSize,
    WrongNetwork,
    WrongWeights,
)

RUN = Path("runs/a")
LAST = RUN / "last.pt"

# An error, what is said to a caller from Python, and on a command line.
TEXTS = {
    "a value": (
        WrongSetting("batch_size", 0, "choose 1 to 9"),
        "batch_size 0: choose 1 to 9",
        "--batch-size 0: choose 1 to 9",
    ),
    "called otherwise in Python": (
        WrongSetting("dataset_path", "''", "name one"),
        "dataset_path '': name one",
        "--data '': name one",
    ),
    "needs another": (
        NeedsSetting("start", "runs/b", "recipe", "default"),
        "start='runs/b' is for recipe='default'. Add that, or leave start out",
        "--start runs/b is for --recipe default. Add that, or leave --start out",
    ),
    "needs another, with advice": (
        NeedsSetting("weights", "w.pth", "model", "resnet18", "Load them inside mine:Net"),
        "weights='w.pth' is for model='resnet18'. Load them inside mine:Net",
        "--weights w.pth is for --model resnet18. Load them inside mine:Net",
    ),
    "two": (
        ConflictingSettings("start", "runs/b", "weights", "my w.pth"),
        "start='runs/b' does not go with weights='my w.pth'. Leave one of them out",
        "--start runs/b does not go with --weights 'my w.pth'. Leave one of them out",
    ),
    "a network": (
        WrongNetwork("mine:Net", "returned int", "Return a module"),
        "model='mine:Net' returned int. Return a module",
        "--model mine:Net returned int. Return a module",
    ),
    "a network that raises": (
        WrongNetwork("mine:Net", ": KeyError: 1"),
        "model='mine:Net': KeyError: 1",
        "--model mine:Net: KeyError: 1",
    ),
    "weights": (
        WrongWeights("w.pth", "no such file"),
        "weights='w.pth': no such file. "
        "Give a ResNet-18 (and width=64), or a run with this one's width and inputs",
        "--weights w.pth: no such file. "
        "Give a ResNet-18 (and --width 64), or a run with this one's --width and --inputs",
    ),
    "another run": (
        OtherRun(LAST, "lr", 0.1, 0.2),
        "runs/a/last.pt was trained with lr=0.1, this run has lr=0.2. "
        "Use lr=0.1, another out, or reset=True",
        "runs/a/last.pt was trained with --lr 0.1, this run has --lr 0.2. "
        "Use --lr 0.1, another --out, or --reset",
    ),
    "another run, without": (
        OtherRun(LAST, "weights", None, "runs/b"),
        "runs/a/last.pt was trained with weights=None, this run has weights='runs/b'. "
        "Use weights=None, another out, or reset=True",
        "runs/a/last.pt was trained with no --weights, this run has --weights runs/b. "
        "Use no --weights, another --out, or --reset",
    ),
    "another set": (
        OtherRun(LAST, "data", "1f3a9c20", "77aa01b2"),
        "runs/a/last.pt was trained with data with shards 1f3a9c20, "
        "this run has data with shards 77aa01b2. "
        "Use data with shards 1f3a9c20, another out, or reset=True",
        "runs/a/last.pt was trained with --data with shards 1f3a9c20, "
        "this run has --data with shards 77aa01b2. "
        "Use --data with shards 1f3a9c20, another --out, or --reset",
    ),
    "another network": (
        OtherNetwork(LAST, "mine:Net", "size mismatch"),
        "runs/a/last.pt does not fit model='mine:Net': size mismatch. Use reset=True",
        "runs/a/last.pt does not fit --model mine:Net: size mismatch. Use --reset",
    ),
    "no pixel": (
        NoKnownPixel(RUN, "labelled"),
        "runs/a: no pixel of the train rows is labelled: nothing to learn. Use another task",
        "runs/a: no pixel of the train rows is labelled: nothing to learn. Use another --task",
    ),
    "a batch": (
        BatchTooSmall(1, 32, "more than 1 value"),
        "a batch of 1 at 32 px is too little for BatchNorm (more than 1 value). "
        "Use a larger batch_size or size",
        "a batch of 1 at 32 px is too little for BatchNorm (more than 1 value). "
        "Use a larger --batch-size or --size",
    ),
    "a rate": (
        Diverged(3, 0.5),
        "the loss became nan in epoch 3. Use a smaller lr than 0.5",
        "the loss became nan in epoch 3. Use a smaller --lr than 0.5",
    ),
    "a set without depth": (
        MissingDepth(Path("data/photos-224-1f3a9c20")),
        "data/photos-224-1f3a9c20 has no depth: the network needs it. "
        "Convert a source that has it, or train with inputs='rgb'",
        "data/photos-224-1f3a9c20 has no depth: the network needs it. "
        "Convert a source that has it, or train with --inputs rgb",
    ),
    "a set of another size": (
        OtherSize(Path("data/photos-96-1f3a9c20"), 96, 224),
        "data/photos-96-1f3a9c20 has pictures of 96x96, the run learnt from 224x224. "
        "Convert its source with size=224",
        "data/photos-96-1f3a9c20 has pictures of 96x96, the run learnt from 224x224. "
        "Convert its source with --size 224",
    ),
}


@pytest.mark.parametrize("kind", TEXTS)
def test_a_setting_is_called_as_in_python_and_by_its_flag_on_the_command_line(kind: str) -> None:
    error, in_python, typed = TEXTS[kind]
    assert str(error) == in_python
    assert error.told(as_flag) == typed


@pytest.mark.parametrize("kind", TEXTS)
def test_an_error_arrives_in_another_process_with_its_facts(kind: str) -> None:
    """Ranks and workers hand theirs on."""
    error, in_python, typed = TEXTS[kind]
    arrived = pickle.loads(pickle.dumps(error))
    assert type(arrived) is type(error)
    assert vars(arrived) == vars(error)
    assert (str(arrived), arrived.told(as_flag)) == (in_python, typed)


def test_a_codec_for_npy_names_the_container_that_it_is_for() -> None:
    with pytest.raises(NeedsSetting) as caught:
        codecs_of("npy", "zstd", ["rgb"])
    assert str(caught.value).startswith("codec='zstd' is for container='zarr'")
    assert caught.value.told(as_flag).startswith("--codec zstd is for --format zarr")


def test_a_set_that_cannot_be_unpacked_is_named_with_where_it_was_to_go() -> None:
    error: UserError = CannotUnpack(Path("data/x.zarr"), Path("cache"))
    assert "data/x.zarr could not be unpacked into cache" in str(error)
    assert vars(pickle.loads(pickle.dumps(error))) == vars(error)


# ---------------------------------------------------------------- no flag and no command

COMMAND_LINES = {"__main__.py", "shards/flags.py", "convert/parser.py", "convert/next_command.py"}
TYPED = re.compile(r"(?<![\w-])--[a-z]|python -m|\bmake (convert|train|pull|push|verify)\b|MAT=")
# Calls that say nothing of what went wrong: they define flags.
DEFINE_FLAGS = {"add_argument", "ArgumentParser", "Parser", "_flag", "_number"}


def texts_of(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Every text of a module but docstrings, and the texts of its flags."""
    if isinstance(tree, ast.Call):
        called = tree.func.attr if isinstance(tree.func, ast.Attribute) else tree.func
        name = called.id if isinstance(called, ast.Name) else called
        if name in DEFINE_FLAGS:
            return
    if isinstance(tree, ast.Expr) and isinstance(tree.value, ast.Constant):
        return  # a docstring
    if isinstance(tree, ast.Constant) and isinstance(tree.value, str):
        yield tree.lineno, tree.value
    for child in ast.iter_child_nodes(tree):
        yield from texts_of(child)


def test_library_code_names_no_flag_and_no_command() -> None:
    """Whoever calls it from Python has none."""
    found = []
    for package in ("shards", "loader", "stores", "convert", "train"):
        for path in sorted((REPO / package).rglob("*.py")):
            name = str(path.relative_to(REPO))
            if path.name in COMMAND_LINES or name in COMMAND_LINES:
                continue
            texts = texts_of(ast.parse(path.read_text()))
            found += [f"{name}, line {line}: {text}" for line, text in texts if TYPED.search(text)]
    assert found == []


@pytest.mark.parametrize(
    "source",
    [
        'raise UserError("Use a larger --batch-size")',
        'log(f"--mirror {target}: full")',
        'text = "Run: python -m shards.copy"',
        'right = "or say where it is with MAT="',
    ],
)
def test_a_flag_or_command_planted_in_library_code_is_found(source: str) -> None:
    assert any(TYPED.search(text) for _, text in texts_of(ast.parse(source)))
