"""What is claimed of speed, size and memory, measured: one command a claim."""
