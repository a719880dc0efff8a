"""Conversion of the labelled .mat into memory-mapped shards."""
