"""Exported folders: their content, and that diffusers loads them without missing or unexpected keys."""

import dataclasses
import json
import pathlib
import re
import shutil

import diffusers
import numpy as np
import pytest
import transformers
from fixtures_folders import W_DIM, latents
from safetensors.numpy import load_file, save_file

import lcm_jax
from lcm_jax.errors import UserError
from lcm_jax.inference import verify as verify_module
from lcm_jax.inference.verify import verify
from lcm_jax.interop.folder import read_folder
from lcm_jax.interop.lora.file import write_lora
from lcm_jax.interop.lora.merge import lcm_recipe
from lcm_jax.interop.recipe import Recipe
from lcm_jax.interop.trained_folder import write_lcm_folder, write_trained_folder

RECIPE = Recipe(
    teacher="someone/teacher",
    method="latent consistency distillation",
    weights="ema",
    guidance_min=3.0,
    guidance_max=9.0,
    original_inference_steps=50,
    timestep_scaling=10.0,
    w_embedding_dim=W_DIM,
    steps=1000,
    batch_size=32,
    learning_rate=1e-5,
    ema_decay=0.95,
    options={"solver": "ddim", "skip": 20, "distance": "huber"},
)
PLAIN = dataclasses.replace(RECIPE, w_embedding_dim=0)


@pytest.fixture(scope="module")
def teacher(teacher_folder):
    return read_folder(teacher_folder)


@pytest.fixture(scope="module")
def student_params(lcm_folder):
    return read_folder(lcm_folder, only=("unet",)).components["unet"].params


@pytest.fixture(scope="module")
def exported(teacher, student_params, tmp_path_factory):
    return write_lcm_folder(teacher, student_params, tmp_path_factory.mktemp("out") / "lcm", recipe=RECIPE)


def read(folder: pathlib.Path, name: str) -> dict:
    return json.loads((folder / name).read_text())


@pytest.mark.parametrize(
    ("library", "name", "library_class"),
    [
        (diffusers, "unet", "UNet2DConditionModel"),
        (diffusers, "vae", "AutoencoderKL"),
        (transformers, "text_encoder", "CLIPTextModel"),
    ],
)
def test_nothing_missing_or_unexpected_in_diffusers(exported, library, name, library_class):
    _, info = getattr(library, library_class).from_pretrained(exported, subfolder=name, output_loading_info=True)
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        assert not info.get(what), (what, info[what])


def test_diffusers_draws_what_we_draw(exported):
    assert verify(exported) <= 1e-4


def test_whole_pipeline_loads_in_diffusers(exported, caplog):
    pipe = diffusers.DiffusionPipeline.from_pretrained(exported)
    assert type(pipe) is diffusers.LatentConsistencyModelPipeline
    assert type(pipe.scheduler) is diffusers.LCMScheduler
    assert pipe.unet.config.time_cond_proj_dim == W_DIM
    assert pipe.safety_checker is None
    assert not caplog.records


def test_scheduler_is_the_teachers_with_lcm_settings(exported, teacher_folder):
    ours, theirs = (read(folder, "scheduler/scheduler_config.json") for folder in (exported, teacher_folder))
    assert ours["_class_name"] == "LCMScheduler"
    for key in ("beta_start", "beta_end", "beta_schedule", "prediction_type", "steps_offset", "set_alpha_to_one"):
        assert ours[key] == theirs[key], key
    assert ours["set_alpha_to_one"] is False
    assert ours["original_inference_steps"] == 50
    assert ours["timestep_scaling"] == 10.0
    assert ours["clip_sample"] is ours["thresholding"] is False
    known = diffusers.LCMScheduler().config
    assert {key for key in ours if not key.startswith("_")} <= set(known)


def test_scheduler_keeps_the_trained_grid(teacher, student_params, tmp_path):
    recipe = dataclasses.replace(RECIPE, original_inference_steps=25, timestep_scaling=5.0)
    scheduler = read(
        write_lcm_folder(teacher, student_params, tmp_path / "x", recipe=recipe), "scheduler/scheduler_config.json"
    )
    assert scheduler["original_inference_steps"] == 25
    assert scheduler["timestep_scaling"] == 5.0


