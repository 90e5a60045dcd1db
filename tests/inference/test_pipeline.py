"""Parity of complete pipelines with diffusers, from prompts to pixels, and errors for invalid arguments."""

import itertools
import re
import shutil
import subprocess
import sys

import diffusers
import jax
import numpy as np
import pytest
import torch
from fixtures_folders import latents
from safetensors.numpy import load_file, save_file

import lcm_jax
from lcm_jax.errors import UserError
from lcm_jax.inference import noise
from lcm_jax.inference.batches import default_size
from lcm_jax.inference.generate import generate
from lcm_jax.inference.noise import seed_key
from lcm_jax.inference.verify import injected_noise
from lcm_jax.interop.scheduler import read_schedule

PROMPTS = ["a red seven", "red red words"]
SHAPE = (2, 8, 8, 4)


@pytest.fixture(scope="module")
def teacher(teacher_folder):
    return lcm_jax.load_pipeline(teacher_folder)


@pytest.fixture(scope="module")
def lcm(lcm_folder):
    return lcm_jax.load_pipeline(lcm_folder)


def nchw(array):
    return torch.from_numpy(np.moveaxis(array, -1, -3).copy())


def nhwc(tensor):
    return np.moveaxis(tensor.detach().numpy(), 1, -1)


def assert_close(ours, theirs, tolerance=1e-4):
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= tolerance * np.abs(theirs).max()


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning:diffusers")  # of its DPM-Solver
@pytest.mark.filterwarnings("ignore:(?s).*has not set the configuration `clip_sample`:FutureWarning")
@pytest.mark.parametrize(
    ("sampler", "scheduler", "negative"),
    [
        ("ddim", diffusers.DDIMScheduler, None),
        ("dpmpp", diffusers.DPMSolverMultistepScheduler, ["a blue zero", "words"]),
    ],
)
def test_diffusion_model_against_diffusers(teacher, teacher_pipeline, sampler, scheduler, negative):
    z_T = latents(1, *SHAPE)
    # diffusers' pipeline turns off DDIMScheduler's clip_sample; read_schedule ignores it
    options = {"clip_sample": True} if sampler == "ddim" else {}
    clipping = scheduler.from_config(teacher_pipeline.scheduler.config, timestep_spacing="trailing", **options)
    config = {**clipping.config, "set_alpha_to_one": False, "_class_name": scheduler.__name__}
    assert read_schedule(config) == teacher.process
    parts = {**teacher_pipeline.components, "scheduler": clipping}
    teacher_pipeline = diffusers.StableDiffusionPipeline(**parts, requires_safety_checker=False)
    teacher_pipeline.set_progress_bar_config(disable=True)
    arguments = {
        "prompt": PROMPTS,
        "num_inference_steps": 5,
        "guidance_scale": 3.0,
        "negative_prompt": negative,
    }
    theirs = teacher_pipeline(**arguments, latents=nchw(z_T), output_type="np").images
    ours = {"steps": 5, "guidance_scale": 3.0, "negative_prompt": negative, "latents": z_T, "sampler": sampler}
    assert_close(teacher(PROMPTS, **ours, output="float"), theirs)
    assert ((theirs > 0) & (theirs < 1)).mean() > 0.3  # clipped pixels would hide differences


@pytest.mark.parametrize("steps", [1, 4])
def test_consistency_model_against_diffusers(lcm, lcm_pipeline, steps):
    z_T, noise = latents(1, *SHAPE), latents(2, steps - 1, *SHAPE)
    arguments = {"prompt": PROMPTS, "num_inference_steps": steps, "guidance_scale": 5.0, "latents": nchw(z_T)}
    theirs = {}
    for output in ("latent", "np", "pil"):
        with injected_noise(list(nchw(noise))):
            theirs[output] = lcm_pipeline(**arguments, output_type=output).images
    ours = {"steps": steps, "guidance_scale": 5.0, "latents": z_T, "noise": noise}
    assert_close(lcm(PROMPTS, **ours, output="float"), theirs["np"])
    if steps == 1:
        assert_close(lcm(PROMPTS, **ours, output="latents"), nhwc(theirs["latent"]))
    images = lcm(PROMPTS, **ours)
    assert images.dtype == np.uint8
    assert np.abs(images.astype(int) - np.stack([np.asarray(p) for p in theirs["pil"]])).max() <= 1


