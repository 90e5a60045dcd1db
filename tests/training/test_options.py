"""Every option changes the program: its step, its start, its data or its output files."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures_folders import write_little

from lcm_jax.config import Config, ModelConfig, default_config, from_dict
from lcm_jax.errors import UserError
from lcm_jax.interop.folder import read_folder
from lcm_jax.interop.tokenizer import load_tokenizer
from lcm_jax.training.loop import train
from lcm_jax.training.losses import make_losses
from lcm_jax.training.networks import frozen_params, initial_params, make_parts
from lcm_jax.training.previews import make_preview
from lcm_jax.training.state import initial_state
from lcm_jax.training.step import make_step

SIZE = 8  # pixels
CPU, TPU = types.SimpleNamespace(platform="cpu"), types.SimpleNamespace(platform="tpu")
HOPPER, VOLTA, MI250 = (
    types.SimpleNamespace(platform="gpu", compute_capability=name) for name in ("9.0", "7.0", "gfx90a")
)

# option -> (another value, an objective under which it counts; where any would do, the one that is traced soonest)
STEP = {
    "seed": (1, "autoencoder"),
    "objective": ("denoising", "lcd"),
    "model.dtype": ("bfloat16", "lcd"),
    "model.remat": ("block", "lcd"),
    "accumulate": (2, "autoencoder"),
    "optimizer.name": ("adafactor", "autoencoder"),
    "optimizer.moments_dtype": ("bfloat16", "autoencoder"),
    "optimizer.learning_rate": (3e-4, "autoencoder"),
    "optimizer.warmup_steps": (3, "autoencoder"),
    "optimizer.decay": ("cosine", "autoencoder"),
    "optimizer.b1": (0.8, "autoencoder"),
    "optimizer.b2": (0.98, "autoencoder"),
    "optimizer.eps": (1e-6, "autoencoder"),
    "optimizer.weight_decay": (0.1, "autoencoder"),
    "optimizer.clip_norm": (0.5, "autoencoder"),
    "ema.decay": (0.9, "autoencoder"),
    "ema.warmup": (True, "autoencoder"),
    "lcd.skip": (10, "lcd"),
    "lcd.solver": ("dpmpp", "lcd"),
    "lcd.guidance_min": (2.0, "lcd"),
    "lcd.guidance_max": (9.0, "lcd"),
    "lcd.distance": ("l2", "lcd"),
    "lcd.huber_c": (1e-2, "lcd"),
    "lcd.timestep_scaling": (5.0, "lcd"),
    "lcd.empty_prompts": (0.5, "lcd"),
    "lcd.w_embedding_dim": (0, "lcd"),
    "denoising.caption_dropping": (0.5, "denoising"),
    "denoising.timestep_shift": (6.0, "denoising"),
    "denoising.min_snr_gamma": (5.0, "denoising"),
    "denoising.train_text_encoder": (True, "denoising"),
    "autoencoder.kl_weight": (1e-3, "autoencoder"),
    "lora.rank": (4, "denoising"),
    "lora.alpha": (2.0, "a LoRA"),
    "lora.modules": ("to_q", "a LoRA"),
    "lora.patterns": ((r"to_k=2",), "a LoRA"),
}
START = {"lcd.w_embedding_init": ("random", "lcd"), "lora.init": ("gaussian", "a LoRA")}
BASES = {"a LoRA": {"objective": "denoising", "lora.rank": 4}}  # the other objectives are their names
# named one by one, so that a new option is missing here until someone has written its test
MESH = "tests/parallel/test_mesh.py, test_program.py; tests/training/test_train.py"
LOOP = "test_the_loop_does_what_it_is_told"
SHOWN = "test_the_loop_does_what_it_is_told, test_a_preview_…"
BATCHES = "tests/data/test_batches.py"
ELSEWHERE = {
    "batch_size": "the shapes of the batch: tests/training/test_train.py",
    "model.folder": "tests/training/test_train.py",
    "autoencoder.latent_std": "test_autoencoder: tests/test_export.py",
    "model.attention": "test_the_attention_option_reaches_the_networks",
    "steps": "test_the_loop_does_what_it_is_told",
    "max_skipped": "test_max_skipped_is_how_many_steps_are_forgiven",
    "mesh.data": MESH,
    "mesh.fsdp": MESH,
    "mesh.frozen": MESH,
    "mesh.gather": MESH,
    "mesh.cpu_devices": MESH,
    "mesh.grad_dtype": MESH,
    "profile.steps": "test_some_steps_are_profiled: tests/training/test_train.py",
    "checkpoint.every": LOOP,
    "checkpoint.keep_last": LOOP,
    "checkpoint.keep_every": LOOP,
    "log.every": SHOWN,
    "log.samples_every": SHOWN,
    "log.prompts": SHOWN,
    "log.sample_steps": SHOWN,
    "log.guidance_scale": SHOWN,
    "data.dataset": BATCHES,
    "data.directory": BATCHES,
    "data.data_dir": BATCHES,
    "data.split": BATCHES,
    "data.image_key": BATCHES,
    "data.caption_key": BATCHES,
    "data.latents": BATCHES,
    "data.image_size": BATCHES,
    "data.resize": BATCHES,
    "data.crop": BATCHES,
    "data.flip": BATCHES,
    "data.shuffle": BATCHES,
    "data.max_pixels": BATCHES,
    "data.threads": BATCHES,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return read_folder(write_little(tmp_path_factory.mktemp("little") / "teacher"))


def configure(folder, changes):
    tree = default_config().to_dict()
    tree["model"]["folder"], tree["data"]["image_size"] = str(folder.path), SIZE
    for name, value in changes.items():
        *section, key = name.split(".")
        (tree[section[0]] if section else tree)[key] = value
    return from_dict(tree)


def program(folder, changes):
    """The step's jaxpr, including its constants."""
    config = configure(folder, changes)
    parts = make_parts(config, folder, load_tokenizer(folder))
    params = initial_params(config, parts, folder)  # on the host
    state = jax.eval_shape(lambda: initial_state(config, make_losses(parts), params))
    frozen = jax.eval_shape(lambda: frozen_params(parts, folder))
    batch = {
        "image": jax.ShapeDtypeStruct((2, SIZE, SIZE, 3), jnp.uint8),
        "input_ids": jax.ShapeDtypeStruct((2, 16), jnp.int32),
    }
    return str(jax.make_jaxpr(make_step(config, parts))(state, frozen, batch))


