"""The contract on disk: what a set is, how it is written, opened and checked."""