def test_consistency_model_with_own_timesteps_and_size(lcm, lcm_pipeline):
    z_T, noise = latents(3, 1, 4, 12, 4), latents(4, 1, 1, 4, 12, 4)
    with injected_noise(list(nchw(noise))):
        theirs = lcm_pipeline(
            prompt=PROMPTS[0],
            timesteps=[999, 319],
            num_inference_steps=None,
            height=8,
            width=24,
            latents=nchw(z_T),
            output_type="latent",
        ).images
    ours = lcm(
        PROMPTS[0],
        timesteps=[999, 319],
        height=8,
        width=24,
        guidance_scale=8.5,
        latents=z_T,
        noise=noise,
        output="latents",
    )
    assert_close(ours, nhwc(theirs))


def test_consistency_model_without_w_embedding_takes_real_guidance(teacher_folder, teacher_pipeline, tmp_path):
    """A StableDiffusionPipeline with LCMScheduler, as after merging an LCM-LoRA."""
    peer = diffusers.StableDiffusionPipeline(
        **{
            **teacher_pipeline.components,
            "scheduler": diffusers.LCMScheduler.from_config(teacher_pipeline.scheduler.config),
        },
        requires_safety_checker=False,
    )
    peer.set_progress_bar_config(disable=True)
    peer.save_pretrained(tmp_path / "model")
    pipe = lcm_jax.load_pipeline(tmp_path / "model")
    z_T, noise = latents(1, *SHAPE), latents(2, 1, *SHAPE)
    for scale in (-1.0, 0.0, 0.5, 1.0, 1.5):  # guidance is used above 1 only
        with injected_noise(list(nchw(noise))):
            theirs = peer(
                PROMPTS, num_inference_steps=2, guidance_scale=scale, latents=nchw(z_T), output_type="latent"
            ).images
        ours = pipe(PROMPTS, 2, scale, latents=z_T, noise=noise, output="latents")
        assert_close(ours, nhwc(theirs))
    np.testing.assert_array_equal(
        pipe(PROMPTS, 2, latents=z_T, noise=noise, output="latents"),
        pipe(PROMPTS, 2, 1.0, latents=z_T, noise=noise, output="latents"),
    )


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"num_inference_steps": 4}, "there is no argument num_inference_steps; use steps"),
        ({"generator": None}, "there is no argument generator; use seed=0, a whole number"),
        ({"num_images_per_prompt": 2}, "there is no argument num_images_per_prompt; use images_per_prompt"),
        ({"setps": 4}, "there is no argument setps; did you mean 'steps'"),
    ],
)
def test_arguments_of_diffusers_are_answered_with_ours(lcm, given, said):
    with pytest.raises(TypeError, match=said):
        lcm("red", **given)


def test_names_of_diffusers_are_answered_with_ours(lcm):
    with pytest.raises(TypeError, match="there is no argument prompt; use prompts"):
        lcm(prompt="red")
    with pytest.raises(TypeError, match="there is no argument torch_dtype; use dtype"):
        lcm_jax.load_pipeline("nowhere", torch_dtype="float16")
    with pytest.raises(AttributeError, match=r"no attribute 'save_pretrained'; use save\(folder\)"):
        lcm.save_pretrained("x")
    with pytest.raises(UserError, match="image is a path; open it"):
        lcm("red", image="seven.png")
    with pytest.raises(UserError, match="decode_in_strips is 'no'; it must be True, False or None"):
        lcm("red", decode_in_strips="no")


def test_seed_decides_the_image(lcm):
    first, again, other = (lcm(PROMPTS, steps=1, seed=seed, output="latents") for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other)
    assert not np.allclose(first[0], first[1])


