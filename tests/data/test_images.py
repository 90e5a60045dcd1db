"""Decoding of image files: sample types, limits, damage, resizing."""

import io
import zlib

import numpy as np
import pytest
from image_files import KINDS, RAMP, RGB, SIZE, encode, png, rows, samples, tiff
from little_photos import photo_pixels
from PIL import Image, features

from lcm_jax.data import batches, images
from lcm_jax.data.config import DataConfig
from lcm_jax.data.images import BadImage


def prepare_image(*args, **options):
    return batches.prepare_image(*args, **options).pixels


@pytest.mark.parametrize("kind", KINDS)
def test_black_is_black_and_white_white(kind):
    shown = prepare_image(KINDS[kind](), DataConfig(image_size=SIZE)).astype(float)
    allowed = 8 if "palette" in kind else 4 if kind in ("LAB", "CMYK, JPEG") else 1.01
    np.testing.assert_allclose(shown, np.repeat(RAMP[..., None] * 255, 3, -1), atol=allowed)


def test_one_bit():
    checks = np.indices((SIZE, SIZE)).sum(0) % 2
    for file in (encode(Image.fromarray(checks.astype(bool)), form) for form in ("PNG", "TIFF")):
        assert (prepare_image(file, DataConfig(image_size=SIZE))[..., 0] == checks * 255).all()


