"""The losses, one a file: pure functions of networks (as callables), a batch, and random draws that are made before."""