def test_every_seed_has_its_own_image(lcm):
    seeds = (0, 1, 2**32 - 1, 2**32, 2**32 + 1, 2**63, 2**64 - 1, None, None)
    images = [lcm(PROMPTS, steps=1, seed=seed, output="latents") for seed in seeds]
    for a, b in itertools.combinations(images, 2):
        assert not np.allclose(a, b)


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**32 - 1])
def test_small_seeds_have_the_key_of_jax(seed):
    np.testing.assert_array_equal(*(jax.random.key_data(key) for key in (seed_key(seed), jax.random.key(seed))))


def test_arguments_of_other_types(lcm):
    expected = lcm(PROMPTS, 1, 5.0, 3, height=16)
    others = {"guidance_scale": "5", "seed": np.uint8(3), "height": "16"}
    np.testing.assert_array_equal(lcm(tuple(PROMPTS), "1", **others), expected)
    np.testing.assert_array_equal(lcm((p for p in PROMPTS), timesteps=999, **others), expected)


def test_a_single_negative_prompt_serves_all(teacher):
    single, one_each = (
        teacher(PROMPTS, 5, 3.0, negative_prompt=negative, sampler="dpmpp", output="float")
        for negative in ("words", ["words"] * 2)
    )
    np.testing.assert_array_equal(single, one_each)


def test_an_image_depends_on_its_number_not_on_its_batch(lcm):
    """With noise between the steps too; the last batch of two is padded."""
    alone = lcm([PROMPTS[0], *PROMPTS], steps=4, seed=3, output="latents")
    each = lcm(PROMPTS, steps=4, seed=3, output="latents", images_per_prompt=2, batch_size=3)
    assert_close(each[[0, 1]], alone[[0, 1]], 1e-5)
    rest = lcm(PROMPTS[1], steps=4, seed=3, output="latents", images_per_prompt=2, first_image=2)
    np.testing.assert_array_equal(rest[0], alone[2])
    assert_close(each[2:], rest, 1e-5)


def test_noise_is_that_of_one_large_array():
    """As JAX draws it for a batch of all images, to the last bit."""
    key, shape = seed_key(2**40 + 1), (5, 2, 3, 4)
    latent_key, noise_key = jax.random.split(key)
    first = [jax.random.normal(jax.random.fold_in(latent_key, i), shape[1:]) for i in range(5)]
    later = [jax.random.normal(of_step, shape) for of_step in jax.random.split(noise_key, 4)[:3]]
    z_T, between = noise.draw(key, np.uint32(2), (3, *shape[1:]), 3)
    np.testing.assert_array_equal(z_T, np.stack(first)[2:])
    np.testing.assert_array_equal(between, np.stack(later)[:, 2:])


def test_a_batch_on_an_accelerator_is_as_large_as_its_images_allow():
    cases = [("cpu", 32, 512), ("gpu", 1, 512), ("gpu", 2, 512), ("tpu", 2, 32), ("gpu", 9, 1024), ("gpu", 9, 4096)]
    assert [default_size(platform, count, side, side) for platform, count, side in cases] == [1, 1, 8, 32, 2, 1]


def test_guidance_changes_the_image(lcm, teacher):
    assert not np.allclose(lcm(PROMPTS, 1, 3.0, output="latents"), lcm(PROMPTS, 1, 12.0, output="latents"))
    assert not np.allclose(teacher(PROMPTS, 5, 3.0, output="float"), teacher(PROMPTS, 5, 9.0, output="float"))


def test_what_does_not_fit_into_memory_is_one_line(lcm):
    with pytest.raises(UserError, match="1 latents of 8192 x 8192 don't fit into this device's memory"):
        lcm(["a red seven"], steps=1, height=2**14, width=2**14, output="latents")


