"""Parallel training: the device mesh, the sharding of weights, the communication, and the processes of a run."""
