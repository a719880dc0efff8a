"""Where each reader's packages are: a virtual environment of its own, which borrows torch.

Readers want different versions of the same packages (numpy, huggingface_hub), so each gets its own
environment. Every package that it needs is named with its version in needs/NAME.txt and installed
without asking what else it would like: no other torch is ever fetched, and nothing is searched for.
"""

import subprocess
import sys
import sysconfig
import venv
from dataclasses import dataclass
from pathlib import Path

NEEDS = Path(__file__).parent / "needs"
TIMEOUT_S = 900


@dataclass(frozen=True)
class Peer:
    """A reader: its name in the table, the module that knows it, the list of what it needs."""

    name: str
    module: str
    needs: str | None = None

    @property
    def key(self) -> str:
        """Short, such as lmdb."""
        return self.module.rpartition(".")[2].removeprefix("with_")


OURS = Peer("ours", "bench.peers.ours")
PEERS = (
    Peer("DataLoader, np.memmap, a row an item", "bench.peers.with_memmap"),
    Peer("DataLoader, np.memmap, a batch an item", "bench.peers.with_memmap_batches"),
    Peer("LMDB", "bench.peers.with_lmdb", "lmdb"),
    Peer("tensordict", "bench.peers.with_tensordict", "tensordict"),
    Peer("HF datasets", "bench.peers.with_datasets", "datasets"),
    Peer("WebDataset", "bench.peers.with_webdataset", "webdataset"),
    Peer("MosaicML Streaming", "bench.peers.with_streaming", "streaming"),
    Peer("LitData", "bench.peers.with_litdata", "litdata"),
    Peer("Grain", "bench.peers.with_grain", "grain"),
)


@dataclass(frozen=True)
class Place:
    """A reader that can be run: by which interpreter, over which store."""

    peer: Peer
    python: Path
    store: Path

    @property
    def module(self) -> str:
        return self.peer.module


class NotInstalled(Exception):
    """Why, in one line."""


def version_of(needs: str) -> str:
    """The first line of a list, which is the reader itself: "lmdb 3.0.0"."""
    first, _, _ = (NEEDS / f"{needs}.txt").read_text().partition("\n")
    return first.replace("==", " ")


def install(needs: str, folder: Path) -> Path:
    """Make the environment folder/NEEDS, unless it is there; its Python. Raises NotInstalled."""
    listed = (NEEDS / f"{needs}.txt").read_text()
    home = folder / needs
    python = home / "bin" / "python"
    stamp = home / "installed.txt"
    if stamp.exists() and stamp.read_text() == listed and python.exists():
        return python

    venv.EnvBuilder(clear=True, symlinks=True, with_pip=False).create(home)
    lend_packages(home)
    pip = [sys.executable, "-m", "pip", "--python", str(python)]
    words = ["install", "--quiet", "--no-deps", "--only-binary", ":all:"]
    command = [*pip, *words, "-r", str(NEEDS / f"{needs}.txt")]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise NotInstalled(f"pip took more than {TIMEOUT_S} s") from None
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise NotInstalled((errors or [f"pip ended with status {done.returncode}"])[-1])
    stamp.write_text(listed)
    return python


def lend_packages(home: Path) -> None:
    """Let an environment see this one's packages behind its own: torch and numpy above all."""
    paths = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    own = sysconfig.get_path("purelib", "venv", {"base": str(home), "platbase": str(home)})
    (Path(own) / "lent.pth").write_text("\n".join(paths) + "\n")
