"""Data: the built-in captioned digits, any prepared TFDS set in ArrayRecord files, and the Grain pipeline over them."""