@pytest.mark.parametrize(
    "config",
    [
        {"_class_name": "DDIMScheduler"},
        {"_class_name": "PNDMScheduler", "beta_schedule": "scaled_linear"},
        {"_class_name": "DDIMScheduler", "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
        {"_class_name": "EulerDiscreteScheduler", "beta_schedule": "squaredcos_cap_v2"},
    ],
    ids=str,
)
def test_keys_that_the_teachers_scheduler_leaves_out_are_its_classs(teacher, student_params, tmp_path, config):
    """Defaults differ between classes, so missing values are written explicitly."""
    config = {"clip_sample": False, **config} if config["_class_name"] == "DDIMScheduler" else config
    index = {**teacher.model_index, "scheduler": ["diffusers", config["_class_name"]]}
    other = dataclasses.replace(teacher, model_index=index, scheduler=config)
    out = write_lcm_folder(other, student_params, tmp_path / "x", recipe=RECIPE)
    theirs = getattr(diffusers, config["_class_name"]).from_config(config)
    ours = diffusers.LCMScheduler.from_pretrained(out, subfolder="scheduler")
    np.testing.assert_allclose(ours.alphas_cumprod, theirs.alphas_cumprod, rtol=1e-6, atol=1e-8)
    for key in ("prediction_type", "set_alpha_to_one", "steps_offset"):
        if key in theirs.config:
            assert ours.config[key] == theirs.config[key], key


def test_model_index(exported):
    index = read(exported, "model_index.json")
    assert index["_class_name"] == "LatentConsistencyModelPipeline"
    assert index["scheduler"] == ["diffusers", "LCMScheduler"]
    for name in ("safety_checker", "feature_extractor", "image_encoder"):
        assert index[name] == [None, None]
    assert index["requires_safety_checker"] is False


def test_no_checker_is_required_where_there_is_none(teacher, student_params, tmp_path):
    other = dataclasses.replace(teacher, model_index={**teacher.model_index, "requires_safety_checker": True})
    out = write_lcm_folder(other, student_params, tmp_path / "x", recipe=RECIPE)
    assert read(out, "model_index.json")["requires_safety_checker"] is False


def test_safety_checker_is_copied(teacher_folder, student_params, tmp_path):
    copy = shutil.copytree(teacher_folder, tmp_path / "teacher")
    index = read(copy, "model_index.json")
    index |= {
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        "feature_extractor": ["transformers", "CLIPImageProcessor"],
        "requires_safety_checker": True,
    }
    del index["image_encoder"]
    (copy / "model_index.json").write_text(json.dumps(index))
    for name, file in (("safety_checker", "config.json"), ("feature_extractor", "preprocessor_config.json")):
        (copy / name).mkdir()
        (copy / name / file).write_text("{}")
    save_file({"x": np.zeros(3, np.float32)}, copy / "safety_checker/model.safetensors")
    out = write_lcm_folder(read_folder(copy), student_params, tmp_path / "x", recipe=RECIPE)
    exported = read(out, "model_index.json")
    for name in ("safety_checker", "feature_extractor", "requires_safety_checker"):
        assert exported[name] == index[name]
    assert exported["image_encoder"] == [None, None]
    for name in ("safety_checker/model.safetensors", "feature_extractor/preprocessor_config.json"):
        assert (out / name).read_bytes() == (copy / name).read_bytes()


def test_other_parts_are_the_teachers(exported, teacher_folder):
    for name in (
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
        "tokenizer/tokenizer.json",
    ):
        assert (exported / name).read_bytes() == (teacher_folder / name).read_bytes()


def test_recipe_there_and_back(exported, teacher_folder):
    assert Recipe.read(exported) == RECIPE
    assert Recipe.read(teacher_folder) is None


def test_recipe_from_before_other_objectives(tmp_path):
    """Such a file has no method, and the options of latent consistency distillation among the other keys."""
    values = dataclasses.asdict(RECIPE)
    del values["method"]
    (tmp_path / "lcm_jax.json").write_text(json.dumps(values.pop("options") | values))
    recipe = Recipe.read(tmp_path)
    assert recipe is not None
    assert "arxiv.org/abs/2310.04378" in recipe.method
    assert dataclasses.replace(recipe, method=RECIPE.method) == RECIPE


def test_a_model_of_another_method(teacher, student_params, tmp_path):
    recipe = dataclasses.replace(RECIPE, method="distribution matching", options={"generator_every": 5})
    out = write_lcm_folder(teacher, student_params, tmp_path / "x", recipe=recipe)
    assert Recipe.read(out) == recipe
    card = (out / "README.md").read_text()
    assert "by distribution matching." in card
    assert "consistency" not in card
    assert "| generator_every | 5 |" in card
    assert "solver" not in card


def test_broken_recipe(tmp_path):
    (tmp_path / "lcm_jax.json").write_text('{"teacher": "x"}')
    with pytest.raises(UserError, match=r"lcm_jax.json has no batch_size"):
        Recipe.read(tmp_path)
    values = dataclasses.asdict(RECIPE)
    for name, value in (
        ("method", None),
        ("options", []),
        ("options", {"skip": [20]}),
        ("guidance_min", "3"),
        ("guidance_min", 0.5),
        ("teacher", 1),
        ("weights", "other"),
        ("original_inference_steps", 1001),
        ("timestep_scaling", 0),
        ("w_embedding_dim", -1),
        ("steps", True),
        ("batch_size", 0),
        ("learning_rate", -1e-5),
        ("ema_decay", 1),
    ):
        (tmp_path / "lcm_jax.json").write_text(json.dumps({**values, name: value}))
        with pytest.raises(UserError, match=re.escape(f"lcm_jax.json: {name} is {value!r}; supported: ")):
            Recipe.read(tmp_path)
    (tmp_path / "lcm_jax.json").write_text(json.dumps({**values, "guidance_min": 9.5}))
    with pytest.raises(UserError, match=r"lcm_jax.json: guidance_max is 9.0; it can't be below guidance_min 9.5"):
        Recipe.read(tmp_path)


def test_recipe_of_a_lora_for_another_schedule(tmp_path):
    """Found when it is attached, by its file's name, not when an image is sampled."""
    file = write_lora(tmp_path / "x.safetensors", {}, header=RECIPE.to_header())
    assert lcm_recipe({file: 1.0}, 50) == RECIPE
    with pytest.raises(UserError, match=r"x.safetensors: original_inference_steps is 50, .* only 49 timesteps"):
        lcm_recipe({file: 1.0}, 49)


def test_model_card(exported):
    card = (exported / "README.md").read_text()
    assert "license: creativeml-openrail-m" in card.split("---")[1]
    for text in (
        "someone/teacher",
        "3 to 9",
        "| solver | ddim |",
        "| skip | 20 |",
        "grid | 50 |",
        "exponential moving average",
        "0.95",
        "1e-05",
    ):
        assert text in card, text


def test_model_card_without_a_licence(teacher_folder, student_params, tmp_path):
    copy = shutil.copytree(teacher_folder, tmp_path / "teacher")
    (copy / "README.md").unlink()
    card = (
        write_lcm_folder(read_folder(copy), student_params, tmp_path / "x", recipe=RECIPE) / "README.md"
    ).read_text()
    assert "license:" not in card
    assert "names no licence" in card
    (copy / "README.md").write_text("---\nlicense: [\n---\n")
    with pytest.raises(UserError, match="front matter"):
        write_lcm_folder(read_folder(copy), student_params, tmp_path / "y", recipe=RECIPE)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision(teacher, student_params, tmp_path, dtype):
    out = write_lcm_folder(teacher, student_params, tmp_path / "x", recipe=RECIPE, dtype=dtype)
    tensors = load_file(out / "unet/diffusion_pytorch_model.safetensors")
    assert {array.dtype.name for array in tensors.values()} == {dtype}
    assert verify_module.load_networks(lcm_jax.load_pipeline(out))
    with pytest.raises(UserError, match="dtype is 'float8'"):
        write_lcm_folder(teacher, student_params, tmp_path / "x", recipe=RECIPE, dtype="float8")


def test_old_variants_of_the_unet_are_left_behind(teacher_pipeline, student_params, tmp_path):
    teacher_pipeline.save_pretrained(tmp_path / "teacher", max_shard_size="60KB")
    (tmp_path / "teacher/unet/diffusion_pytorch_model.bin").write_bytes(b"a pickle")
    (tmp_path / "teacher/unet/diffusion_pytorch_model.fp16.safetensors").write_bytes(b"the teacher's")
    out = write_lcm_folder(read_folder(tmp_path / "teacher"), student_params, tmp_path / "x", recipe=RECIPE)
    assert sorted(p.name for p in (out / "unet").iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors"]


def test_student_without_w_embedding(teacher, tmp_path):
    params = teacher.components["unet"].params
    out = write_lcm_folder(teacher, params, tmp_path / "x", recipe=PLAIN)
    assert read(out, "unet/config.json")["time_cond_proj_dim"] is None
    assert read(out, "model_index.json")["_class_name"] == "StableDiffusionPipeline"
    assert lcm_jax.load_pipeline(out).default_guidance == 1.0
    assert verify(out) <= 1e-4


def test_parameters_that_do_not_fit(teacher, student_params, tmp_path):
    with pytest.raises(UserError, match="cond_proj"):
        write_lcm_folder(teacher, student_params, tmp_path / "x", recipe=PLAIN)
    assert not list(tmp_path.iterdir())


# ---- lcm_jax.json's range is used


def test_default_guidance_is_the_middle_of_the_trained_range(exported):
    pipe = lcm_jax.load_pipeline(exported)
    assert pipe.default_guidance == 6.0
    z_T = latents(0, 1, 8, 8, 4)
    default, middle = (pipe("x", 1, scale, latents=z_T, output="latents") for scale in (None, 6.0))
    np.testing.assert_array_equal(default, middle)


@pytest.mark.parametrize("scale", [2.9, 9.1])
def test_guidance_outside_the_trained_range_warns(exported, scale):
    pipe = lcm_jax.load_pipeline(exported)
    with pytest.warns(UserWarning, match=f"guidance_scale {scale} is outside this model's trained range, 3 to 9"):
        pipe("x", 1, scale)


# ---- a trained diffusion model


def test_trained_folder(teacher, teacher_folder, tmp_path):
    params = {
        name: {path: array + np.float32(1) for path, array in teacher.components[name].params.items()}
        for name in ("vae", "text_encoder")
    }
    out = write_trained_folder(teacher, params, tmp_path / "x", config_updates={"vae": {"scaling_factor": 0.5}})
    written = read_folder(out)
    for name, flat in params.items():
        for path, array in flat.items():
            np.testing.assert_array_equal(written.components[name].params[path], array)
    assert written.components["vae"].config == {**teacher.components["vae"].config, "scaling_factor": 0.5}
    for name in ("model_index.json", "unet/config.json", "text_encoder/config.json", "scheduler/scheduler_config.json"):
        assert read(out, name) == read(teacher_folder, name)
    name = "unet/diffusion_pytorch_model.safetensors"
    assert (out / name).read_bytes() == (teacher_folder / name).read_bytes()
    assert type(diffusers.DiffusionPipeline.from_pretrained(out)) is diffusers.StableDiffusionPipeline
    assert verify(out, steps=2) <= 1e-4


# ---- verify


@pytest.mark.parametrize(("name", "what"), [("unet", "latents"), ("vae", "images of the same latents")])
def test_verify_reports_a_difference(exported, monkeypatch, name, what):
    real = verify_module.load_networks

    def disturbed(pipe):
        networks = real(pipe)
        (networks[name].conv_out if name == "unet" else networks[name].decoder.conv_out).bias.data += 0.1
        return networks

    monkeypatch.setattr(verify_module, "load_networks", disturbed)
    with pytest.raises(UserError, match=f"diffusers' {what} differ from those of lcm_jax by"):
        verify(exported)


def test_verify_reports_a_key_that_diffusers_misses(exported, tmp_path, monkeypatch):
    pipe = lcm_jax.load_pipeline(exported)
    real = diffusers.UNet2DConditionModel.from_pretrained

    def lacking(*args, **kwargs):
        network, info = real(*args, **kwargs)
        return network, {**info, "missing_keys": ["conv_in.weight"]}

    monkeypatch.setattr(diffusers.UNet2DConditionModel, "from_pretrained", lacking)
    with pytest.raises(UserError, match=r"unet: diffusers reports missing_keys: conv_in.weight"):
        verify_module.load_networks(pipe)


def test_verify_without_diffusers(exported, monkeypatch):
    pipe = lcm_jax.load_pipeline(exported)
    monkeypatch.setitem(__import__("sys").modules, "diffusers", None)
    with pytest.raises(UserError, match=r"pip install lcm_jax\[diffusers\]"):
        verify(exported)
    with pytest.raises(UserError, match=r"sampling in diffusers needs diffusers: pip install lcm_jax\[diffusers\]"):
        verify_module.lcm_sampler(pipe, 2)