def test_no_option_is_untested():
    tree = default_config()
    names = {
        f"{section}.{key}" if hasattr(value, "items") else section
        for section, value in tree.items()
        for key in (value if hasattr(value, "items") else [None])
    }
    assert names == STEP.keys() | START.keys() | ELSEWHERE.keys()


@pytest.fixture(scope="module")
def programs(folder):
    return {base: program(folder, changes_of(base)) for base in ("lcd", "denoising", "autoencoder", "a LoRA")}


def changes_of(base):
    return BASES.get(base, {"objective": base})


@pytest.mark.parametrize("option", STEP)
def test_an_option_changes_the_step(option, folder, programs):
    value, base = STEP[option]
    assert program(folder, {**changes_of(base), option: value}) != programs[base]


def test_the_same_options_are_the_same_step(folder, programs):
    assert program(folder, {}) == programs["lcd"]


@pytest.mark.parametrize("option", START)
def test_an_option_changes_the_start(option, folder):
    def start(changes):
        config = configure(folder, changes)
        return initial_params(config, make_parts(config, folder, load_tokenizer(folder)), folder)

    value, base = START[option]
    a, b = start(changes_of(base)), start({**changes_of(base), option: value})
    assert any(not np.array_equal(a["unet"][name], b["unet"][name]) for name in a["unet"])


@pytest.mark.parametrize(
    ("option", "dtype", "device", "taken"),
    [
        ("xla", "bfloat16", TPU, "xla"),
        ("cudnn", "bfloat16", VOLTA, "cudnn"),
        ("auto", "bfloat16", TPU, "pallas"),
        ("auto", "bfloat16", CPU, "xla"),
        ("auto", "bfloat16", HOPPER, "cudnn"),
        ("auto", "float32", HOPPER, "xla"),
        ("auto", "bfloat16", VOLTA, "xla"),
        ("auto", "bfloat16", MI250, "xla"),
    ],
)
def test_the_attention_option_reaches_the_networks(folder, option, dtype, device, taken, monkeypatch):
    monkeypatch.setattr("jax.devices", lambda: [device])
    config = configure(folder, {"model.attention": option, "model.dtype": dtype})
    networks = make_parts(config, folder, load_tokenizer(folder)).networks
    assert networks["unet"].options["attention"] == networks["teacher"].options["attention"] == taken


@pytest.mark.parametrize(
    ("dtype", "device", "said"),
    [("bfloat16", TPU, "needs a GPU; this device is a TPU"), ("float32", HOPPER, "needs config.model.dtype=bfloat16")],
)
def test_attention_that_a_device_has_not_is_one_line(dtype, device, said):
    with pytest.raises(UserError, match=said):
        ModelConfig(folder="x", dtype=dtype, attention="cudnn").attention_on(device)


