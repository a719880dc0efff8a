"""Training on the converted shards."""

import os

import shards  # noqa: F401 (an unsuitable Python or system ends there, in one line)

# Two threads that spin while they wait take the cores from the loader (and from each other on a
# busy two-core machine).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Maps of pictures of 224 px are some 100 MB each, and new memory comes in pages: torch asks for
# pages of 2 MB then, where Linux has them, in the place of 4 kB. It looks when it first needs any.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
