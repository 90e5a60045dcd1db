"""Pre-encoded images: the written data set, training on it, and errors."""

import contextlib
import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds

from lcm_jax import cli, encode, train
from lcm_jax.config import default_config, from_dict
from lcm_jax.data import latents
from lcm_jax.data.batches import batches
from lcm_jax.data.config import DataConfig
from lcm_jax.data.sources import open_data
from lcm_jax.data.sources import tfds as tfds_source
from lcm_jax.digits.presets import write_blank
from lcm_jax.errors import UserError
from lcm_jax.interop.folder import read_folder
from lcm_jax.interop.tokenizer import load_tokenizer
from lcm_jax.training.losses import make_losses
from lcm_jax.training.networks import frozen_params, initial_params, make_parts

SPLIT = "validation[:20]"  # no multiple of a batch


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return str(write_blank("micro", tmp_path_factory.mktemp("micro") / "teacher"))


@pytest.fixture(scope="module")
def options(teacher, digits_data_dir):
    return [
        "--config=configs/digits.py:smoke",
        f"--config.model.folder={teacher}",
        f"--config.data.data_dir={digits_data_dir}",
        f"--config.data.split={SPLIT}",
        "--config.mesh.cpu_devices=0",
        "--batch=8",
    ]


@pytest.fixture(scope="module")
def encoded(options, tmp_path_factory):
    """The version directory of the encoded images."""
    out = tmp_path_factory.mktemp("encoded")
    assert cli.run(encode.main, [*options, f"--out={out}"]) == 0
    return out / "encoded" / "1.0.0"


def test_each_image_with_its_moments_and_captions(encoded, teacher, digits_data_dir):
    records = tfds.builder("captioned_digits", data_dir=digits_data_dir).as_data_source(SPLIT)
    written = open_data(DataConfig(directory=str(encoded), latents=True)).read(range(20))
    vae = read_folder(teacher).components["vae"]
    images = np.stack([record["image"] for record in records]).astype(np.float32) / 127.5 - 1
    mean, logvar = vae.network().apply(vae.params, images, method="encode")
    moments = np.concatenate([mean, logvar], axis=-1)
    assert moments.std() > 0.1
    for record, expected, (found, captions) in zip(records, moments, written, strict=True):
        np.testing.assert_allclose(found.moments, expected, rtol=1e-3, atol=1e-3)
        assert found.sizes.tolist() == [32, 32, 0, 0, 32, 32]
        assert captions == [record["caption"].decode()]


def test_sizes_are_kept(encoded, monkeypatch):
    """A data set that was written without them is refused only by a model that conditions on them."""
    config = DataConfig(directory=str(encoded), latents=True)
    given = {"tokenize": lambda texts: np.zeros((len(texts), 1)), "batch_size": 2, "seed": 0}
    with contextlib.closing(batches(config, sizes=True, **given)) as read:
        assert next(read)["sizes"].tolist() == [[32, 32, 0, 0, 32, 32]] * 2
    monkeypatch.setattr(tfds_source, "SIZES", "no such feature")
    with pytest.raises(UserError, match=r"holds no sizes of the images, .* run lcm_jax.encode again"):
        batches(config, sizes=True, **given)
    with contextlib.closing(batches(config, **given)) as read:
        assert "sizes" not in next(read)


def test_the_loss_is_that_of_the_images(encoded, teacher, digits_data_dir):
    config = default_config()
    config.model.folder = teacher
    config = from_dict(config.to_dict())
    folder = read_folder(teacher)
    tokenize = load_tokenizer(folder)
    losses = []
    for data in (
        DataConfig(data_dir=digits_data_dir, split=SPLIT),
        DataConfig(directory=str(encoded), latents=True),
    ):
        run = dataclasses.replace(config, data=data)
        parts = make_parts(run, folder, tokenize)
        (of,) = make_losses(parts).values()
        draws = of.draw(jax.random.key(0), (8, *parts.latent_shape(32)))
        params = initial_params(run, parts, folder)
        read = batches(data, tokenize=tokenize, batch_size=8, seed=0, vae=folder.components["vae"].params)
        batch = next(read)
        read.close()
        assert {name: (array.shape[1:], array.dtype) for name, array in batch.items()} == {
            name: (leaf.shape, leaf.dtype) for name, leaf in parts.sample_shapes(data).items()
        }
        losses.append(jax.jit(of.loss)(params, params, frozen_params(parts, folder), batch, draws)[0])
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-3)
    assert losses[0] != losses[1]


