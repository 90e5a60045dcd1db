"""The protocol of a data source, and the cleaning of captions that all sources share."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from lcm_jax.data.images import BadImage
from lcm_jax.errors import UserError

LONGEST_CAPTION = 2**16  # characters; a text encoder reads about 300, and tokenizing one megabyte takes 14 s


class Source(Protocol):
    """Records by number, each an image with its captions.

    `len(source)` is the number of records, at least 1. A number, 0 … len - 1, means the same record on every host and
    in every run, since batches are drawn as numbers. Whatever opens a source also reads a record, so that a wrong
    option is reported before training starts.
    """

    @property
    def where(self) -> str:
        """Path of the data set and the split that is read, for messages."""
        ...

    @property
    def metadata(self) -> Mapping[str, Any]:
        """JSON values that are stored with the data set, such as those that `latents.check` compares; {} if none."""
        ...

    def __len__(self) -> int: ...

    def read(self, indices: Sequence[int]) -> list[tuple[Any, list[str]]]:
        """Returns image and captions of each record, in the order of `indices`. Several threads may call it.

        The image is the stored file as bytes (PNG, JPEG, …), which `images.decode` may reject; with
        config.data.latents, it is a `latents.Latent` instead, all of one shape. There is at least one caption per
        record, each cleaned by `caption_text`.

        Raises: UserError naming the record that cannot be read or has no caption.
        """
        ...

    def stored(self, indices: Sequence[int]) -> list[bytes]:
        """Returns the content of each record as bytes, for the hash that identifies the data set.

        The bytes are equal on all hosts and in every run, and change with anything that `read` returns.

        Raises: UserError naming the record that cannot be read.
        """
        ...

    def bad_image(self, index: int, error: BadImage) -> UserError:
        """Returns, without raising it, the error for a record whose image cannot be decoded; it names the record."""
        ...


def caption_text(caption: bytes | str) -> str:
    """Returns a caption as valid Unicode text of at most LONGEST_CAPTION characters.

    Bytes that are not UTF-8 (Latin-1, a truncated character) and lone surrogates become U+FFFD. No other encoding is
    guessed: in a damaged UTF-8 caption, a wrong guess would change all other non-ASCII letters too.
    """
    if isinstance(caption, bytes):
        text = caption.decode("utf-8", "replace")
    else:
        text = str(caption).encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text[:LONGEST_CAPTION]