def test_a_program_is_compiled_once_per_number_of_steps_whatever_the_number_of_prompts(lcm_folder, monkeypatch, capsys):
    traced = []

    def counted(*args):
        traced.append(1)
        return generate(*args)

    monkeypatch.setattr("lcm_jax.inference.program.generate", counted)
    pipe = lcm_jax.load_pipeline(lcm_folder)
    for seed, scale in ((0, 5.0), (1, 8.0), (2, None)):
        pipe(PROMPTS, 1, scale, seed)
        pipe(PROMPTS[::-1], 4, scale, seed)
    for count in (1, 3, 32):
        pipe(["red"] * count, 1)
    assert len(traced) == 2
    said = re.sub(r"\d+\.\d s(, from the compile cache)?\n", "S\n", capsys.readouterr().err).splitlines()
    assert said == [f"Compiling {steps} for 1 image of 16 x 16 pixels ... S" for steps in ("1 lcm step", "4 lcm steps")]
    lcm_jax.load_pipeline(lcm_folder, quiet=True)("red", 1)
    assert capsys.readouterr().err == ""


def test_parts_are_callable(teacher, teacher_pipeline):
    z, t, context = latents(1, *SHAPE), np.array([3, 999], np.int32), latents(2, 2, 16, 16)
    theirs = teacher_pipeline.unet(nchw(z), torch.tensor(t), torch.from_numpy(context)).sample
    assert_close(np.asarray(teacher.unet(z, t, context)), nhwc(theirs))
    ids = teacher.tokenizer(PROMPTS)
    assert_close(
        np.asarray(teacher.text_encoder(ids)),
        teacher_pipeline.text_encoder(torch.tensor(ids).long())[0].detach().numpy(),
    )
    images = latents(3, 1, 16, 16, 3)
    mean, _ = teacher.vae(images, method="encode")
    assert_close(np.asarray(mean), nhwc(teacher_pipeline.vae.encode(nchw(images)).latent_dist.mean))


def test_bfloat16_is_near_and_smaller(lcm, lcm_folder):
    half = lcm_jax.load_pipeline(lcm_folder, dtype="bfloat16")
    assert {a.dtype.name for a in jax.tree.leaves(half.unet.params)} == {"bfloat16"}
    a, b = (pipe(PROMPTS, 1, 5.0, output="latents") for pipe in (lcm, half))
    assert 0 < np.abs(a - b).max() <= 0.05 * np.abs(a).max()
    with pytest.raises(UserError, match="float8"):
        lcm_jax.load_pipeline(lcm_folder, dtype="float8")


def test_half_precision_file_stays_small_in_memory(lcm, lcm_folder, tmp_path):
    """Weights keep the float16 of the file; float32 is only the compute dtype."""
    copy = shutil.copytree(lcm_folder, tmp_path / "half")
    weights = copy / "unet/diffusion_pytorch_model.safetensors"
    save_file({key: array.astype(np.float16) for key, array in load_file(weights).items()}, weights, {"format": "pt"})
    half = lcm_jax.load_pipeline(copy)
    assert {a.dtype.name for a in half.unet.params.values()} == {"float16"}
    a, b = (pipe(PROMPTS, 1, 5.0, output="latents") for pipe in (lcm, half))
    assert 0 < np.abs(a - b).max() <= 0.01 * np.abs(a).max()


def test_saved_pipeline_draws_the_same(lcm, tmp_path):
    lcm.save(tmp_path / "again")
    again = lcm_jax.load_pipeline(tmp_path / "again")
    np.testing.assert_array_equal(again(PROMPTS, 1, 5.0), lcm(PROMPTS, 1, 5.0))


