"""What make and the command line do where they cannot work, where they were interrupted, and what
they leave alone.
"""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pip
import pytest
from conftest import REPO, needs_torch
from helpers.commands import copy_of_the_checkout, lend_the_packages, make

PYENV = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
GIVEN = (
    *("MAT", "URL", "OUT", "DATA", "RUN", "START", "MIRROR", "DRIVE", "RECIPE", "IMAGES"),
    "FRAMES",
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A clone in which nothing is installed."""
    path = copy_of_the_checkout(tmp_path / "clone")
    (path / ".installed-colab").unlink()
    return path


# ---------------------------------------------------------------- variables


def test_a_make_that_a_test_starts_has_the_defaults(folder: Path) -> None:
    done = make(folder, "-n", "convert", COLAB_RELEASE_TAG="test")
    assert done.stdout.splitlines()[-1].split() == [
        "python3",
        "-m",
        "convert",
        "run",
        "--out",
        '"data"',
    ]


def test_no_variable_given_to_make_test_reaches_the_makes_that_tests_start(tmp_path: Path) -> None:
    """The test above, run by a `make test` that was given every variable there is."""
    repo = copy_of_the_checkout(tmp_path / "clone")
    assert set(re.findall(r"^([A-Z]+) \?=", (repo / "Makefile").read_text(), re.M)) == {
        *GIVEN,
        "PYTHON",
        "ARGS",
    }
    (repo / "tests").symlink_to(REPO / "tests")
    (repo / ".venv").mkdir()
    (repo / ".venv" / "dev").touch()
    tests = "ARGS=tests/test_make.py -k starts_has_the_defaults -p no:randomly"
    given = [
        "-k",
        *(f"{name}=/nowhere/{name}" for name in GIVEN),
        f"PYTHON={sys.executable}",
        tests,
    ]
    done = make(repo, "test", *given, COLAB_RELEASE_TAG="test")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout


# ---------------------------------------------------------------- a Python or a system that will no


def old_python() -> str:
    """A Python 3.10 or older that really runs; the test skips where there is none."""
    names = [
        *sorted(map(str, PYENV.glob("3.10*/bin/python"))),
        *(f"python3.{minor}" for minor in (10, 9, 8)),
    ]
    for name in names:
        try:
            if subprocess.run([name, "-c", ""], capture_output=True).returncode == 0:
                return name
        except OSError:
            continue
    pytest.skip("needs a Python older than 3.11")


@pytest.mark.parametrize("target", ["demo", "convert", "test"])
def test_make_with_an_old_python_is_one_line_and_leaves_no_venv(folder: Path, target: str) -> None:
    before = set(folder.rglob("*"))
    for colab in ({}, {"COLAB_RELEASE_TAG": "test"}):
        done = make(folder, target, f"PYTHON={old_python()}", **colab)
        assert done.returncode == 2
        (line,) = done.stderr.splitlines()
        assert re.search(
            rf"is Python 3\.\d+: Python 3.11 or newer is needed. Run: make {target} PYTHON=python3",
            line,
        )
    assert set(folder.rglob("*")) == before


def test_make_with_a_python_that_does_not_run_is_one_line(folder: Path) -> None:
    done = make(folder, "demo", "PYTHON=/nowhere/python3")
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "/nowhere/python3 does not run: Python 3.11 or newer is needed" in done.stderr
    assert not (folder / ".venv").exists()


@pytest.mark.parametrize("module", ["convert", "train", "bench.loader", "bench.convert"])
def test_a_command_with_an_old_python_is_one_line(module: str) -> None:
    done = subprocess.run(
        [old_python(), "-B", "-m", module, "run"], cwd=REPO, capture_output=True, text=True
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert re.search(
        r"Python 3.11 or newer is needed, this is 3\.\d+. Run: make PYTHON=python3.12$", line
    )


@pytest.mark.parametrize("module", ["convert.pipeline", "train.data", "convert.session"])
def test_an_import_with_an_old_python_says_so(module: str) -> None:
    done = subprocess.run(
        [old_python(), "-B", "-c", f"import {module}"], cwd=REPO, capture_output=True, text=True
    )
    assert done.stderr.splitlines()[-1].startswith("ImportError: Python 3.11 or newer is needed")


def test_pip_with_an_old_python_refuses(folder: Path) -> None:
    shutil.copy(REPO / "README.md", folder)
    command = [old_python(), "-m", "pip", "install", "--dry-run", "--no-deps", folder]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if "No matching distribution found for setuptools" in done.stderr:
        pytest.skip("needs a package index, for setuptools")
    assert done.returncode == 1
    assert re.search(r"requires a different Python: 3\.\d+\.\d+ not in '>=3.11'", done.stderr)


@pytest.mark.parametrize("module", ["convert", "train"])
def test_a_command_on_windows_is_one_line_that_names_wsl(module: str, tmp_path: Path) -> None:
    # As early as a user's code can run.
    (tmp_path / "sitecustomize.py").write_text("import os\nos.name = 'nt'\n")
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", module, "run"], cwd=REPO, env=env, capture_output=True, text=True
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "in WSL" in line


def test_make_on_windows_is_one_line_that_names_wsl(folder: Path) -> None:
    done = make(folder, "demo", OS="Windows_NT")
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "Run make in WSL" in done.stderr


# ---------------------------------------------------------------- a .venv that will not do


QUICK = """#!/bin/sh
test "$2" != venv || exec {python} -m venv --system-site-packages --without-pip "$3"
exec {python} "$@"
"""


def build(folder: Path, install: str) -> subprocess.CompletedProcess[str]:
    """The .venv by a real make, with the base's pip, and another command instead of the
    installation of 300 MB.
    """
    python = folder / "python"
    python.write_text(QUICK.format(python=sys.executable))
    python.chmod(0o755)
    return make(folder, ".venv/installed", f"PYTHON={python}", f"INSTALL={install}")


@pytest.mark.parametrize(
    "interrupted", ["false", "kill -9 $$PPID"], ids=["pip fails", "make is killed"]
)
def test_a_venv_made_half_is_made_again(folder: Path, interrupted: str) -> None:
    assert build(folder, interrupted).returncode != 0
    (folder / ".venv" / "half").touch()
    assert not (folder / ".venv" / "installed").exists()
    assert build(folder, "true").returncode == 0
    assert not (folder / ".venv" / "half").exists()
    assert (folder / ".venv" / "installed").exists()
    assert build(folder, "false").returncode == 0  # it is ready: nothing is installed again


def test_a_venv_whose_python_is_gone_is_made_again(folder: Path) -> None:
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / ".venv" / "bin" / "python").symlink_to("/nowhere/python3.11")
    (folder / ".venv" / "installed").touch()
    done = build(folder, "true")
    assert done.returncode == 0, done.stderr
    subprocess.run(
        [folder / ".venv" / "bin" / "python", "-m", "pip", "--version"],
        check=True,
        capture_output=True,
    )


def test_somebody_elses_venv_with_an_old_python_is_named_and_kept(folder: Path) -> None:
    subprocess.run([old_python(), "-m", "venv", "--without-pip", folder / ".venv"], check=True)
    done = build(folder, "true")
    assert done.returncode == 2
    assert done.stderr.splitlines()[0].startswith(".venv has no Python of 3.11 or newer with pip")
    assert (folder / ".venv" / "pyvenv.cfg").exists()


def test_make_says_what_to_type_in_a_shell_once_it_has_installed(folder: Path) -> None:
    done = build(folder, "true")
    assert done.stdout.splitlines()[-1] == "once a shell: source .venv/bin/activate"


# ---------------------------------------------------------------- make clean


def test_clean_removes_a_venv_of_makes_that_does_not_work_and_says_so(folder: Path) -> None:
    assert build(folder, "true").returncode == 0
    site = next((folder / ".venv").glob("lib/*/site-packages"))
    (site / "h5py.py").write_text("raise ImportError('half of a package')\n")
    (folder / "data").mkdir()
    done = make(folder, "clean")
    assert (done.returncode, (folder / ".venv").exists()) == (0, False)
    assert "did not work and is removed" in done.stdout
    assert (folder / "data").exists()


def test_clean_keeps_a_venv_that_is_not_makes_and_says_so(folder: Path) -> None:
    command = [sys.executable, "-m", "venv", "--without-pip", folder / ".venv"]
    subprocess.run(command, check=True)
    (folder / ".venv" / "installed").touch()  # make has installed into it, and did not make it
    done = make(folder, "clean")
    assert (done.returncode, (folder / ".venv" / "pyvenv.cfg").exists()) == (0, True)
    assert "was not made by make: move it away" in done.stdout


@needs_torch
def test_clean_keeps_a_venv_that_works(folder: Path) -> None:
    lend_the_packages(folder / ".venv")
    (folder / ".venv" / "made-by-make").touch()
    done = make(folder, "clean")
    assert (done.returncode, (folder / ".venv" / "installed").exists()) == (0, True)
    assert ".venv works, and is kept" in done.stdout


def test_clean_on_colab_touches_no_venv(folder: Path) -> None:
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / ".venv" / "made-by-make").touch()
    assert make(folder, "clean", COLAB_RELEASE_TAG="test").returncode == 0
    assert (folder / ".venv" / "bin").exists()


def test_help_says_what_clean_does_to_the_venv() -> None:
    (line,) = [x for x in make(REPO, "help").stdout.splitlines() if x.startswith("clean ")]
    assert ".venv" in line


# ---------------------------------------------------------------- what is installed on Colab stays


def wheel(folder: Path, name: str, version: str, *needs: str) -> None:
    """A package of this name that holds nothing."""
    info = f"{name.replace('-', '_')}-{version}.dist-info"
    text = "\n".join(
        ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}", "Provides-Extra: http"]
        + [f"Requires-Dist: {need}" for need in needs]
    )
    with zipfile.ZipFile(
        folder / f"{name.replace('-', '_')}-{version}-py3-none-any.whl", "w"
    ) as file:
        file.writestr(f"{info}/METADATA", text + "\n")
        file.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        file.writestr(f"{info}/RECORD", "")


COLABS = {
    "torch": "2.11.0+cpu", "h5py": "3.16.0", "numpy": "2.1.3", "fsspec": "2025.3.0", "psutil": "5.9.5",
    "pillow": "11.3.0", "tqdm": "4.67.3", "matplotlib": "3.10.0", "packaging": "25.0", "nyuv2-shards": "0.0.1",
    "pyarrow": "18.1.0", "scipy": "1.16.3",
}  # fmt: skip
NEWER = {
    "torch": "2.13.0", "h5py": "3.17.0", "numpy": "2.4.6", "fsspec": "2026.9.0", "psutil": "7.2.2",
    "pillow": "13.0.0", "tqdm": "4.70.1", "matplotlib": "3.11.2", "packaging": "26.4", "numcodecs": "0.17.1",
    "deflate": "0.9.0", "imagecodecs": "2026.3.6", "pyarrow": "26.0.1", "scipy": "1.17.1",
}  # fmt: skip


def installed(python: Path) -> dict[str, str]:
    code = "import importlib.metadata as m; print(*(f'{d.name}=={d.version}' for d in m.distributions()))"
    return dict(
        line.split("==")
        for line in subprocess.check_output([python, "-c", code], text=True).split()
    )


def test_make_on_colab_replaces_nothing_and_adds_what_fits(folder: Path, tmp_path: Path) -> None:
    """Empty packages in a venv of its own, and an index in which everything is newer, and asks for
    what is newer.
    """
    index = tmp_path / "index"
    index.mkdir()
    for name, version in (*COLABS.items(), *NEWER.items()):
        wheel(index, name, version)
    wheel(index, "torch", "2.11.0+cpu", "packaging>=30")  # what is there need not fit together
    wheel(index, "zarr", "3.1.6", "packaging>=22", "numpy>=1.26")
    wheel(
        index,
        "zarr",
        "3.4.2",
        "packaging>=26",
        "fsspec>=2026",
        "psutil>=7",
        "pillow>=12",
        "tqdm>=4.70",
    )
    env = {
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(index),
        "PIP_CONFIG_FILE": os.devnull,
        "COLAB_RELEASE_TAG": "test",
        "HOME": str(tmp_path),
    }
    python = tmp_path / "colab" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "colab"], check=True)
    site = next((tmp_path / "colab").glob("lib/*/site-packages"))
    # In a moment, where making one takes ten seconds.
    (site / "pip").symlink_to(Path(pip.__file__).parent)
    command = [
        python,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        *(f"{name}=={version}" for name, version in COLABS.items()),
    ]
    subprocess.run(command, check=True, env={**os.environ, **env})
    there = installed(python)

    read_only = (
        "WRITABLE="  # a read-only clone: what the project needs is installed, not the project
    )
    done = make(
        folder, f"{tmp_path}/nyuv2-shards/.installed-colab", read_only, f"PYTHON={python}", **env
    )
    assert done.returncode == 0, done.stderr
    after = installed(python)
    assert there.items() <= after.items()
    assert {name: after[name] for name in after.keys() - there.keys()} == {
        "zarr": "3.1.6",
        "numcodecs": "0.17.1",
        "deflate": "0.9.0",
        "imagecodecs": "2026.3.6",
    }
    pins = (tmp_path / "nyuv2-shards" / ".installed-colab.txt").read_text()
    assert "torch==2.11.0+cpu\n" in pins
    assert "nyuv2" not in pins


def test_a_package_whose_version_pip_does_not_take_is_no_pin(tmp_path: Path) -> None:
    for name, version in (("odd", "1.0_custom"), ("even", "1.0+cpu")):
        info = tmp_path / f"{name}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    command = [sys.executable, REPO / ".ci" / "requirements.py", "pins"]
    pins = subprocess.check_output(
        command, env={**os.environ, "PYTHONPATH": str(tmp_path)}, text=True
    ).splitlines()
    assert "even==1.0+cpu" in pins
    assert not any(pin.startswith("odd==") for pin in pins)
