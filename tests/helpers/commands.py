"""Commands as a user types them, what is left of their processes, and copies of the checkout to run
them in.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest

REPO = Path(__file__).resolve().parents[2]
Run = Callable[..., subprocess.CompletedProcess[str]]  # what the fixture `command` is


def conversion(source: object, root: Path, *more: object) -> list[str]:
    """The command line of a conversion."""
    words = [sys.executable, "-m", "convert", "run", source, "--out", root, *more]
    return [str(word) for word in words]


@contextmanager
def running(*args: object) -> Iterator[subprocess.Popen[str]]:
    """A conversion under way: source, root, more words."""
    source, root, *more = args
    command = conversion(source, Path(str(root)), *more)
    with subprocess.Popen(
        command, cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def until_a_shard_is_done(process: subprocess.Popen[str], root: Path) -> None:
    """Of what it converts, under this folder."""
    while not list(root.glob("*/receipt-*")):
        assert process.poll() is None, process.stderr.read()  # type: ignore[union-attr]
        time.sleep(0.002)


def ends_in_one_line(process: subprocess.Popen[str], status: int) -> str:
    """Its last words, after progress lines; a traceback would have been more."""
    _, errors = process.communicate(timeout=60)
    assert process.returncode == status, errors
    assert "Traceback" not in errors
    return [line for line in errors.splitlines() if not line.startswith(("shard ", "convert:"))][-1]


def gone(pid: int) -> bool:
    """Ended: no entry in /proc, or a zombie that nobody has collected."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def all_gone(pids: list[int], within_s: float) -> bool:
    """Within seconds."""
    end = time.monotonic() + within_s
    while time.monotonic() < end and not all(map(gone, pids)):
        time.sleep(0.05)
    return all(map(gone, pids))


def copy_of_the_checkout(folder: Path) -> Path:
    """The checkout as if `make` had installed it on Colab."""
    folder.mkdir()
    for name in ("shards", "loader", "stores", "convert", "train"):
        shutil.copytree(REPO / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(REPO / name, folder / name)
    (folder / ".ci").mkdir()
    shutil.copy(REPO / ".ci" / "requirements.py", folder / ".ci")
    (folder / ".installed-colab").touch()
    return folder


def git(repo: Path, *args: str) -> str:
    """What git prints. Its settings are not those of whoever runs the tests."""
    settings = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}
    who = ["-c", "safe.directory=*", "-c", "user.name=test", "-c", "user.email=test@localhost"]
    env = {**os.environ, **settings}
    done = subprocess.run(["git", *who, *args], cwd=repo, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def git_copy_of_the_checkout(folder: Path) -> Path:
    """A repository with one commit: the files of the checkout as they are, committed or not.

    The test skips where the checkout is not git's.
    """
    if not shutil.which("git") or not (REPO / ".git").exists():
        pytest.skip("needs git and a checkout made by it")
    names = git(REPO, "ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0")
    for name in filter(None, names):
        if (REPO / name).is_file():  # not one that was removed and is still tracked
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPO / name, folder / name)
    git(folder, "init", "--quiet")
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", "the checkout")
    return folder


def lend_the_packages(venv: Path, *more: Path) -> None:
    """A .venv as make leaves it, without the installation: its packages are those of this Python.

    more: folders that hold packages too, as an editable installation names one.
    """
    command = [sys.executable, "-m", "venv", "--system-site-packages", "--without-pip", str(venv)]
    subprocess.run(command, check=True)
    site = next(venv.glob("lib/*/site-packages"))
    lent = [sysconfig.get_path("purelib"), *map(str, more)]
    (site / "lent.pth").write_text("\n".join(lent) + "\n")
    for made in ("installed", "dev"):
        (venv / made).touch()


def make(
    folder: Path, *args: str, timeout_s: float = 120, **env: str
) -> subprocess.CompletedProcess[str]:
    """make without Colab's variable."""
    command = ["make", "-C", str(folder), "--no-print-directory", *args]
    usual = {name: value for name, value in os.environ.items() if name != "COLAB_RELEASE_TAG"}
    return subprocess.run(
        command, env=usual | env, capture_output=True, text=True, timeout=timeout_s
    )


def program(name: str) -> ModuleType:
    """A program of .ci, as a module."""
    spec = importlib.util.spec_from_file_location(name, REPO / ".ci" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module
