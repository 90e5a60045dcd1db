"""Previews of an objective with several trained networks, whose losses need no latents and no captions."""

import dataclasses

import numpy as np
import pytest
from fixtures_folders import write_little

from lcm_jax.adapters.lora import LoraConfig
from lcm_jax.config import Config, LogConfig, ModelConfig
from lcm_jax.data.batches import DataConfig
from lcm_jax.host.images import GAP, LABEL
from lcm_jax.interop.folder import read_folder
from lcm_jax.interop.tokenizer import load_tokenizer
from lcm_jax.objectives import OBJECTIVES
from lcm_jax.objectives.autoencoder import AutoencoderConfig
from lcm_jax.objectives.base import Roles
from lcm_jax.objectives.denoising import DenoisingConfig
from lcm_jax.training.networks import frozen_params, initial_params, make_parts
from lcm_jax.training.previews import LEAST, LINES, make_preview, sheet

SIZE = 8


def roles(options, family):
    return Roles({"generator": family.denoiser, "critic": family.denoiser}, exported={"generator": family.denoiser})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return read_folder(write_little(tmp_path_factory.mktemp("little") / "teacher"))


@pytest.mark.parametrize("needs", [{"images"}, {"condition"}])
@pytest.mark.parametrize("rank", [0, 2])
def test_a_preview_has_the_networks_that_it_samples_with(folder, needs, rank):
    record = dataclasses.replace(OBJECTIVES["denoising"], roles=roles, needs=frozenset(needs))
    config = Config(
        model=ModelConfig(folder=str(folder.path)),
        data=DataConfig(image_size=SIZE),
        objective="denoising",
        lora=LoraConfig(rank=rank),
        log=LogConfig(prompts=("a red seven", "a blue two"), sample_steps=1, guidance_scale=1.0),
    )
    tokenizer = load_tokenizer(folder)
    parts = make_parts(config, folder, tokenizer, (record, DenoisingConfig()))
    params = initial_params(config, parts, folder)
    assert params.keys() == {"unet", "critic"}
    preview, frozen = make_preview(config, parts, tokenizer), frozen_params(parts, folder)
    images = preview(params, frozen)
    assert images.shape == (2, SIZE, SIZE, 3)
    np.testing.assert_array_equal(preview({"unet": params["unet"]}, frozen), images)


def test_the_sheet_is_large_enough_to_see_and_labelled(folder):
    prompts = ("a red seven", "a blue two")
    config = Config(
        model=ModelConfig(folder=str(folder.path)),
        data=DataConfig(image_size=SIZE),
        objective="denoising",
        log=LogConfig(prompts=prompts),
    )
    parts = make_parts(config, folder, load_tokenizer(folder))
    images = np.random.default_rng(0).integers(0, 255, (2, SIZE, SIZE, 3), dtype=np.uint8)
    shown = sheet(config, parts, images, 7)
    bottom = LABEL + LEAST
    assert shown.shape == (bottom + LINES * LABEL, 2 * LEAST + GAP, 3)
    np.testing.assert_array_equal(shown[LABEL : bottom : LEAST // SIZE, : LEAST : LEAST // SIZE], images[0])
    for place in (shown[:LABEL], shown[bottom:, :LEAST], shown[bottom:, LEAST:]):
        assert (place < 128).any()  # ink
    assert sheet(config, parts, images.repeat(64, 1).repeat(64, 2), 7).shape[1] == 2 * 512 + GAP  # not enlarged
    autoencoder = dataclasses.replace(parts, objective=OBJECTIVES["autoencoder"], options=AutoencoderConfig())
    pairs = sheet(config, autoencoder, images, 7)[bottom:]
    assert (pairs[:, :LEAST] != pairs[:, LEAST + GAP :]).any()
