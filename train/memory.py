"""Memory of this process and everything it started, from /proc, with shared pages counted once.

The sum of RSS counts a page shared by eight workers eight times; PSS gives each of them an eighth. Pages that only
mirror a file (the shards' memory maps) are the kernel's to drop at will, so they are kept apart.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

PROC = Path("/proc")


class TreeMemory(NamedTuple):
    """Bytes held by a process tree: memory of its own, and mapped pages of files."""

    pss_anon: int
    page_cache: int


def _parents() -> dict[int, int]:
    """Process id -> parent id, for every process visible here."""
    parents: dict[int, int] = {}
    for entry in PROC.iterdir():
        if not entry.name.isdigit():
            continue
        try:
            stat = (entry / "stat").read_text(errors="replace")
        except OSError:  # ended meanwhile
            continue
        parents[int(entry.name)] = int(stat.rpartition(")")[2].split()[1])  # the name in brackets may hold spaces
    return parents


def _tree(root: int) -> list[int]:
    """The process and its descendants."""
    children: dict[int, list[int]] = {}
    for pid, parent in _parents().items():
        children.setdefault(parent, []).append(pid)
    found = [root]
    for pid in found:
        found.extend(children.get(pid, []))
    return found


def _fields(path: Path) -> dict[str, int]:
    """The `Name:  12 kB` lines of a file in /proc, in bytes."""
    lines = (line.split() for line in path.read_text().splitlines())
    return {words[0][:-1]: int(words[1]) * 1024 for words in lines if len(words) == 3 and words[2] == "kB"}


def _process_memory(pid: int) -> TreeMemory:
    """One process; the resident size where the kernel has no smaps_rollup; zeros once it has ended."""
    try:
        fields = _fields(PROC / str(pid) / "smaps_rollup")
        if "Pss_Anon" in fields:
            return TreeMemory(fields["Pss_Anon"] + fields.get("Pss_Shmem", 0), fields.get("Pss_File", 0))
        if fields:  # before Linux 5.4: what only this process wrote to, and the rest of its share
            return TreeMemory(fields.get("Private_Dirty", 0), fields.get("Pss", 0) - fields.get("Private_Dirty", 0))
    except OSError:
        pass
    try:
        fields = _fields(PROC / str(pid) / "status")
    except OSError:
        return TreeMemory(0, 0)
    anonymous = fields.get("RssAnon", fields.get("VmRSS", 0)) + fields.get("RssShmem", 0)
    return TreeMemory(anonymous, fields.get("RssFile", 0))


def tree_memory(pid: int | None = None) -> TreeMemory:
    """Memory of the process (this one by default) and its descendants; zeros on a system without /proc."""
    if not (PROC / "self").exists():
        return TreeMemory(0, 0)
    parts = [_process_memory(each) for each in _tree(pid or os.getpid())]
    return TreeMemory(sum(part.pss_anon for part in parts), sum(part.page_cache for part in parts))
