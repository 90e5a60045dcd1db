"""Host utilities: files, JSON, images as pixels, argument conversion and the compile cache."""
