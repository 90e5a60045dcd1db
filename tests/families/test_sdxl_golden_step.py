"""A step of distilling Stable Diffusion XL against torch: diffusers' text encoders and UNets, the paper's algorithm."""

import json

import diffusers
import jax
import numpy as np
import pytest
import torch
from compiling import QUICK
from fixtures_folders import latents
from fixtures_sdxl import build_sdxl
from torch_lcd import Algorithm1

from lcm_jax.config import Config, ModelConfig
from lcm_jax.data.config import DataConfig
from lcm_jax.diffusion.guidance import w_embedding
from lcm_jax.interop.folder import read_folder
from lcm_jax.interop.names import file_key, to_file
from lcm_jax.interop.tokenizer import load_tokenizer
from lcm_jax.objectives.lcd import Draws, LCDConfig
from lcm_jax.training.losses import make_losses
from lcm_jax.training.networks import frozen_params, initial_params, make_parts

pytestmark = pytest.mark.usefixtures("one_thread")
PROMPTS, SIZE, W_DIM = ["a red seven", "red", "words"], 8, 32
SIZES = np.asarray([[20, 30, 1, 2, 16, 17], [16, 16, 0, 0, 16, 16], [40, 9, 5, 0, 18, 16]], np.int32)
DRAWS = Draws(
    eps=latents(0, 3, 4, 4, 4),
    i=np.array([2, 24, 49]),
    w=np.array([2.0, 14.0, 7.5], np.float32),
    drop=np.array([False, True, False]),
)


@pytest.fixture(scope="module")
def peer(tmp_path_factory):
    """One level, and the only transformer is in the middle of its UNet."""
    one = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (8,)}
    return build_sdxl(tmp_path_factory.mktemp("tokenizers"), 2, transformer_layers_per_block=1, **one)


@pytest.fixture(scope="module")
def path(peer, tmp_path_factory):
    path = tmp_path_factory.mktemp("golden") / "teacher"
    peer.save_pretrained(path)
    return path


def perturbed(params, seed):
    random = np.random.default_rng(seed)
    return {p: a + 0.05 * random.standard_normal(a.shape).astype(np.float32) for p, a in params.items()}


def unet_of(flat, config):
    known = {key: value for key, value in config.items() if not key.startswith("_")}
    unet = diffusers.UNet2DConditionModel(**{**known, "time_cond_proj_dim": W_DIM})
    unet.load_state_dict({file_key(p): torch.from_numpy(np.array(to_file(p, np.asarray(a)))) for p, a in flat.items()})
    return unet


def called(unet):
    """The UNet as the algorithm calls a network."""

    def call(z, t, condition, w_emb=None):
        context, *added = condition
        added = dict(zip(("text_embeds", "time_ids"), added, strict=True))
        return unet(z, t, context, timestep_cond=w_emb, added_cond_kwargs=added).sample

    return call


@pytest.mark.parametrize(
    ("solver", "zeros"), [("ddim", True), ("dpm", False), ("dpmpp", True)], ids=["ddim", "dpm, encoded", "dpmpp"]
)
def test_loss_and_gradient_are_torchs(path, peer, solver, zeros):
    """Of the run's own loss, from token ids, sizes and cached latents on.

    Guidance leads away from zeros, or from the encoded empty prompt.
    """
    index = json.loads((path / "model_index.json").read_text())
    (path / "model_index.json").write_text(json.dumps({**index, "force_zeros_for_empty_prompt": zeros}))
    folder = read_folder(path)
    config = Config(
        model=ModelConfig(folder=str(folder.path)),
        data=DataConfig(latents=True, image_size=SIZE),
        batch_size=len(PROMPTS),
        lcd=LCDConfig(solver=solver, w_embedding_dim=W_DIM, w_embedding_init="random"),
    )
    tokenizer = load_tokenizer(folder)
    parts = make_parts(config, folder, tokenizer)
    student = perturbed(initial_params(config, parts, folder)["unet"], 1)  # not the teacher
    average = perturbed(student, 2)
    z_0 = latents(1, 3, 4, 4, 4)
    noise = latents(2, 3, 4, 4, 4)
    moments = np.concatenate([z_0 / 0.13025, np.full_like(z_0, -30)], -1)  # without variance
    batch = {"input_ids": tokenizer(PROMPTS), "sizes": SIZES, "moments": moments}
    loss = make_losses(parts)["student"].loss
    (value, _), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=QUICK)(
        {"unet": student}, {"unet": average}, frozen_params(parts, folder), batch, (noise, DRAWS)
    )

    with torch.no_grad():
        context, null, pooled, null_pooled = peer.encode_prompt(PROMPTS, negative_prompt=None if zeros else "")
    time_ids = torch.from_numpy(SIZES).float()
    condition, null_condition = (context, pooled, time_ids), (null, null_pooled, time_ids)
    theirs = unet_of(student, peer.unet.config)
    networks = map(called, (theirs, unet_of(average, peer.unet.config), peer.unet))
    nchw = (torch.from_numpy(x.transpose(0, 3, 1, 2).copy()) for x in (z_0, DRAWS.eps))
    w_emb = torch.from_numpy(np.array(w_embedding(DRAWS.w, W_DIM)))
    expected = Algorithm1(*networks, solver=solver).loss(*nchw, condition, null_condition, w_emb, DRAWS)
    expected.backward()
    assert abs(value - expected.item()) <= 1e-4 * expected.item()
    reference = {key: parameter.grad.numpy() for key, parameter in theirs.named_parameters()}
    assert reference.keys() == {file_key(path) for path in gradient["unet"]}
    for path, ours in gradient["unet"].items():
        difference = np.abs(to_file(path, np.asarray(ours)) - reference[file_key(path)]).max()
        assert difference <= 1e-4 * np.abs(reference[file_key(path)]).max(), path
