"""Estimates the cost of a run without its hardware, by compiling the training step for TPUs ahead of time."""