def preview(folder, changes):
    config = configure(folder, changes)
    parts = make_parts(config, folder, load_tokenizer(folder))
    state = initial_state(config, make_losses(parts), initial_params(config, parts, folder))
    return make_preview(config, parts, load_tokenizer(folder))(state["ema"], frozen_params(parts, folder))


def test_a_preview_follows_its_options(folder):
    # the w-embedding's projection must not be zero, or guidance would change nothing
    base = {"log.prompts": ("a red seven",), "log.sample_steps": 1, "lcd.w_embedding_init": "random"}
    usual = preview(folder, base)
    assert usual.shape == (1, SIZE, SIZE, 3)
    assert not np.array_equal(preview(folder, {**base, "log.sample_steps": 2}), usual)
    assert not np.array_equal(preview(folder, {**base, "log.guidance_scale": 2.0}), usual)
    assert preview(folder, {**base, "log.prompts": ("a red seven", "a blue two")}).shape[0] == 2


@pytest.mark.parametrize(
    ("changes", "guided"),
    [
        ({"lcd.w_embedding_dim": 0, "log.guidance_scale": 1.5}, True),
        ({"lcd.w_embedding_dim": 0, "log.guidance_scale": 0.5}, False),
        ({"lcd.w_embedding_dim": 256, "log.guidance_scale": 1.5}, False),
        ({"objective": "denoising", "log.guidance_scale": 1.5}, True),
        ({"objective": "denoising", "log.guidance_scale": 0.0}, False),
    ],
)
def test_a_preview_is_guided_as_a_pipeline_is(folder, changes, guided, monkeypatch):
    made = []
    monkeypatch.setattr("lcm_jax.training.previews.Sampler", lambda **options: made.append(options))
    config = configure(folder, changes)
    make_preview(config, make_parts(config, folder, load_tokenizer(folder)), load_tokenizer(folder))
    assert [options["guided"] for options in made] == [guided]


def leavings(folder, workdir, digits_data_dir, changes):
    """The names in the workdir after a run of a few steps, and the steps in its TensorBoard file."""
    config = configure(
        folder,
        {
            "objective": "autoencoder",
            "batch_size": 8,
            "data.data_dir": digits_data_dir,
            "steps": 4,
            "checkpoint.every": 1,
            "checkpoint.keep_last": 1,
            "log.samples_every": 4,
            "log.every": 4,
            **changes,
        },
    )
    train(config, workdir, devices=jax.devices()[:1])
    checkpoints = {path.name for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()}
    samples = {path.name for path in (workdir / "samples").iterdir()} if (workdir / "samples").exists() else set()
    size = sum(path.stat().st_size for path in (workdir / "tensorboard").iterdir())
    return checkpoints, samples, size


def test_the_loop_does_what_it_is_told(folder, tmp_path, digits_data_dir):
    def run(name, **changes):
        options = {key.replace("__", "."): value for key, value in changes.items()}
        return leavings(folder, tmp_path / name, digits_data_dir, options)

    # checkpoint.keep_last is 1, checkpoint.every 1, steps, log.samples_every and log.every 4
    assert run("usual")[:2] == ({"4"}, {"step_000004.png"})
    assert run("more", checkpoint__keep_last=3, log__samples_every=2)[:2] == (
        {"2", "3", "4"},
        {"step_000002.png", "step_000004.png"},
    )
    kept, samples, size = run("quiet", checkpoint__every=3, checkpoint__keep_last=9, log__samples_every=0)
    assert (kept, samples) == ({"3", "4"}, set())
    kept, samples, more = run("fewer", steps=3, checkpoint__keep_every=2, log__samples_every=0, log__every=1)
    assert (kept, samples) == ({"2", "3"}, set())
    assert more > size


@pytest.mark.parametrize("allowed", [1, 3])
def test_max_skipped_is_how_many_steps_are_forgiven(allowed, folder, tmp_path, digits_data_dir):
    changes = {"max_skipped": allowed, "autoencoder.kl_weight": 3e38, "steps": 9}
    with pytest.raises(Exception, match=rf"not finite in {allowed} steps in a row, up to step {allowed};"):
        leavings(folder, tmp_path, digits_data_dir, changes)


def test_config_needs_a_model():
    with pytest.raises(Exception, match="config.model.folder is empty"):
        from_dict(default_config().to_dict())
    assert Config(model=ModelConfig(folder="x")).steps > 0
