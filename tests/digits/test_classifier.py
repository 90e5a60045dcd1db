"""Tests of the classifier: packaged weights, training, command."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcm_jax.digits import classifier as module
from lcm_jax.digits import evaluation_set
from lcm_jax.digits.classifier import (
    CHUNK,
    STYLE_WEIGHTS,
    WEIGHTS,
    load_classifier,
    real_accuracy,
    style_accuracy,
    train_classifier,
)
from lcm_jax.digits.colours import NAMES
from lcm_jax.digits.dataset import STYLES, load_grids
from lcm_jax.digits.evaluation_set import real_images
from lcm_jax.errors import UserError


def test_it_reads_real_test_digits(classifier):
    assert real_accuracy(classifier) >= 0.98


def test_it_tells_the_styles_of_real_test_digits_apart():
    of_styles = load_classifier(STYLE_WEIGHTS)
    for style in STYLES:
        assert real_accuracy(of_styles, style) >= 0.97, style
        assert style_accuracy(of_styles, style) >= 0.98, style


def test_an_image_is_read_alike_in_any_company(classifier):
    images = real_images(evaluation_set.test_prompts()[: CHUNK + 5], "test")
    features, read = classifier(images)
    assert features.shape == (CHUNK + 5, module.FEATURES)
    assert read.shape == (CHUNK + 5,)
    for part in (slice(3), slice(-4, None)):
        some, some_read = classifier(images[part])
        np.testing.assert_allclose(some, features[part], rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(some_read, read[part])


def test_features_are_what_the_answers_are_read_from(classifier):
    images = real_images(evaluation_set.test_prompts()[:20], "test")
    features, read = classifier(images)
    kernel, bias = classifier.params["digit.kernel"], classifier.params["digit.bias"]
    np.testing.assert_array_equal((features @ kernel + bias).argmax(-1), read)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "No such file or directory"),
        (lambda path: path.write_bytes(path.read_bytes()[:-9]), "incomplete metadata"),
        (lambda path: path.write_bytes(b"no weights, but something that is long enough"), "header"),
        (lambda path: (path.unlink(), path.mkdir()), "No such device"),
    ],
)
def test_damaged_weights(tmp_path, damage, message):
    path = tmp_path / "digits.safetensors"
    path.write_bytes(WEIGHTS.read_bytes())
    damage(path)
    with pytest.raises(UserError, match=message) as error:
        load_classifier(path)
    assert str(error.value).startswith(f"{path} can't be read: ")
    assert str(error.value).endswith(f"python -m lcm_jax.digits.classifier --out={path}")
    assert "\n" not in str(error.value)


def test_weights_of_something_else(micro_teacher):
    path = micro_teacher / "unet/diffusion_pytorch_model.safetensors"
    with pytest.raises(UserError, match=r"diffusion_pytorch_model.safetensors: parameters do not fit; missing: conv1"):
        load_classifier(path)


def test_a_short_training_learns(monkeypatch):
    """It learns the colours almost completely, and separates two digits better than chance."""
    grids, labels = load_grids()
    two = np.isin(labels, (4, 7))
    monkeypatch.setattr(module, "load_grids", lambda: (grids[two], labels[two]))
    trained = train_classifier(400, batch_size=32)
    prompts = [p for p in evaluation_set.test_prompts() if p.digit in (4, 7)]
    images = jnp.asarray(real_images(prompts, "test"), jnp.float32) / 127.5 - 1
    _, logits = jax.jit(module._network(styles=False).apply)(trained.params, images)
    answers = {
        "digit": [p.digit for p in prompts],
        "ink": [NAMES.index(p.ink) for p in prompts],
        "paper": [NAMES.index(p.paper) for p in prompts],
    }
    right = {name: np.mean(logits[name].argmax(-1) == np.array(answers[name])) for name in answers}
    assert right["digit"] > 0.65
    assert min(right["ink"], right["paper"]) > 0.95


def test_the_style_is_trained_where_it_is_asked_for():
    trained = train_classifier(2, batch_size=4, styles=True)
    assert np.any(trained.params["style.bias"])  # initialized to zero
    assert trained.styles(real_images(evaluation_set.test_prompts()[:3], "test", "italic")).shape == (3,)
    assert "style.kernel" not in train_classifier(1, batch_size=2).params


def test_training_digits_lie_anywhere_and_are_warped_a_little():
    """Each is warped differently, by at most 10 degrees and 10 %."""
    square = jnp.zeros((24, 24)).at[4:20, 4:20].set(1.0)
    warped = np.asarray(jax.vmap(module._warped, (0, None))(jax.random.split(jax.random.key(0), 400), square))
    assert warped.shape == (400, 32, 32)
    place = np.arange(32) - 15.5
    mass = warped.sum((1, 2))
    for axis in (1, 2):
        centre = (warped.sum(3 - axis) * place).sum(-1) / mass
        assert -5.5 < centre.min() < -4
        assert 4 < centre.max() < 5.5
    side = np.sqrt(mass)
    assert 16 / 1.12 < side.min() < 15 < 17 < side.max() < 16 / 0.88
    assert len({w.tobytes() for w in warped}) == 400


def test_command(tmp_path, monkeypatch, classifier, capsys):
    trained = []
    monkeypatch.setattr(module, "train_classifier", lambda steps, styles: trained.append((steps, styles)) or classifier)
    monkeypatch.setattr(module, "real_accuracy", lambda _: 0.98765)
    out = tmp_path / "new" / "digits.safetensors"
    assert module.main([f"--out={out}", "--steps=7"]) == 0
    assert trained == [(7, False)]
    again = load_classifier(out).params
    assert all(np.array_equal(again[name], classifier.params[name]) for name in classifier.params)
    assert capsys.readouterr().out == f"{out}: 98.77 % of the real test digits classified correctly\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out=x", "--steps=0"], "--steps=0 must be at least 1"),
        (["--out=x", "--steps=many"], "--steps=many: it must be a whole number"),
        ([], "the following arguments are required: --out"),
        (["--out=."], r"--out=\. is a folder; give a file name"),
        (["--out=/proc/nowhere/x"], "--out: /proc/nowhere can't be written: No such file or directory"),
        (["--out=file/x"], "--out: file is a file; choose a folder"),
    ],
    ids=str,
)
def test_mistakes_are_found_before_the_training(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(module, "train_classifier", None)
    with pytest.raises(UserError, match=f"^{message}$"):
        module.main(arguments)
