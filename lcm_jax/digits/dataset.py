"""Captioned digits: real handwritten digits in a named ink on a named paper, as a TFDS builder without TensorFlow.

The digits are the 1,797 of the UCI set "Optical Recognition of Handwritten Digits" (Alpaydin & Kaynak, 1998,
doi 10.24432/C50P49, CC BY 4.0) that scikit-learn ships. Importing this module registers two TFDS data sets:
`captioned_digits`, and `italic_digits`, the same images slanted, for fine-tuning.
"""

import functools
import io
from collections.abc import Iterator, Sequence

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Float, UInt8
from PIL import Image

from lcm_jax.errors import UserError, one_of

# The corners of the RGB cube.
COLOURS: dict[str, tuple[int, int, int]] = {
    "black": (0, 0, 0),
    "white": (255, 255, 255),
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
    "cyan": (0, 255, 255),
    "magenta": (255, 0, 255),
}
DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PHRASES = (
    "a {ink} {digit} on a {paper} background",
    "the digit {digit} in {ink} on {paper}",
    "a handwritten {ink} {digit}, {paper} background",
    "{ink} {digit} on {paper}",
    "a picture of the digit {digit} in {ink} on a {paper} background",
)
ALL_PAIRS = tuple((ink, paper) for ink in COLOURS for paper in COLOURS if ink != paper)

STYLES = ("upright", "italic")
SLANT = 0.6  # horizontal shift of italic digits, in pixels per pixel of height

SIZE = 32  # image height and width in pixels
DIGIT_SIZE = 24  # height and width of the digit within the image
PLACES = SIZE - DIGIT_SIZE + 1  # positions of its upper left corner along each axis
SPLITS = {"train": 1300, "validation": 200, "test": 297}  # images
PAIRS_PER_IMAGE = {"train": 16, "validation": 4, "test": 4}  # colour pairs seen in training
HELD_OUT_PER_IMAGE = {"train": 0, "validation": 0, "test": 4}  # colour pairs never seen in training
SEED = 20231006


def _held_out_pairs() -> tuple[tuple[str, str], ...]:
    """Returns 8 of the 56 pairs, in which each colour occurs once as ink and once as paper.

    They are a seeded random permutation without fixed points, so no colour becomes rare in training in either role.
    """
    names = list(COLOURS)
    random = np.random.RandomState(SEED)  # its stream is frozen by numpy (NEP 19), so the set never changes
    while True:
        papers = random.permutation(len(names))
        if all(i != p for i, p in enumerate(papers)):
            return tuple((names[i], names[p]) for i, p in enumerate(papers))


HELD_OUT_PAIRS = _held_out_pairs()
SEEN_PAIRS = tuple(pair for pair in ALL_PAIRS if pair not in HELD_OUT_PAIRS)


@functools.cache
def _upscale(grid: int, size: int) -> np.ndarray:
    """Returns Pillow's bicubic upscaling along one axis as a matrix (size, grid), float32."""
    unit = Image.fromarray(np.eye(grid, dtype=np.float32))
    return np.asarray(unit.resize((grid, size), Image.Resampling.BICUBIC))


@functools.cache
def _slant(size: int) -> np.ndarray:
    """Returns a shear around the middle, linearly interpolated, as (row, from column, to column) float32."""
    row, start, end = np.ogrid[:size, :size, :size]
    moved = start - SLANT * (row - (size - 1) / 2)
    return np.maximum(0, 1 - np.abs(moved - end)).astype(np.float32)


def coverage(
    grid: Float[np.ndarray, "*batch 8 8"], size: int = DIGIT_SIZE, style: str = "upright"
) -> Float[np.ndarray, "*batch size size"]:
    """Upscales grids with values 0..16 to the ink coverage of each pixel, 0..1 float32, with a soft edge."""
    matrix = _upscale(grid.shape[-1], size)
    ink = matrix @ (np.asarray(grid, np.float32) / 16) @ matrix.T
    if style == "italic":
        ink = np.einsum("...rp,rpq->...rq", ink, _slant(size))
    edge = np.clip((ink - 0.3) / (0.7 - 0.3), 0, 1)
    return edge * edge * (3 - 2 * edge)  # smoothstep(.3, .7)


def _colour(cover: np.ndarray, ink: str, paper: str, place: tuple[int, int]) -> np.ndarray:
    """Blends ink over paper by a coverage (DIGIT_SIZE, DIGIT_SIZE) at `place`; returns uint8 (SIZE, SIZE, 3)."""
    front, back = np.asarray(COLOURS[ink], np.float32), np.asarray(COLOURS[paper], np.float32)
    whole = np.zeros((SIZE, SIZE), cover.dtype)
    whole[place[0] : place[0] + DIGIT_SIZE, place[1] : place[1] + DIGIT_SIZE] = cover
    return np.rint(back + whole[..., None] * (front - back)).astype(np.uint8)


