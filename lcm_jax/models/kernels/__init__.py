"""Programs for attention and convolution."""
