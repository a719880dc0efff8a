"""Commands as a user types them, what is left of their processes, and copies of the checkout to run them in."""

import importlib.util
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

REPO = Path(__file__).resolve().parents[2]
Run = Callable[..., subprocess.CompletedProcess[str]]  # what the fixture `command` is


def conversion(source: object, root: Path, *more: object) -> list[str]:
    """The command line of a conversion."""
    words = [sys.executable, "-m", "convert", "run", source, "--out", root, *more]
    return [str(word) for word in words]


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


def program(name: str) -> ModuleType:
    """A program of .ci, as a module."""
    spec = importlib.util.spec_from_file_location(name, REPO / ".ci" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module
