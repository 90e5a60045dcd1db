"""Whole training steps of distillation against torch: the networks of diffusers, the paper's algorithm, AdamW, EMA.

Noise, timesteps and w are the step's random draws; everything else is recomputed in float32.
"""

import dataclasses

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from compiling import QUICK
from fixtures_folders import UNET, build_pipeline, randomize
from torch_lcd import Algorithm1

from lcm_jax.config import Config, EMAConfig, ModelConfig, OptimizerConfig
from lcm_jax.data.config import DataConfig
from lcm_jax.diffusion.guidance import w_embedding
from lcm_jax.families import SD
from lcm_jax.interop.folder import read_folder
from lcm_jax.interop.names import file_key, from_file, to_file
from lcm_jax.interop.tokenizer import load_tokenizer
from lcm_jax.objectives import lcd
from lcm_jax.training.losses import make_losses
from lcm_jax.training.networks import frozen_params, initial_params, make_parts
from lcm_jax.training.state import initial_state
from lcm_jax.training.step import make_step

pytestmark = pytest.mark.usefixtures("one_thread")
BATCH, SIZE, W_DIM = 3, 8, 32
LEARNING_RATES = (5e-4, 1e-3)  # a warm-up of two steps
DECAY, CLIP_NORM, WEIGHT_DECAY, BETAS, EPS = 0.9, 0.05, 0.1, (0.8, 0.95), 1e-3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with every kind of layer in its UNet, and few of them."""
    path = tmp_path_factory.mktemp("golden")
    pipeline = build_pipeline(path / "tokenizer")
    plain = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}  # attention in the middle
    unet = diffusers.UNet2DConditionModel(**{**UNET, **plain})
    one_level = {"down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",)}
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4, **one_level)
    for seed, module in enumerate((unet, vae)):
        randomize(module, seed)
    pipeline.register_modules(unet=unet.eval(), vae=vae.eval())
    pipeline.save_pretrained(path / "teacher")
    return read_folder(path / "teacher")


def configure(folder, solver):
    return Config(
        model=ModelConfig(folder=str(folder.path)),
        data=DataConfig(image_size=SIZE),
        batch_size=BATCH,
        seed=5,
        lcd=lcd.LCDConfig(solver=solver, w_embedding_dim=W_DIM, w_embedding_init="random", empty_prompts=0.3),
        # an eps this large keeps the sign of a gradient near zero from deciding over an update
        optimizer=OptimizerConfig(
            learning_rate=1e-3,
            warmup_steps=2,
            b1=BETAS[0],
            b2=BETAS[1],
            eps=EPS,
            weight_decay=WEIGHT_DECAY,
            clip_norm=CLIP_NORM,
        ),
        ema=EMAConfig(decay=DECAY),
    )


def nchw(x):
    return torch.from_numpy(np.array(x)).permute(0, 3, 1, 2)


def tensor(x):
    return torch.from_numpy(np.array(x))


def called(unet):
    """The UNet as the algorithm calls a network."""
    return lambda z, t, context, w_emb=None: unet(z, t, encoder_hidden_states=context, timestep_cond=w_emb).sample


class Peer:
    """The torch side of a run."""

    def __init__(self, folder, params, ema):
        load = {"use_safetensors": True}
        self.teacher = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet", **load)
        self.vae = diffusers.AutoencoderKL.from_pretrained(folder / "vae", **load)
        self.text = transformers.CLIPTextModel.from_pretrained(folder / "text_encoder")
        self.student, self.target = (self.unet_of(flat) for flat in (params, ema))
        self.optimizer = torch.optim.AdamW(self.student.parameters(), betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY)
        for frozen in (self.teacher, self.vae, self.text, self.target):
            frozen.requires_grad_(False)

    def unet_of(self, flat):
        unet = diffusers.UNet2DConditionModel.from_config({**self.teacher.config, "time_cond_proj_dim": W_DIM})
        unet.load_state_dict({file_key(path): tensor(to_file(path, np.asarray(a))) for path, a in flat.items()})
        return unet

    def step(self, solver, learning_rate, batch, null_ids, vae_noise, draws):
        with torch.no_grad():
            latent = self.vae.encode(nchw(batch["image"]).float() / 127.5 - 1).latent_dist
            z_0 = (latent.mean + latent.std * nchw(vae_noise)) * self.vae.config.scaling_factor
            context = self.text(tensor(batch["input_ids"]).long())[0]
            null = self.text(tensor(null_ids).long())[0].expand_as(context)
            # the libraries' exp differs by more than what is tested here: tests/diffusion/test_guidance.py
            w_emb = tensor(w_embedding(draws.w, W_DIM))
        algorithm = Algorithm1(*map(called, (self.student, self.target, self.teacher)), solver=solver)
        loss = algorithm.loss(z_0, nchw(draws.eps), context, null, w_emb, draws)

        self.optimizer.param_groups[0]["lr"] = learning_rate
        self.optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.student.parameters(), CLIP_NORM)
        self.optimizer.step()
        with torch.no_grad():
            for average, new in zip(self.target.parameters(), self.student.parameters(), strict=True):
                average.copy_(DECAY * average + (1 - DECAY) * new)
        return loss.item(), norm.item()


def assert_same_weights(ours, unet, before):
    """Within 1e-4 of each tensor, and 1e-2 of its own update, which is small: float32 has few digits for it."""
    theirs = {key: np.asarray(value) for key, value in unet.state_dict().items()}
    assert {file_key(path) for path in ours} == theirs.keys()
    updates = {path: np.abs(np.asarray(ours[path]) - before[path]).max() for path in ours}
    for path, array in ours.items():
        reference = from_file(path, theirs[file_key(path)])
        difference = np.abs(array - reference).max()
        assert difference <= 1e-4 * np.abs(reference).max(), path
        assert difference <= 1e-2 * updates[path], (path, difference, updates[path])


def perturbed(params, random):
    """Not a copy of the student, so that the two can't be confused."""
    return {p: jnp.asarray(a + 0.05 * random.standard_normal(a.shape).astype(np.float32)) for p, a in params.items()}


