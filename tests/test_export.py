"""The export command: from a run's checkpoint to a folder."""

import dataclasses
import json

import numpy as np
import pytest
import safetensors.numpy
import torch
from fixtures_folders import W_DIM

from lcm_jax import cli, config, export, load_pipeline
from lcm_jax.adapters import lora
from lcm_jax.adapters.lora import LoraConfig
from lcm_jax.errors import UserError
from lcm_jax.interop.folder import read_folder
from lcm_jax.interop.recipe import Recipe
from lcm_jax.objectives import OBJECTIVES
from lcm_jax.objectives.autoencoder import AutoencoderConfig
from lcm_jax.objectives.base import Roles
from lcm_jax.objectives.lcd import LCDConfig
from lcm_jax.training import checkpoint
from lcm_jax.training.networks import adapted


@pytest.fixture
def run(tmp_path, teacher_folder, lcm_folder, monkeypatch):
    """Makes a workdir whose checkpoint at step 70 holds the micro consistency model, its student's "
    "weights all larger by one."""
    unet = read_folder(lcm_folder, only=("unet",)).components["unet"].params

    def make(objective="lcd", **changes):
        lcd = LCDConfig(guidance_min=2.0, guidance_max=8.0, skip=40, w_embedding_dim=W_DIM)
        settings = {"objective": objective, "lcd": lcd if objective == "lcd" else LCDConfig(), **changes}
        resolved = config.Config(model=config.ModelConfig(folder=str(teacher_folder)), **settings)
        (tmp_path / "run").mkdir()
        (tmp_path / "run/config.json").write_text(config.resolved(resolved))
        return tmp_path / "run"

    def restore(workdir, which, step=None):
        add = np.float32(which == "student")
        return {"unet": {path: array + add for path, array in unet.items()}}, step or 70

    monkeypatch.setattr(checkpoint, "restore_params", restore)
    return make


def test_consistency_model(run, tmp_path, teacher_folder, capsys):
    workdir, out = run(), tmp_path / "lcm"
    assert export.main([f"--workdir={workdir}", f"--out={out}", "--verify"]) == 0
    recipe = Recipe.read(out)
    assert recipe is not None
    assert recipe.teacher == teacher_folder.name
    assert (recipe.weights, recipe.steps) == ("ema", 70)
    assert (recipe.guidance_min, recipe.guidance_max, recipe.original_inference_steps) == (2.0, 8.0, 25)
    assert recipe.options == {"solver": "ddim", "skip": 40, "distance": "huber"}
    assert json.loads((out / "scheduler/scheduler_config.json").read_text())["original_inference_steps"] == 25
    pipe = load_pipeline(out)
    assert pipe.default_guidance == 5.0
    assert pipe("a red seven", steps=1).shape == (1, 16, 16, 3)
    lines = capsys.readouterr().out.splitlines()
    assert "differ from those of lcm_jax by" in lines[-4 if len(lines) > 3 else 0]
    assert str(out) in lines[-2]
    assert f"python -m lcm_jax.sample --model={out}" in lines[-1]


def test_few_step_model_of_another_objective(run, tmp_path, monkeypatch):
    recipe = {
        "method": "distribution matching",
        "guidance_min": 1.0,
        "guidance_max": 1.0,
        "original_inference_steps": 4,
        "timestep_scaling": 10.0,
        "w_embedding_dim": W_DIM,
        "options": {"generator_every": 5},
    }
    record = dataclasses.replace(OBJECTIVES["denoising"], recipe=lambda options, process: recipe)
    monkeypatch.setitem(OBJECTIVES, "denoising", record)
    out = tmp_path / "lcm"
    export.main([f"--workdir={run('denoising')}", f"--out={out}"])
    found = Recipe.read(out)
    assert found is not None
    assert (found.method, found.options) == ("distribution matching", {"generator_every": 5})
    assert json.loads((out / "scheduler/scheduler_config.json").read_text())["original_inference_steps"] == 4


def test_which_and_step(run, tmp_path):
    workdir = run()
    export.main([f"--workdir={workdir}", f"--out={tmp_path}/ema"])
    export.main(
        [f"--workdir={workdir}", f"--out={tmp_path}/student", "--which=student", "--step=30", "--dtype=float16"]
    )
    ema, student = (read_folder(tmp_path / name) for name in ("ema", "student"))
    a, b = (folder.components["unet"].params["conv_in.bias"] for folder in (ema, student))
    np.testing.assert_array_equal(b, (a + 1).astype(np.float16))
    recipe = Recipe.read(tmp_path / "student")
    assert recipe is not None
    assert (recipe.weights, recipe.steps) == ("student", 30)


def test_run_without_ema(run, tmp_path):
    workdir = run(ema=config.EMAConfig(decay=0.0))
    for which in ([], ["--which=ema"]):
        with pytest.raises(UserError, match=r"has no EMA .*--which=student"):
            export.main([f"--workdir={workdir}", f"--out={tmp_path}/lcm", *which])
    export.main([f"--workdir={workdir}", f"--out={tmp_path}/lcm", "--which=student"])


def test_diffusion_model(run, tmp_path, teacher_folder, monkeypatch):
    trained = {path: a + np.float32(1) for path, a in read_folder(teacher_folder).components["unet"].params.items()}
    monkeypatch.setattr(checkpoint, "restore_params", lambda *_: ({"unet": trained}, 5))
    out = tmp_path / "model"
    export.main([f"--workdir={run('denoising')}", f"--out={out}"])
    folder = read_folder(out)
    assert folder.pipeline_class == "StableDiffusionPipeline"
    np.testing.assert_array_equal(folder.components["unet"].params["conv_in.bias"], trained["conv_in.bias"])
    assert Recipe.read(out) is None