def test_the_range_is_not_that_of_one_image():
    dark = encode(Image.fromarray(samples(np.uint16, 65535) // 4), "PNG")
    assert prepare_image(dark, DataConfig(image_size=SIZE)).max() == 64
    black = Image.new("I;16", (SIZE, SIZE))
    assert not prepare_image(encode(black, "PNG"), DataConfig(image_size=SIZE)).any()


NAN = np.where(RAMP > 0.9, np.nan, RAMP)


@pytest.mark.parametrize(
    ("samples", "what"),
    [
        (RAMP.astype("<f4") * 255, "samples are in 0 … 255, but the file's black is 0 and its white 1; rescale it"),
        (RAMP.astype("<f4") - 0.5, "samples are in -0.5 … 0.5"),
        (NAN.astype("<f4"), "samples are in nan … nan"),
        (samples("<i4", 255), "its largest sample is 255, but the file's white is 2.14748e+09"),
        (samples("<u4", 65535), "its largest sample is 65535, but the file's white is 4.29497e+09"),
        (
            samples("<i2", 1000) - np.int16(500),
            "samples are in -500 … 500, but the file's black is 0 and its white 32767",
        ),
        (samples("<i1", 127), "signed 8-bit"),
        (RAMP.astype("<f8"), "Pillow finds no header"),
    ],
)
def test_samples_without_a_range(samples, what):
    with pytest.raises(BadImage) as caught:
        prepare_image(tiff(samples), DataConfig(image_size=SIZE))
    assert what in str(caught.value)


def test_a_color_that_stands_for_transparency():
    """Only this color becomes white; for 16 bits Pillow compares the lower 8 of a color with the upper 8."""
    config, key = DataConfig(image_size=SIZE), (40 * 256 + 3).to_bytes(2)
    values = np.full((SIZE, SIZE), 40 * 256 + 3, ">u2")
    values[:, SIZE // 2 :] = 3 * 256 + 40
    for file in (
        png(SIZE, SIZE, (b"tRNS", key), rows(values), bits=16, color=0),
        png(SIZE, SIZE, (b"tRNS", 3 * key), rows(np.repeat(values, 3, 1)), bits=16),
    ):
        assert (prepare_image(file, config) == np.where(values == values[0, 0], 255, 3)[..., None]).all()


def test_only_the_first_frame_is_read():
    """Later frames, or pages of a TIFF, may be missing."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8)
    first, others = Image.new("L", (64, 64), 77), [Image.fromarray(noise)] * 2
    for form in ("GIF", "WEBP", "TIFF", "PNG", "MPO"):
        file = encode(first, form, save_all=True, append_images=others)
        assert (np.abs(prepare_image(file, DataConfig(image_size=8)).astype(int) - 77) <= 1).all()
        if form in ("GIF", "PNG"):
            assert (prepare_image(file[:-3000], DataConfig(image_size=8)) == 77).all()


# ---- limits


def jpeg(width, height, **options):
    return encode(Image.linear_gradient("L").resize((width, height)), "JPEG", **options)


@pytest.mark.parametrize(("width", "height"), [(8001, 8000), (13_000, 13_000), (2**31 - 1, 2**31 - 1)])
def test_the_limit_is_checked_before_anything_is_decoded(width, height):
    """The file has no pixels, so it would be damaged if it were read; Pillow's own warning would be an error here."""
    with pytest.raises(BadImage, match=f"it has {width} x {height} pixels, more than config.data.max_pixels=64000000"):
        prepare_image(png(width, height), DataConfig())
    assert Image.MAX_IMAGE_PIXELS
    with pytest.raises(BadImage, match="Pillow can't decode it"):
        prepare_image(png(*min((width, height), (15_000, 15_000))), DataConfig(max_pixels=10**9))


def test_a_large_jpeg_is_decoded_at_a_reduced_scale():
    file = jpeg(4200, 4100)
    assert images.decode(file, 100, 10**8).image.size == (525, 513)
    assert images.decode(file, 1024, 10**8).image.size == (2100, 2050)
    assert images.decode(file, 1026, 10**8).image.size == (4200, 4100)  # half of it would be less than twice the size
    whole = np.asarray(Image.open(io.BytesIO(file)).convert("RGB").resize((102, 100), Image.Resampling.LANCZOS))
    found = prepare_image(file, DataConfig(image_size=100)).astype(int)
    assert np.abs(found - whole[:, 1:101]).max() <= 2


def test_other_jpegs_are_decoded_in_full():
    assert images.decode(jpeg(4000, 4000), 32, 10**8).image.size == (4000, 4000)


@pytest.mark.parametrize("shape", [(1, 2000), (2000, 1), (1, 1)])
def test_a_strip_is_not_resized_as_a_whole(shape, monkeypatch):
    resize, sizes = Image.Image.resize, []

    def spy(image, size, *options):
        sizes.append(size)
        return resize(image, size, *options)

    monkeypatch.setattr(Image.Image, "resize", spy)
    ramp = np.linspace(0, 255, max(shape)).astype(np.uint8).reshape(shape)
    file, config = encode(Image.fromarray(ramp), "PNG"), DataConfig(image_size=64)
    for place, value in ((0, 0), (0.5, 127), (0.999, 255)):
        assert np.abs(prepare_image(file, config, place).astype(int) - (value if max(shape) > 1 else 0)).max() <= 2
    assert max(width * height for width, height in sizes) <= 16 * 64 * 64


def test_large_images_are_converted_part_by_part(monkeypatch):
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 4), np.uint8)
    for file in (encode(Image.fromarray(noise), "PNG"), encode(Image.fromarray(noise.view(np.uint16)[..., 0]), "PNG")):
        whole = np.asarray(images.decode(file, 32, 10**6).image)
        for band in (50, 1000):  # less than a row, and several rows
            monkeypatch.setattr(images, "_BAND", band)
            np.testing.assert_array_equal(images.decode(file, 32, 10**6).image, whole)
        monkeypatch.undo()


# ---- damage


def text_chunk():
    return png(8, 8, (b"zTXt", b"note\0\0" + zlib.compress(bytes(2**21))), rows(np.zeros((8, 24), np.uint8)))


def profile_chunk():
    return png(8, 8, (b"iCCP", b"icc\0\0" + zlib.compress(bytes(2**21))), rows(np.zeros((8, 24), np.uint8)))


@pytest.mark.parametrize(
    ("file", "what"),
    [
        (lambda: b"", "finds no header of PNG, JPEG"),
        (lambda: b"<!DOCTYPE html>", "finds no header"),
        (lambda: encode(RGB, "EPS"), "finds no header"),
        (lambda: encode(RGB, "PNG")[:-40], "truncated"),
        (lambda: jpeg(200, 100)[:-40], "truncated"),
        (lambda: encode(RGB, "WEBP")[:-8], "may be damaged"),
        (text_chunk, "Decompressed data too large"),
        (profile_chunk, "Decompressed data too large"),
    ],
)
def test_damaged_files(file, what):
    with pytest.raises(BadImage) as caught:
        prepare_image(file(), DataConfig(image_size=8))
    assert what in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "JPEG2000", "AVIF", "PPM"])
