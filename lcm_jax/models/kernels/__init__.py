"""Kernels for attention and convolution."""
