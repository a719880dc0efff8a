"""Not only this Linux: what other systems and Pythons lack is taken away, and real loaders run
without it.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="needs torch")

from conftest import REPO
from helpers.loaders import METHODS

from stores.mounted import kind_of_mount

# Runs in a process of its own, and through sitecustomize in every process that this one starts,
# workers included.
TAKE_AWAY = """
import os, sys

def refuse(event, args):
    if event == "open" and str(args[0]).startswith(("/proc", "/sys/fs")):
        raise FileNotFoundError(2, "No such file or directory", args[0])

for taken in os.environ["TAKEN_AWAY"].split():
    module, _, name = taken.partition(".")
    if taken == "proc":
        sys.addaudithook(refuse)
    elif not name:
        sys.modules[module] = None
    else:
        delattr(__import__(module), name)
"""
COMPARE = """
import os
import numpy as np, torch
from loader.loader import Loader
from train.data import ShardDataset, create_dataloaders
from train.order import Batches

def same(got, want):
    return len(got) == len(want) and all(torch.equal(a, b) for p, q in zip(got, want) for a, b in zip(p, q))

if __name__ == "__main__":
    dataset, batches = ShardDataset({path!r}, split="all"), Batches(36, 4, 0)
    expected = [[dataset.batch(rows) for rows in batches(epoch)] for epoch in range(3)]
    loader = Loader(ShardDataset({path!r}, split="all"), batches, 2, {method!r})
    for epoch in range(2):
        assert same(list(loader), expected[epoch])
    held = [next(iter(loader))]
    pid = os.fork()
    if pid == 0:
        os._exit(0 if same(held, expected[2][:1]) else 1)
    assert os.waitpid(pid, 0)[1] == 0
    train, test = create_dataloaders({path!r}, batch_size=4)
    assert sum(len(batch[-1]) for batch in train) > 0
    print("right")
"""
ALONE = ["os.memfd_create", "os.sched_getaffinity", "os.getppid", "proc"]
ALL = [
    *ALONE,
    "os.posix_fadvise",
    "os.posix_fallocate",
    "os.preadv",
    "mmap.MADV_DONTNEED",
    "signal.SIGUSR1",
    "fcntl",
]


def run_without(
    taken: str, code: str, tmp_path: Path, *args: str
) -> subprocess.CompletedProcess[str]:
    (tmp_path / "sitecustomize.py").write_text(TAKE_AWAY)
    script = tmp_path / "script.py"
    script.write_text(code)
    env = {
        **os.environ,
        "TAKEN_AWAY": taken,
        "PYTHONPATH": os.pathsep.join([str(tmp_path), str(REPO)]),
    }
    command = [sys.executable, str(script), *args]
    return subprocess.run(command, env=env, cwd=REPO, capture_output=True, text=True, timeout=120)


def test_what_is_taken_away_is_gone_in_every_process(tmp_path: Path) -> None:
    code = """if True:
        import multiprocessing as mp, os
        from pathlib import Path
        def look(): assert not hasattr(os, "memfd_create"); os._exit(7)
        if __name__ == "__main__":
            for method in ("fork", "forkserver", "spawn"):
                process = mp.get_context(method).Process(target=look)
                process.start(); process.join(); assert process.exitcode == 7
            print("gone")"""
    done = run_without("os.memfd_create", code, tmp_path)
    assert done.stdout == "gone\n", done.stderr
    done = run_without(
        "proc", "print(__import__('os').path.exists('/proc'), open('/proc/self/stat'))", tmp_path
    )
    assert "FileNotFoundError" in done.stderr


@pytest.mark.parametrize("method", METHODS)
def test_workers_of_every_kind_do_without_all_of_it(
    method: str, small_set: Path, tmp_path: Path
) -> None:
    done = run_without(" ".join(ALL), COMPARE.format(method=method, path=str(small_set)), tmp_path)
    assert done.stdout == "right\n", done.stderr


@pytest.mark.parametrize("taken", ALONE)
def test_loaders_give_the_same_batches_without_it(
    taken: str, small_set: Path, tmp_path: Path
) -> None:
    """Without memfd_create, as in the Pythons of uv and conda, the buffers are a file without a
    name.
    """
    done = run_without(taken, COMPARE.format(method="fork", path=str(small_set)), tmp_path)
    assert done.stdout == "right\n", done.stderr


MEMORY = """
import math
from types import SimpleNamespace
from loader.memory import Meter, check_room, room, tree_memory, warn_near_limit
from train.loop import epoch_line
said = []
meter = Meter(SimpleNamespace(update=lambda: None, disable=False, set_postfix_str=said.append))
meter.show(4, True, lambda: 1.0)
check_room(1 << 60, "4 batches")
warn_near_limit()
row = {"epoch": 1, "seconds": 1.0, **meter.values()}
print(tree_memory(), room(), said, epoch_line(row, 2), sep="\\n")
"""


def test_memory_that_nothing_tells_is_unknown_and_not_nought(tmp_path: Path) -> None:
    done = run_without("proc", MEMORY, tmp_path)
    assert done.stderr == ""
    tree, room, said, line = done.stdout.splitlines()
    assert tree == "TreeMemory(pss_anon=nan, page_cache=nan)"
    assert room == "None"
    assert "mem" not in said
    assert line.endswith("memory unknown")


def test_memory_that_is_told_is_shown(tmp_path: Path) -> None:
    done = run_without("", MEMORY.replace("check_room(1 << 60", "check_room(1"), tmp_path)
    tree, _, said, line = done.stdout.splitlines()
    assert "nan" not in tree
    assert " GiB" in said
    assert line.endswith(" GiB")


def test_a_set_opens_where_no_mount_table_tells_what_it_is_on(
    tmp_path: Path, small_set: Path
) -> None:
    code = f"""if True:
        from pathlib import Path
        from stores.mounted import kind_of_mount
        from train.data import ShardDataset
        print(len(ShardDataset({str(small_set)!r})) > 0, repr(kind_of_mount(Path({str(small_set)!r}))))"""
    assert run_without("proc", code, tmp_path).stdout == "True ''\n"
    assert kind_of_mount(small_set) != ""
