"""Training on the converted shards."""

import os

# Two threads that spin while they wait take the cores from the loader (and from each other on a busy two-core machine).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