def test_only_adapters_of_exported_roles_are_written(run, tmp_path, teacher_folder, monkeypatch):
    def roles(options, family):
        return Roles({"generator": family.denoiser, "critic": family.denoiser}, exported={"generator": family.denoiser})

    monkeypatch.setitem(OBJECTIVES, "denoising", dataclasses.replace(OBJECTIVES["denoising"], roles=roles))
    resolved = config.load_resolved(workdir := run("denoising", lora=LoraConfig(rank=2)))
    network = read_folder(teacher_folder, only=("unet",)).components["unet"].network()
    chosen = adapted(resolved, {"unet": "unet", "critic": "unet"}, {"unet": network, "critic": network})
    shapes = lora.shapes(network.shapes, chosen["unet"])
    weights = {name: {path: np.full(shapes[path], n) for path in shapes} for n, name in enumerate(chosen, 1)}
    monkeypatch.setattr(checkpoint, "restore_params", lambda *_: (weights, 5))
    export.main([f"--workdir={workdir}", f"--out={tmp_path}/lora.safetensors"])
    written = safetensors.numpy.load_file(tmp_path / "lora.safetensors")
    assert len(written) == len(shapes)
    assert all(name.startswith("unet.") and (array == 1).all() for name, array in written.items())


@pytest.mark.parametrize("latent_std", [1.0, 4.0])
def test_autoencoder(run, tmp_path, teacher_folder, teacher_pipeline, monkeypatch, latent_std, capsys):
    """scaling_factor is latent_std over the deviation of the latents sampled by the trained VAE."""
    monkeypatch.setattr(
        checkpoint, "restore_params", lambda *_: ({"vae": read_folder(teacher_folder).components["vae"].params}, 5)
    )
    pixels = np.random.default_rng(0).integers(0, 256, (export.BATCHES, 4, 16, 16, 3), dtype=np.uint8)

    def batches(*_, **__):
        yield from ({"image": batch} for batch in pixels)

    monkeypatch.setattr(export, "batches", batches)
    out = tmp_path / "model"
    workdir = run("autoencoder", autoencoder=AutoencoderConfig(latent_std=latent_std))
    export.main([f"--workdir={workdir}", f"--out={out}"])
    assert f"lcm_jax.train --config=FILE --config.model.folder={out} " in capsys.readouterr().out.splitlines()[-1]
    found = read_folder(out).components["vae"].config["scaling_factor"]
    images = torch.from_numpy(pixels.reshape(-1, 16, 16, 3)).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        posterior = teacher_pipeline.vae.encode(images).latent_dist
    drawn = torch.cat([posterior.sample(torch.Generator().manual_seed(i)) for i in range(8)])
    assert found == pytest.approx(latent_std / drawn.std().item(), rel=0.01)


def test_a_model_folder_that_was_moved(run, tmp_path, teacher_folder):
    workdir, out = run(), tmp_path / "lcm"
    stored = (workdir / "config.json").read_text()
    (workdir / "config.json").write_text(stored.replace(str(teacher_folder), "/nowhere/teacher"))
    with pytest.raises(UserError, match="no folder /nowhere/teacher; give --config.model.folder=DIR"):
        export.main([f"--workdir={workdir}", f"--out={out}"])
    with pytest.raises(UserError, match="--config.steps=7 is not an option of export; only model.folder, data"):
        export.main([f"--workdir={workdir}", f"--out={out}", "--config.steps=7"])
    assert export.main([f"--workdir={workdir}", f"--out={out}", f"--config.model.folder={teacher_folder}"]) == 0


def test_no_run(tmp_path, capsys):
    assert cli.run(export.main, [f"--workdir={tmp_path}/x", f"--out={tmp_path}/out"]) == 2
    assert "x is not a run of lcm_jax" in capsys.readouterr().err


def test_a_whole_model_is_a_folder(run, tmp_path):
    with pytest.raises(UserError, match="holds all weights of a model, which is a folder: .* not end in .safetensors"):
        export.main([f"--workdir={run()}", f"--out={tmp_path}/x.safetensors"])
    assert not (tmp_path / "x.safetensors").exists()


def test_target_that_is_no_model(run, tmp_path):
    workdir = run()
    with pytest.raises(UserError, match="nor a model folder"):
        export.main([f"--workdir={workdir}", f"--out={workdir}"])


def test_recipe_covers_the_configuration(run, tmp_path):
    """Each value of the recipe follows its option."""

    def flat(recipe):
        return {**dataclasses.asdict(recipe), **recipe.options}

    resolved = config.load_resolved(run())
    folder = read_folder(resolved.model.folder, only=())
    base = export.recipe_of(resolved, folder, "ema", 1)
    for name, value in (
        ("guidance_min", 2.5),
        ("guidance_max", 7.0),
        ("solver", "dpm"),
        ("skip", 10),
        ("timestep_scaling", 5.0),
        ("w_embedding_dim", 0),
        ("distance", "l2"),
    ):
        changed = dataclasses.replace(resolved, lcd=dataclasses.replace(resolved.lcd, **{name: value}))
        assert flat(export.recipe_of(changed, folder, "ema", 1))[name] == value != flat(base)[name]