def test_two_steps_are_torchs(folder):
    solver = "dpmpp"  # calls the teacher twice; tests/objectives/test_lcd.py has all solvers
    config = configure(folder, solver)
    parts = make_parts(config, folder, load_tokenizer(folder))
    params = initial_params(config, parts, folder)
    assert np.abs(params["unet"][SD.w_projection]).max() > 0
    state, random = initial_state(config, make_losses(parts), params), np.random.default_rng(0)
    state["ema"] = {"unet": perturbed({p: np.asarray(a) for p, a in params["unet"].items()}, random)}
    peer = Peer(folder.path, params["unet"], state["ema"]["unet"])
    frozen = frozen_params(parts, folder)
    step = jax.jit(make_step(config, parts), compiler_options=QUICK)
    for i, learning_rate in enumerate(LEARNING_RATES):
        batch = {
            "image": random.integers(0, 256, (BATCH, SIZE, SIZE, 3), np.uint8),
            "input_ids": random.integers(0, 500, (BATCH, parts.null_ids.shape[1]), np.int32),
        }
        key_vae, key_draws = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), i))
        shape = (BATCH, *parts.latent_shape(SIZE))
        draws, noise = lcd.draw(key_draws, shape, config.lcd, 1000), jax.random.normal(key_vae, shape)
        before = {name: {p: np.asarray(a) for p, a in state[name]["unet"].items()} for name in ("params", "ema")}
        state, metrics = step(state, frozen, batch)
        loss, norm = peer.step(solver, learning_rate, batch, parts.null_ids, noise, draws)
        assert norm > 2 * CLIP_NORM
        np.testing.assert_allclose([metrics["loss"], metrics["grad_norm"]], [loss, norm], rtol=1e-4)
        assert_same_weights(state["params"]["unet"], peer.student, before["params"])
        assert_same_weights(state["ema"]["unet"], peer.target, before["ema"])


def test_the_student_starts_as_the_teacher(folder):
    """Bit for bit, at every w: the projection of the w-embedding starts at zero."""
    config = dataclasses.replace(configure(folder, "ddim"), lcd=lcd.LCDConfig(w_embedding_dim=W_DIM))
    parts = make_parts(config, folder, load_tokenizer(folder))
    params, frozen = initial_params(config, parts, folder)["unet"], frozen_params(parts, folder)["teacher"]
    student, teacher = (jax.jit(parts.networks[name].apply) for name in ("unet", "teacher"))
    random = np.random.default_rng(0)
    z, context = (random.standard_normal(shape, np.float32) for shape in ((5, 8, 8, 4), (5, 16, 16)))
    t = np.array([0, 19, 259, 500, 999])
    theirs = teacher(frozen, z, t, context)
    for w in (np.zeros(5), np.array([0.5, 2, 7, 10, 14])):
        np.testing.assert_array_equal(student(params, z, t, context, w_embedding(w, W_DIM)), theirs)
    other = {**params, SD.w_projection: params[SD.w_projection] + 0.1}
    assert np.abs(student(other, z, t, context, w_embedding(np.full(5, 7.0), W_DIM)) - theirs).max() > 1e-3
