"""How many images are sampled at once."""

import numpy as np

PIXELS = 8 * 512 * 512  # of the images that are sampled at once on an accelerator: eight of Stable Diffusion 1.5
MOST = 32


def default_size(platform: str, count: int, height: int, width: int) -> int:
    """Returns how many of `count` images of this size in pixels are sampled at once if nobody chose.

    A CPU samples one at a time: all its cores are busy with one image, and every number of images has one program.
    An accelerator samples up to 32 at once, fewer large ones; a single image has its own program.

    Args:
      platform: of the device, as JAX names it.
      count, height, width: the images.
    """
    if platform == "cpu" or count == 1:
        return 1
    return min(max(PIXELS // (height * width), 1), MOST)


def parts(count: int, size: int) -> list[np.ndarray]:
    """Returns the numbers of the images in each batch of `size`; the last batch repeats its last image to be full."""
    return [np.minimum(np.arange(start, start + size), count - 1) for start in range(0, count, size)]
