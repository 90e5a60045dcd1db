import io
import itertools
import re
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from lcm_jax.data.sources.tfds import PROVIDED
from lcm_jax.digits import dataset
from lcm_jax.digits.dataset import ALL_PAIRS, COLOURS, HELD_OUT_PAIRS, SEEN_PAIRS, caption, render
from lcm_jax.errors import UserError


@pytest.fixture(scope="module")
def grids():
    return dataset.load_grids()


def examples(builder, split):
    return builder.as_data_source(split=split, decoders={"image": tfds.decode.SkipDecoding()})


def test_every_builder_is_found_by_its_name():
    """In a process that has imported nothing of the digits: a name is what imports them."""
    builders = {dataset.CaptionedDigits.name, *(each.name for each in dataset.CaptionedDigits.__subclasses__())}
    assert builders == set(PROVIDED)
    assert len(builders) == len(dataset.STYLES)


def test_draw_puts_the_digit_at_its_place():
    image = render(np.full((8, 8), 16.0), "red", "blue", (0, 8))
    assert image.shape == (32, 32, 3)
    assert image.dtype == np.uint8
    assert (image[:24, 8:] == (255, 0, 0)).all()
    assert (image[24:] == (0, 0, 255)).all()
    assert (image[:, :8] == (0, 0, 255)).all()
    np.testing.assert_array_equal(render(np.full((8, 8), 16.0), "red", "blue")[4:28, 4:28], image[:24, 8:])
    assert (render(np.zeros((8, 8)), "red", "blue") == (0, 0, 255)).all()
    # each grid cell covers three pixels, and the orientation is kept
    corner = np.zeros((8, 8))
    corner[0, :4] = 16
    image = render(corner, "white", "black", (0, 0))[..., 0]
    assert (image[:2, :11] == 255).all()
    assert (image[5:] == 0).all()
    assert (image[:, 14:] == 0).all()


@pytest.mark.parametrize("place", [(-1, 0), (0, 9), (9, 0)])
def test_a_place_outside(place):
    with pytest.raises(UserError, match="each number must be from 0 to 8"):
        render(np.zeros((8, 8)), "red", "blue", place)


def test_coverage_is_smoothstep_of_bicubic(grids):
    grid = grids[0][3]
    value = np.asarray(Image.fromarray(np.float32(grid / 16)).resize((24, 24), Image.Resampling.BICUBIC))
    s = np.clip((value - 0.3) / 0.4, 0, 1)
    np.testing.assert_allclose(dataset.coverage(grid), s**2 * (3 - 2 * s), atol=1e-5)
    np.testing.assert_array_equal(dataset.coverage(grids[0][:5])[3], dataset.coverage(grid))


def test_italic_digits_are_slanted():
    """By 0.6 pixels to the right per pixel of height, about the middle; the amount of ink is kept."""
    bar = np.zeros((8, 8))
    bar[:, 3:5] = 16
    upright, italic = (dataset.coverage(bar, style=style) for style in dataset.STYLES)
    columns = np.arange(24)
    centres = [(cover * columns).sum(1) / cover.sum(1) for cover in (upright, italic)]
    np.testing.assert_allclose(centres[0], 11.5, atol=0.01)
    np.testing.assert_allclose(centres[1], 11.5 - 0.6 * (np.arange(24) - 11.5), atol=0.15)
    assert italic.sum() == pytest.approx(upright.sum(), rel=0.02)
    with pytest.raises(UserError, match="style is 'bold'"):
        render(bar, "red", "blue", style="bold")


def test_italic_digits_differ_in_style_only(tmp_path):
    def generated(name):
        splits = tfds.builder(name, data_dir=tmp_path)._split_generators(None)
        return dict(itertools.islice(splits["validation"], 9))

    upright, italic = generated("captioned_digits"), generated("italic_digits")
    assert upright.keys() == italic.keys()
    for key, plain in upright.items():
        other = italic[key]
        images = [np.asarray(Image.open(example.pop("image"))) for example in (plain, other)]
        assert (images[0] != images[1]).any()
        assert plain.pop("place").tolist() == other.pop("place").tolist()
        assert plain == other


def test_a_drawn_digit_can_be_read(grids):
    """The nearest neighbour of almost every digit has the same label, so nothing is mirrored or mixed up."""
    covers = dataset.coverage(grids[0][:600]).reshape(600, -1)
    distance = ((covers[:, None, ::7] - covers[None, :, ::7]) ** 2).sum(-1)
    np.fill_diagonal(distance, np.inf)
    assert (grids[1][:600][distance.argmin(1)] == grids[1][:600]).mean() > 0.95