def render(
    grid: Float[np.ndarray, "8 8"],
    ink: str,
    paper: str,
    place: tuple[int, int] = (PLACES // 2, PLACES // 2),
    style: str = "upright",
) -> UInt8[np.ndarray, "32 32 3"]:
    """Renders one 8 x 8 grid of values 0..16 (16 = full ink) in `ink` on `paper`.

    Args:
      place: row and column of the digit's upper left corner, each in 0 … PLACES - 1; centred by default.
      style: one of STYLES.

    Returns:
      uint8 RGB.

    Raises:
      UserError: an unknown colour or style, or a place where part of the digit is outside the image.
    """
    one_of("ink", ink, COLOURS)
    one_of("paper", paper, COLOURS)
    one_of("style", style, STYLES)
    if not all(0 <= corner < PLACES for corner in place):
        raise UserError(f"place is {place}; each number must be from 0 to {PLACES - 1}")
    return _colour(coverage(grid, style=style), ink, paper, place)


def caption(digit: int, ink: str, paper: str, phrase: int = 0) -> str:
    """Returns the caption of a digit 0..9 in `ink` on `paper`; `phrase` is an index into PHRASES."""
    one_of("ink", ink, COLOURS)
    one_of("paper", paper, COLOURS)
    return PHRASES[phrase].format(digit=DIGIT_NAMES[digit], ink=ink, paper=paper)


def load_grids() -> tuple[np.ndarray, np.ndarray]:
    """Loads the real digits: grids (1797, 8, 8) float64 with values 0..16, and labels (1797,) int64."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UserError(
            "captioned_digits needs scikit-learn, which contains its images: pip install 'lcm_jax[demo]'"
        ) from None
    digits = load_digits()
    return digits.images, digits.target  # pyright: ignore[reportAttributeAccessIssue]


def split_images(digits: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
    """Returns split name -> sorted image indices, stratified by digit, with the sizes of SPLITS.

    `digits` is the label of each image, (n,) int.
    """
    digits = np.asarray(digits)
    random = np.random.RandomState(SEED + 1)
    place = np.empty(len(digits))
    for digit in np.unique(digits):
        members = np.flatnonzero(digits == digit)
        # Spreads each digit's images evenly over 0..1 in random order, so that any cut is stratified.
        place[random.permutation(members)] = (np.arange(len(members)) + random.uniform()) / len(members)
    ends = np.cumsum(list(SPLITS.values()))
    parts = np.split(np.argsort(place, kind="stable"), ends[:-1])
    return {name: np.sort(part) for name, part in zip(SPLITS, parts, strict=True)}


def _pairs_of(image: int, split: str) -> list[tuple[str, str]]:
    """Returns the colour pairs of an image, chosen with its index as the seed."""
    random = np.random.RandomState([SEED, image])
    seen = random.permutation(len(SEEN_PAIRS))[: PAIRS_PER_IMAGE[split]]
    held_out = random.permutation(len(HELD_OUT_PAIRS))[: HELD_OUT_PER_IMAGE[split]]
    return [SEEN_PAIRS[i] for i in seen] + [HELD_OUT_PAIRS[i] for i in held_out]


def _png(pixels: np.ndarray) -> io.BytesIO:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG", compress_level=6)
    file.seek(0)
    return file


class CaptionedDigits(tfds.core.GeneratorBasedBuilder):
    """Handwritten digits with captions, 32 x 32 RGB."""

    name = "captioned_digits"
    STYLE = "upright"
    VERSION = tfds.core.Version("2.0.0")
    url_infos = {}  # noqa: RUF012 (nothing is downloaded; TFDS would look for a checksum file beside this one)
    RELEASE_NOTES = {  # noqa: RUF012 (TFDS wants a plain class attribute)
        "2.0.0": "Digits of 24 pixels, anywhere in the image.",
        "1.0.0": "First release.",
    }

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Handwritten digits (UCI, 8 x 8), anywhere in 32 x 32 pixels, in one of eight named inks "
            "on another named paper, with a caption in one of five phrasings. Eight colour pairs appear in the test "
            "split only.",
            homepage="https://archive.ics.uci.edu/dataset/80",
            citation="@misc{alpaydin1998optical, title={Optical Recognition of Handwritten Digits}, author={Alpaydin, "
            "E. and Kaynak, C.}, year={1998}, publisher={UCI Machine Learning Repository}, doi={10.24432/C50P49}}",
            license="CC BY 4.0",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(SIZE, SIZE, 3), encoding_format="png"),
                    "caption": tfds.features.Text(),
                    "digit": np.int64,
                    "ink": tfds.features.Text(),
                    "paper": tfds.features.Text(),
                    "phrase": np.int64,  # index into PHRASES
                    "place": tfds.features.Tensor(shape=(2,), dtype=np.int64),  # row and column of the digit's corner
                }
            ),
        )

    def _split_generators(self, dl_manager):
        del dl_manager  # nothing to download
        grids, digits = load_grids()
        covers = coverage(grids, style=self.STYLE)
        parts = split_images(digits)
        return {split: self._generate_examples(covers, digits, images, split) for split, images in parts.items()}

    def _generate_examples(self, covers, digits, images, split) -> Iterator[tuple[str, dict]]:
        for image in images:
            phrases = np.random.RandomState([SEED + 1, image]).randint(len(PHRASES), size=len(ALL_PAIRS))
            places = np.random.RandomState([SEED + 2, image]).randint(PLACES, size=(len(ALL_PAIRS), 2))
            for (ink, paper), phrase, place in zip(_pairs_of(int(image), split), phrases, places, strict=False):
                yield (
                    f"{image:04d}_{ink}_{paper}",
                    {
                        "image": _png(_colour(covers[image], ink, paper, tuple(place))),
                        "caption": caption(int(digits[image]), ink, paper, int(phrase)),
                        "digit": int(digits[image]),
                        "ink": ink,
                        "paper": paper,
                        "phrase": int(phrase),
                        "place": place,
                    },
                )


class ItalicDigits(CaptionedDigits):
    """The images of CaptionedDigits slanted, with the same captions."""

    name = "italic_digits"
    STYLE = "italic"
    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First release."}  # noqa: RUF012
