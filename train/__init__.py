"""Training on the converted shards."""

import os

import shards  # noqa: F401 (an unsuitable Python or system ends there, in one line)

# Two threads that spin while they wait take the cores from the loader (and from each other on a
# busy two-core machine).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
