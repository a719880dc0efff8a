"""Conversion of the labelled .mat into memory-mapped shards."""

import shards  # noqa: F401 (an unsuitable Python or system ends there, in one line)
