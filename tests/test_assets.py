"""The packaged teacher: diffusers runs it and models exported from it, as a user would."""

import pathlib

import numpy as np
import pytest

import lcm_jax
from lcm_jax.config_file import load
from lcm_jax.digits import teacher_rows
from lcm_jax.export import recipe_of
from lcm_jax.interop.folder import read_folder
from lcm_jax.interop.tokenizer import load_tokenizer
from lcm_jax.interop.trained_folder import write_lcm_folder
from lcm_jax.training.networks import initial_params, make_parts

ROOT = pathlib.Path(__file__).resolve().parent.parent
PROMPT = "a red seven on a blue background"


@pytest.fixture(scope="module")
def config():
    return load(str(ROOT / "configs" / "digits.py"))


def test_it_is_small_and_in_half_precision(config):
    files = [path for path in pathlib.Path(config.model.folder).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 12e6
    components = read_folder(config.model.folder, only=("unet", "text_encoder")).components
    for component in components.values():
        assert {array.dtype for array in component.params.values()} == {np.dtype("float16")}


def test_diffusers_runs_it_without_being_told_a_dtype(config):
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(config.model.folder)
    pipe.set_progress_bar_config(disable=True)
    assert pipe(PROMPT, num_inference_steps=1, output_type="np").images.shape == (1, 32, 32, 3)


def test_diffusers_runs_what_is_exported_from_it(config, tmp_path):
    """The folder has a float32 UNet and the teacher's float16 text encoder."""
    from diffusers import LatentConsistencyModelPipeline

    folder = read_folder(config.model.folder)
    params = initial_params(config, make_parts(config, folder, load_tokenizer(folder)), folder)["unet"]
    out = write_lcm_folder(folder, params, tmp_path / "lcm", recipe=recipe_of(config, folder, "ema", 0))
    pipe = LatentConsistencyModelPipeline.from_pretrained(out)
    pipe.set_progress_bar_config(disable=True)
    assert pipe(PROMPT, num_inference_steps=1, output_type="np").images.shape == (1, 32, 32, 3)


def test_its_evaluation_is_its_own(config):
    """The packaged rows were measured with the packaged files."""
    rows, machine = teacher_rows.shipped()
    assert [(row.name, row.steps) for row in rows] == [
        (n, s) for n in teacher_rows.SAMPLERS.values() for s in teacher_rows.STEPS
    ]
    assert teacher_rows.folder_hash(pathlib.Path(config.model.folder)) == teacher_rows.folder_hash(teacher_rows.TEACHER)
    assert machine


def test_it_draws_the_colours_that_it_is_asked_for(config):
    image = lcm_jax.load_pipeline(config.model.folder)(PROMPT, steps=4, guidance_scale=3.0, seed=0)[0].astype(int)
    red, blue = np.array([255, 0, 0]), np.array([0, 0, 255])
    near = [np.abs(image - colour).max(-1) < 80 for colour in (red, blue)]
    assert (near[0] | near[1]).mean() > 0.7
    assert min(near[0].mean(), near[1].mean()) > 0.1
