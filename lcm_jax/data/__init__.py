"""Data: TFDS data sets in ArrayRecord files, image decoding, pre-encoded latents and the Grain input pipeline."""
