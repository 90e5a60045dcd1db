"""Names of the original Stable Diffusion code, checked against diffusers' conversion of full checkpoints."""

import diffusers
import pytest
import torch
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from fixtures_folders import UNET

from lcm_jax.interop.lora.ldm_names import ldm_names

OTHER = {
    **UNET,
    "block_out_channels": (8, 16, 16),
    "layers_per_block": 3,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": 2,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 40,
}


@pytest.mark.parametrize(
    "config", [{}, UNET, OTHER], ids=["SD 1.5's blocks", "two levels", "three levels of SDXL's kind"]
)
def test_all_modules(config):
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(**config)
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    modules = [path for path, module in unet.named_modules() if isinstance(module, kinds)]
    names = ldm_names(modules)
    assert names.keys() == set(modules)
    checkpoint = {
        f"model.diffusion_model.{name}.{leaf}": f"{module}.{leaf}"
        for module, name in names.items()
        for leaf in ("weight", "bias")
    }
    converted = convert_ldm_unet_checkpoint(checkpoint, unet.config)
    assert {f"{module}.weight" for module in modules} <= converted.keys()
    assert {key: name for key, name in converted.items() if name not in (key, None)} == {}


def test_upsamplers():
    """After the transformer, if the level has one: diffusers' conversion accepts both positions in any level."""
    blocks = ["up_blocks.0.resnets.0.conv1", "up_blocks.1.resnets.0.conv1", "up_blocks.1.attentions.0.proj_in"]
    names = ldm_names([*blocks, "up_blocks.0.upsamplers.0.conv", "up_blocks.1.upsamplers.0.conv"])
    assert names["up_blocks.0.upsamplers.0.conv"] == "output_blocks.0.1.conv"
    assert names["up_blocks.1.upsamplers.0.conv"] == "output_blocks.1.2.conv"


def test_modules_without_such_a_name():
    assert ldm_names(["time_embedding.cond_proj", "encoder.layers.0.mlp.fc1"]) == {}
