"""Tiny models for 32 x 32 images, and the packaged classifier."""

import numpy as np
import pytest
import tensorflow_datasets as tfds

from lcm_jax.digits.classifier import load_classifier
from lcm_jax.digits.presets import write_blank
from lcm_jax.families import SD
from lcm_jax.interop.folder import read_folder
from lcm_jax.interop.recipe import Recipe
from lcm_jax.interop.trained_folder import write_lcm_folder

W_DIM = 16
RECIPE = Recipe(
    teacher="micro",
    method="latent consistency distillation",
    weights="ema",
    guidance_min=2.0,
    guidance_max=4.0,
    original_inference_steps=50,
    timestep_scaling=10.0,
    w_embedding_dim=W_DIM,
    steps=1,
    batch_size=1,
    learning_rate=1e-4,
    ema_decay=0.9,
    options={"solver": "ddim", "skip": 20, "distance": "huber"},
)


@pytest.fixture(scope="session")
def digits_builder(digits_data_dir):
    return tfds.builder("captioned_digits", data_dir=digits_data_dir)


@pytest.fixture(scope="session")
def classifier():
    return load_classifier()


@pytest.fixture(scope="session")
def micro_teacher(tmp_path_factory):
    """The folder of a diffusion model."""
    return write_blank("micro", tmp_path_factory.mktemp("micro") / "teacher")


@pytest.fixture(scope="session")
def micro_student(micro_teacher, tmp_path_factory):
    """The folder of a consistency model with the VAE of `micro_teacher`."""
    teacher = read_folder(micro_teacher)
    params = teacher.components["unet"].params
    width = params["time_embedding.linear_1.kernel"].shape[0]
    random = np.random.default_rng(0)
    params = {**params, SD.w_projection: random.standard_normal((W_DIM, width), np.float32)}
    return write_lcm_folder(teacher, params, tmp_path_factory.mktemp("micro_lcm") / "lcm", recipe=RECIPE)
