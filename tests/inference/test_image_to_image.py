"""Image to image: where sampling starts, and which images and strengths are refused."""

import jax.numpy as jnp
import numpy as np
import pytest

from lcm_jax.diffusion.schedule import Schedule
from lcm_jax.errors import UserError
from lcm_jax.families import SD
from lcm_jax.inference import image_to_image, noise
from lcm_jax.inference.request import Request
from lcm_jax.inference.rules import Rules


class Folder:
    """A Stable Diffusion folder as `Rules` sees it."""

    path = "folder"

    def __init__(self, pipeline_class, scheduler_class, **scheduler):
        self.pipeline_class, self.scheduler_class, self.scheduler = pipeline_class, scheduler_class, scheduler


def settings(folder, dim, *args, **options):
    return Rules(folder, SD, Schedule(), dim, None).settings(*args, from_image=True, **options)


@pytest.mark.parametrize(
    ("steps", "strength", "of_lcm", "of_sd"),
    [
        (4, 0.5, [499, 379, 259, 139], [499, 259]),
        (4, 0.8, [799, 599, 399, 199], [759, 499, 259]),
        (8, 0.6, [599, 539, 459, 379, 299, 239, 159, 79], [499, 379, 259, 139]),
    ],
)
def test_timesteps_are_those_of_each_pipeline_of_diffusers(steps, strength, of_lcm, of_sd):
    """Recorded from LatentConsistencyModelImg2ImgPipeline, and StableDiffusionImg2ImgPipeline with an LCMScheduler."""
    lcm = Folder("LatentConsistencyModelPipeline", "LCMScheduler")
    assert settings(lcm, 8, steps, strength=strength).timesteps.tolist() == of_lcm
    sd = Folder("StableDiffusionPipeline", "LCMScheduler")
    assert settings(sd, 0, steps, strength=strength).timesteps.tolist() == of_sd
    assert len(settings(sd, 0, 10).timesteps) == 8  # the default strength is 0.8


def test_wrong_strengths():
    sd = Folder("StableDiffusionPipeline", "DDIMScheduler")
    with pytest.raises(UserError, match=r"strength 0.3 leaves none of 2 steps; raise strength or steps"):
        settings(sd, 0, 2, strength=0.3)
    with pytest.raises(UserError, match=r"strength is 1.5; it must be above 0 and at most 1"):
        settings(sd, 0, 2, strength=1.5)
    with pytest.raises(UserError, match="strength has no effect without an image"):
        Rules(sd, SD, Schedule(), 0, None).settings(4, strength=0.5)
    with pytest.raises(UserError, match="give strength or timesteps, not both"):
        settings(sd, 0, strength=0.5, timesteps=[500])


def test_it_starts_from_the_noised_image():
    """Of a batch of two, padded: each image at the first timestep, with its own noise."""
    process, shape = Schedule(), (3, 2, 2, 4)
    chosen = settings(Folder("StableDiffusionPipeline", "DDIMScheduler"), 0, 4, strength=0.5)
    start = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    options = {"images_per_prompt": 1, "batch_size": 2, "first_image": 0, "latents": None, "noise": None}
    parts = list(Request.checked(process, chosen, shape, seed=1, start=start, **options).parts())
    t, eps = chosen.timesteps[0], noise.draw(noise.seed_key(1), np.uint32(0), shape, 0)[0]
    expected = process.alpha(jnp.asarray(t)) * start + process.sigma(jnp.asarray(t)) * eps
    np.testing.assert_allclose(np.concatenate([part.z_T[: part.count] for part in parts]), expected, atol=1e-6)


def test_images_become_latents():
    seen = []

    def vae(images, noise, method):
        seen.append((images.shape, float(images.min()), float(images.max()), noise, method))
        return images[:, ::2, ::2, :1] * jnp.ones(4)

    image = np.zeros((3, 4, 6, 3), np.uint8)
    image[1], image[2] = 255, 51
    ours = image_to_image.initial_latents(vae, image_to_image.image_array(image, 4), 6, 2, 2)
    np.testing.assert_allclose(ours[:, 0, 0, 0], [-1, -1, 1, 1, -0.6, -0.6], atol=1e-6)  # two of each prompt
    assert [shape for shape, *_ in seen] == [(2, 4, 6, 3)] * 2  # one program
    assert seen[0][1:] == (-1.0, 1.0, None, "to_latents")
    unit = image_to_image.image_array(image / 255, 4)
    np.testing.assert_allclose(image_to_image.initial_latents(vae, unit, 3, 1, 4), ours[::2], atol=1e-6)
    own = np.ones((2, 3, 4), np.float32)
    assert (
        image_to_image.initial_latents(vae, image_to_image.image_array(own, 4), 5, 1, 4) == np.stack([own] * 5)
    ).all()
    assert image_to_image.image_size(own[None], 8) == (16, 24)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((4, 4), np.uint8), r"image has the shape \(4, 4\); it must be uint8 or float in \[0, 1\]"),
        (np.zeros((4, 4, 3), np.int64), "image has the dtype int64"),
        (np.full((4, 4, 3), 2.0), r"image has values outside \[0, 1\]"),
        (np.full((4, 4, 4), np.nan), "image has values that are not finite"),
        ("sketch.png", "image is a path; open it"),
    ],
    ids=["gray", "int64", "range", "nan", "path"],
)
def test_what_is_no_image(image, message):
    with pytest.raises(UserError, match=message):
        image_to_image.image_array(image, 4)


def test_sizes_and_counts_that_do_not_fit():
    with pytest.raises(UserError, match="image is 12 x 16 pixels; both must be multiples of 8: crop or resize it"):
        image_to_image.image_size(np.zeros((1, 12, 16, 3)), 8)
    with pytest.raises(UserError, match="image holds 2 images for 3 prompts; give one, or one per prompt"):
        image_to_image.initial_latents(None, np.zeros((2, 4, 4, 4)), 3, 1, 1)
