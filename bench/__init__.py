"""What is claimed of speed, size and memory, measured: one command a claim."""

import shards  # noqa: F401 (an unsuitable Python or system ends there, in one line)