def test_latents_that_are_not_finite_are_refused(teacher, digits_data_dir):
    config, folder = default_config(), read_folder(teacher, only=("vae",))
    vae = folder.components["vae"]
    vae.params = {**vae.params, "quant_conv.bias": np.full_like(vae.params["quant_conv.bias"], 1e5)}
    data = open_data(DataConfig(data_dir=digits_data_dir, split=SPLIT))
    with pytest.raises(UserError, match=r"gives latents that are not finite in float16, for image 0 of .*captioned"):
        next(encode.encode(config, folder, data, 8))


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--config.data.image_size=64", "was encoded at 32 px, config.data.image_size is 64"),
        ("--config.data.flip=True", "config.data.flip has no effect: latents is true"),
        ("--config.data.image_key=photo", "config.data.image_key has no effect"),
        ("--config.data.max_pixels=9", "config.data.max_pixels has no effect"),
        ("--config.objective=autoencoder", "is trained on images"),
        ("--config.data.split=validation", "has no split 'validation'"),
    ],
)
def test_training_on_it_with_options_that_do_not_fit(encoded, teacher, option, said, tmp_path, capsys):
    given = [
        "--config=configs/digits.py:smoke",
        f"--config.model.folder={teacher}",
        f"--config.data.directory={encoded}",
        "--config.data.latents=True",
        "--config.mesh.cpu_devices=0",
        option,
    ]
    assert cli.run(train.main, [*given, f"--workdir={tmp_path}"]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_it_says_how_the_images_were_prepared(encoded):
    metadata = json.loads((encoded / "metadata.json").read_text())
    prepared = {"image_size": 32, "resize": "lanczos", "crop": "center", "flip": False, "seed": 0}
    assert {name: metadata[name] for name in prepared} == prepared


def test_another_vae(encoded, teacher, tmp_path):
    other = tmp_path / "1.0.0"
    shutil.copytree(encoded, other)
    metadata = json.loads((other / "metadata.json").read_text())
    (other / "metadata.json").write_text(json.dumps({**metadata, "vae": "0" * 16}))
    given = {"tokenize": lambda texts: np.zeros((len(texts), 4), np.int32), "batch_size": 2, "seed": 0}
    vae = read_folder(teacher).components["vae"].params
    with pytest.raises(UserError, match="was encoded by another VAE"):
        batches(DataConfig(directory=str(other), latents=True), vae=vae, **given)
    batches(DataConfig(directory=str(encoded), latents=True), vae=vae, **given).close()
    for content, said in (
        ('{"vae": "0", "x": 1}', "does not record what encoded it"),
        ('{"va', "description cannot be read"),
    ):
        (other / "metadata.json").write_text(content)
        with pytest.raises(UserError, match=said):
            batches(DataConfig(directory=str(other), latents=True), vae=vae, **given)


def test_images_and_encoded_ones_are_not_confused(encoded, digits_data_dir):
    with pytest.raises(UserError, match=r"holds encoded images; read them with --config.data.latents=true"):
        open_data(DataConfig(directory=str(encoded)))
    with pytest.raises(UserError, match="holds no encoded images"):
        open_data(DataConfig(data_dir=digits_data_dir, latents=True))


def test_what_is_there_already_stays(encoded, options, capsys):
    before = {file.name: file.read_bytes() for file in encoded.iterdir()}
    assert cli.run(encode.main, [*options, f"--out={encoded.parent.parent}"]) == 2
    assert "already exists" in capsys.readouterr().err
    assert {file.name: file.read_bytes() for file in encoded.iterdir()} == before


def test_a_damaged_image_is_named_and_nothing_is_left_that_looks_whole(photos, teacher, tmp_path, capsys):
    given = [
        "--config=configs/digits.py:smoke",
        f"--config.model.folder={teacher}",
        f"--config.data.directory={photos}",
        "--config.data.image_key=photo",
        "--config.data.caption_key=title",
        "--config.mesh.cpu_devices=0",
        "--batch=8",
        f"--out={tmp_path}",
    ]
    assert cli.run(encode.main, [*given, "--config.data.split=damaged"]) == 2
    assert "cannot be decoded: Pillow can't decode it: image file is truncated;" in capsys.readouterr().err
    assert not (tmp_path / "encoded" / "1.0.0").exists()
    assert cli.run(encode.main, given) == 0
    assert len(open_data(DataConfig(directory=str(tmp_path / "encoded" / "1.0.0"), latents=True))) == 12


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--batch=0", "--batch=0; it must be at least 1"),
        ("--batch=9", "--batch=9 is not divisible by the 8 devices"),
        ("--config.data.latents=True", "pass the data set that holds the images"),
        ("--config.data.image_size=33", "config.data.image_size=33 is not a multiple of 4"),
    ],
)
def test_bad_input_is_one_line(options, option, said, tmp_path, capsys):
    assert cli.run(encode.main, [*options, option, f"--out={tmp_path}"]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert not (tmp_path / "encoded" / "1.0.0").exists()


def test_a_vae_of_other_groups_did_not_encode_it(encoded, teacher):
    """Its weights may be the same; how latents are scaled is decided later."""
    vae = read_folder(teacher).components["vae"]
    metadata = json.loads((encoded / "metadata.json").read_text())
    for change in ({}, {"scaling_factor": 2.0, "_diffusers_version": "9"}):
        latents.check(metadata, vae.params, 32, "it", {**vae.config, **change})
    other = {**vae.config, "norm_num_groups": 2}
    with pytest.raises(UserError, match=r"^it was encoded by a VAE with another vae/config.json than this folder's"):
        latents.check(metadata, vae.params, 32, "it", other)
    del metadata["vae_config"]  # of an older version
    latents.check(metadata, vae.params, 32, "it", other)