def test_captions():
    assert caption(7, "red", "blue") == "a red seven on a blue background"
    assert caption(7, "red", "blue", 1) == "the digit seven in red on blue"
    assert caption(7, "red", "blue", 2) == "a handwritten red seven, blue background"
    assert len({caption(d, *p, k) for d in range(10) for p in ALL_PAIRS for k in range(5)}) == 10 * 56 * 5


@pytest.mark.parametrize("make", [lambda: caption(1, "rde", "blue"), lambda: render(np.zeros((8, 8)), "red", "bleu")])
def test_unknown_colour(make):
    with pytest.raises(UserError, match=r"did you mean '(red|blue)'"):
        make()


def test_held_out_pairs_are_even():
    assert len(ALL_PAIRS) == 56
    assert len(HELD_OUT_PAIRS) == 8
    assert {ink for ink, _ in HELD_OUT_PAIRS} == set(COLOURS) == {paper for _, paper in HELD_OUT_PAIRS}
    assert set(SEEN_PAIRS) == set(ALL_PAIRS) - set(HELD_OUT_PAIRS)
    assert ("red", "blue") in SEEN_PAIRS  # the prompt of the demonstration
    # must never change: models are evaluated on pairs that were held out of their training
    assert HELD_OUT_PAIRS[:3] == (("black", "green"), ("white", "cyan"), ("red", "yellow"))


def test_splits_share_no_image_and_are_stratified(grids):
    parts = dataset.split_images(grids[1])
    assert {name: len(part) for name, part in parts.items()} == {"train": 1300, "validation": 200, "test": 297}
    assert sorted(np.concatenate(list(parts.values()))) == list(range(1797))
    whole = np.bincount(grids[1]) / 1797
    for part in parts.values():
        assert abs(np.bincount(grids[1][part]) - whole * len(part)).max() < 2


def test_prepared_set(digits_builder, grids):
    assert digits_builder.info.file_format == tfds.core.FileFormat.ARRAY_RECORD
    parts = dataset.split_images(grids[1])
    pairs = {}
    for split, images in parts.items():
        stored = examples(digits_builder, split)
        records = stored.__getitems__(range(len(stored)))
        pairs[split] = {(r["ink"].decode(), r["paper"].decode()) for r in records}
        np.testing.assert_array_equal(
            np.unique([r["digit"] for r in records], return_counts=True)[1],
            np.bincount(grids[1][images]) * len(records) // len(images),
        )
        assert {r["phrase"] for r in records} == set(range(5))
        assert {tuple(r["place"].tolist()) for r in records} == {(i, j) for i in range(9) for j in range(9)}
        for r in records[::97]:
            words = (int(r["digit"]), r["ink"].decode(), r["paper"].decode(), int(r["phrase"]))
            assert r["caption"].decode() == caption(*words)
            pixels = np.asarray(Image.open(io.BytesIO(r["image"])))
            candidates = (p for p in images if grids[1][p] == words[0])
            place = tuple(r["place"].tolist())
            assert any((render(grids[0][p], *words[1:3], place) == pixels).all() for p in candidates)
    assert len(examples(digits_builder, "train")) == 1300 * 16
    assert len(examples(digits_builder, "test")) == 297 * 8
    assert pairs["train"] == pairs["validation"] == set(SEEN_PAIRS)
    assert pairs["test"] == set(ALL_PAIRS)


def test_examples_are_the_same_every_time(grids):
    def some():
        builder = dataset.CaptionedDigits
        made = builder._generate_examples(None, dataset.coverage(grids[0]), grids[1], [5, 9], "train")
        return [(key, example["caption"], example["image"].getvalue()) for key, example in made]

    np.random.seed(1)
    first = some()
    np.random.seed(2)
    assert first == some()
    assert len({key for key, *_ in first}) == 32


def test_no_tensorflow_and_nothing_on_the_screen(tmp_path):
    """Preparing and reading in a new process prints one line to stderr and does not import TensorFlow."""
    code = f"""
import sys, warnings
warnings.simplefilter("error")
import numpy as np
from lcm_jax.digits import dataset
from lcm_jax.data.batches import batches
from lcm_jax.data.config import DataConfig
dataset.PAIRS_PER_IMAGE.update(train=1, validation=1, test=1)  # a small set, to save time
made = batches(DataConfig(data_dir={str(tmp_path)!r}), tokenize=lambda c: np.zeros((len(c), 4)), batch_size=8, seed=0)
assert next(made)["image"].shape == (8, 32, 32, 3)
made.close()
assert not [m for m in sys.modules if m.split(".")[0] in ("tensorflow", "torch")]
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert re.fullmatch(r"preparing captioned_digits in \S+\n", done.stderr)


def test_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(UserError, match=r"pip install 'lcm_jax\[demo\]'"):
        dataset.load_grids()