def test_flipped_bits_give_an_image_or_a_bad_one(form):
    if form == "AVIF" and not features.check("avif"):
        form = "PNG"
    whole, rng, config, bad = encode(RGB, form), np.random.default_rng(0), DataConfig(image_size=8), []
    for _ in range(60):
        data = bytearray(whole)
        for place in rng.integers(0, min(len(data), 400), 2):
            data[place] ^= 1 << rng.integers(8)
        try:
            assert prepare_image(bytes(data), config).shape == (8, 8, 3)
        except BadImage as error:
            bad.append(str(error))
    assert "\n" not in "".join(bad)


# ---- resizing


@pytest.mark.parametrize("resize", ["lanczos", "bicubic"])
@pytest.mark.parametrize("i", [0, 1])
def test_shorter_side_is_resized_then_cropped(i, resize):
    pixels = photo_pixels(i)
    config = DataConfig(image_size=20, resize=resize)
    filters = {"lanczos": Image.Resampling.LANCZOS, "bicubic": Image.Resampling.BICUBIC}
    whole = np.asarray(Image.fromarray(pixels).resize((30, 20) if i == 0 else (20, 30), filters[resize]))
    np.testing.assert_array_equal(
        prepare_image(encode(Image.fromarray(pixels), "PNG"), config), whole[:, 5:25] if i == 0 else whole[5:25]
    )
    left = prepare_image(encode(Image.fromarray(pixels), "PNG"), config, place=0)
    right = prepare_image(encode(Image.fromarray(pixels), "PNG"), config, place=0.999)
    np.testing.assert_array_equal(left, whole[:20, :20])
    np.testing.assert_array_equal(right, whole[-20:, -20:])
    np.testing.assert_array_equal(
        prepare_image(encode(Image.fromarray(pixels), "PNG"), config, 0, mirror=True), whole[:20, :20][:, ::-1]
    )


def test_image_of_the_right_size_is_left_alone():
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    np.testing.assert_array_equal(
        prepare_image(encode(Image.fromarray(pixels), "PNG"), DataConfig(image_size=16)), pixels
    )
    larger = prepare_image(encode(Image.fromarray(pixels), "PNG"), DataConfig(image_size=50))
    assert larger.shape == (50, 50, 3)


def test_gray_transparent_and_turned_images():
    config = DataConfig(image_size=8)
    assert (prepare_image(encode(Image.new("L", (8, 8), 77), "PNG"), config) == 77).all()
    half = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    half.paste((0, 0, 255, 255), (0, 0, 4, 8))
    shown = prepare_image(encode(half, "PNG"), config)
    assert (shown[:, :4] == (0, 0, 255)).all()
    assert (shown[:, 4:] == 255).all()
    turned = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 3  # turned by half a circle
    gradient = Image.fromarray(np.repeat(np.arange(0, 256, 32, dtype=np.uint8)[None], 8, 0))
    gradient.save(turned, format="PNG", exif=exif)
    assert prepare_image(turned.getvalue(), config)[0, 0, 0] == 224


@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize("shape", [(30, 60), (90, 30), (1, 40)])  # height, width; the last is cut before it is resized
def test_sizes_are_those_of_the_file_and_of_the_crop(shape, mirror):
    """A column's and a row's number is its grey value: the crop's corner shows where it was taken from."""
    height, width = shape
    grid = np.stack([*np.indices(shape, np.uint8), np.zeros(shape, np.uint8)], -1)
    size = min(shape)
    pixels, sizes = batches.prepare_image(
        encode(Image.fromarray(grid), "PNG"), DataConfig(image_size=size), 0.3, mirror
    )
    top, left = pixels[0, 0, :2]
    assert sizes.tolist() == [height, width, top, width - 1 - left if mirror else left, size, size]


def test_sizes_of_what_is_resized_and_turned():
    """Original height and width are those of the upright image; the corner lies in the resized one."""
    exif = Image.Exif()
    exif[274] = 6  # turned by a quarter
    file = encode(Image.fromarray(np.zeros((40, 80, 3), np.uint8)), "JPEG", exif=exif)
    assert batches.prepare_image(file, DataConfig(image_size=20), 0.5).sizes.tolist() == [80, 40, 10, 0, 20, 20]
    large = encode(Image.fromarray(np.zeros((4200, 4100, 3), np.uint8)), "JPEG")  # decoded at a reduced scale
    assert batches.prepare_image(large, DataConfig(image_size=100), 0.0).sizes.tolist() == [4200, 4100, 0, 0, 100, 100]