# ---- invalid arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": []}, "prompts is empty"),
        ({"prompts": [b"caf\xe9"]}, r"prompts\[0\] is .*, which is not UTF-8"),
        ({"steps": 0}, "steps"),
        ({"steps": 2.5}, "steps is 2.5; supported: a whole number"),
        ({"timesteps": [999, None]}, r"timesteps\[1\] is None; supported: a whole number"),
        ({"guidance_scale": float("nan")}, "guidance_scale is nan; supported: a finite number"),
        ({"seed": -1}, "seed is -1; it must be in 0 … 18446744073709551615"),
        ({"sampler": np.zeros(2)}, "but the folder holds a consistency model"),
        ({"latents": "noise"}, "latents is 'noise'; supported: an array of real numbers"),
        ({"steps": 51}, "50"),
        ({"steps": 4, "timesteps": [999]}, "steps or timesteps, not both"),
        ({"timesteps": [499, 999]}, "must strictly decrease"),
        ({"timesteps": [1000, 499]}, "1000|999"),
        ({"timesteps": []}, "timesteps"),
        ({"negative_prompt": "ugly"}, "takes no negative_prompt"),
        ({"sampler": "ddim"}, "holds a consistency model"),
        ({"output": "pil"}, "output is 'pil'; choose from float, latents, uint8"),
        ({"width": 2 * 10**9}, "width is 2000000000; it must be a multiple of 2 in 2 … 16384"),
        ({"height": 17}, "height is 17; it must be a multiple of 2 in 2 … 16384"),
        ({"width": 0}, "width is 0"),
        ({"images_per_prompt": 0}, "images_per_prompt is 0; it must be at least 1"),
        ({"batch_size": 0}, "batch_size is 0; it must be at least 1"),
        ({"first_image": 2**24 - 2}, "first_image is 16777214 of 2; the images of a seed must be in 0 … 16777214"),
        ({"latents": np.zeros((1, 4, 8, 8))}, r"latents has the shape \(1, 4, 8, 8\); .* need \(2, 8, 8, 4\)"),
        ({"steps": 2, "noise": np.zeros((2, *SHAPE))}, r"noise has the shape .* need \(1, 2, 8, 8, 4\)"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_wrong_arguments_of_a_consistency_model(lcm, arguments, message):
    with pytest.raises(UserError, match=message) as error:
        lcm(**{"prompts": PROMPTS, **arguments})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 1001}, "1001"),
        ({"sampler": "lcm"}, "lcm needs a consistency model or an LCM-LoRA, .*: attach an LCM-LoRA .*, or use ddim"),
        ({"sampler": "heun"}, "sampler is 'heun'; choose from ddim, dpmpp, euler"),
        ({"noise": np.zeros((3, *SHAPE))}, "noise has no effect with the sampler ddim"),
        ({"negative_prompt": "ugly", "guidance_scale": 1.0}, "negative_prompt has no effect"),
        ({"negative_prompt": ["ugly"]}, "negative_prompt has 1 texts for 2 prompts; give one per prompt"),
        ({"negative_prompt": ["ugly", 7]}, r"negative_prompt\[1\] is 7; supported: a text"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_wrong_arguments_of_a_diffusion_model(teacher, arguments, message):
    with pytest.raises(UserError, match=message):
        teacher(**{"prompts": PROMPTS, **arguments})


def test_values_that_are_not_finite_are_an_error(lcm):
    with pytest.raises(UserError, match=r"samples values that are not finite at guidance_scale 4: its weights or the "):
        lcm("a red seven", steps=2, guidance_scale=4.0, latents=np.full((1, *SHAPE[1:]), np.nan, np.float32))


def test_long_prompt_is_cut_with_a_warning(lcm):
    words = " ".join(["red"] * 14)
    with pytest.warns(UserWarning, match=r"^the prompt '.*…' is longer than 16 tokens; cut off: 'and a blue zero'$"):
        cut = lcm([f"{words} and a blue zero", PROMPTS[0]], 1, 5.0)
    np.testing.assert_array_equal(cut, lcm([words, PROMPTS[0]], 1, 5.0))


def test_import_is_lazy_and_needs_no_other_framework(teacher_folder):
    program = f"""
import sys
import lcm_jax
assert "jax" not in sys.modules
pipe = lcm_jax.load_pipeline({str(teacher_folder)!r})
pipe.tokenizer(["a red seven"])
found = {{"torch", "tensorflow", "diffusers", "peft"}} & set(sys.modules)
assert not found, found
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
