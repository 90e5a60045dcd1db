"""The published models: all parameter names and shapes and all norms' eps equal the library's. "
"No weights are created."""

import diffusers
import pytest
import torch
import transformers
from flax import nnx
from torch_weights import CLIP_PREFIX, network

from lcm_jax.interop import names
from lcm_jax.models.functional import unflatten
from lcm_jax.models.norms import GroupNorm, LayerNorm

# The values of the published config.json files.
SD15_UNET = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "center_input_sample": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
    "downsample_padding": 1,
    "mid_block_scale_factor": 1,
    "act_fn": "silu",
    "norm_num_groups": 32,
    "norm_eps": 1e-05,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
SD21_UNET = {
    **SD15_UNET,
    "sample_size": 96,
    "cross_attention_dim": 1024,
    "attention_head_dim": [5, 10, 20, 20],
    "dual_cross_attention": False,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "upcast_attention": True,
    "use_linear_projection": True,
}
SDXL_UNET = {
    **SD15_UNET,
    "sample_size": 128,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [320, 640, 1280],
    "cross_attention_dim": 2048,
    "attention_head_dim": [5, 10, 20],
    "transformer_layers_per_block": [1, 2, 10],
    "addition_embed_type": "text_time",
    "addition_embed_type_num_heads": 64,
    "addition_time_embed_dim": 256,
    "class_embed_type": None,
    "class_embeddings_concat": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_norm": None,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "mid_block_only_cross_attention": None,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "num_attention_heads": None,
    "projection_class_embeddings_input_dim": 2816,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "default",
    "time_cond_proj_dim": None,
    "time_embedding_act_fn": None,
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
    "upcast_attention": None,
    "use_linear_projection": True,
}
SSD1B = {
    "transformer_layers_per_block": [1, [2, 2], [4, 4]],
    "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1],
    "mid_block_type": "UNetMidBlock2D",
}
VEGA = {"transformer_layers_per_block": [1, 1, 2], "mid_block_type": "UNetMidBlock2D"}
KOALA_700M = {"transformer_layers_per_block": [1, 2, 5], "layers_per_block": 1, "mid_block_type": None}
KOALA_1B = {"transformer_layers_per_block": [1, 2, 6], "layers_per_block": 1}
LCM = {"time_cond_proj_dim": 256}
VAE = {
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 512,
    "scaling_factor": 0.18215,
}
CLIP_L = {
    "hidden_act": "quick_gelu",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "projection_dim": 768,
}
OPENCLIP_H = {  # without its last layer, as SD 2.1's folder has it
    "hidden_act": "gelu",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 23,
    "projection_dim": 512,
}
OPENCLIP_G = {
    "hidden_act": "gelu",
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_attention_heads": 20,
    "num_hidden_layers": 32,
    "projection_dim": 1280,
}

UNet, CLIP = diffusers.UNet2DConditionModel, transformers.CLIPTextModel
CASES = {  # class, config.json, millions of parameters as published
    "SD 1.5": (UNet, SD15_UNET, 859.5),
    "LCM of SD 1.5": (UNet, {**SD15_UNET, **LCM}, 859.6),
    "SD 2.1": (UNet, SD21_UNET, 865.9),
    "LCM of SD 2.1": (UNet, {**SD21_UNET, **LCM}, 866.0),
    "SDXL": (UNet, SDXL_UNET, 2567.5),
    "LCM of SDXL": (UNet, {**SDXL_UNET, **LCM}, 2567.5),
    "SSD-1B": (UNet, {**SDXL_UNET, **SSD1B}, 1331.3),
    "Segmind-Vega": (UNet, {**SDXL_UNET, **VEGA}, 745.2),
    "KOALA-700M": (UNet, {**SDXL_UNET, **KOALA_700M}, 782.8),
    "KOALA-1B": (UNet, {**SDXL_UNET, **KOALA_1B}, 1161.2),
    "autoencoder": (diffusers.AutoencoderKL, VAE, 83.7),
    "CLIP-L": (CLIP, CLIP_L, 123.1),
    "OpenCLIP-H": (CLIP, OPENCLIP_H, 340.4),
    "OpenCLIP-G": (transformers.CLIPTextModelWithProjection, OPENCLIP_G, 694.7),
}


@pytest.mark.parametrize(("peer_class", "config", "millions"), CASES.values(), ids=CASES)
def test_structure_is_the_peers(peer_class, config, millions):
    with torch.device("meta"):
        is_clip = issubclass(peer_class, transformers.PreTrainedModel)
        peer = peer_class(transformers.CLIPTextConfig(**config)) if is_clip else peer_class(**config)
    net = network(peer)
    ours = {names.file_key(path): names.file_shape(path, leaf.shape) for path, leaf in net.shapes.items()}
    theirs = {key.removeprefix(CLIP_PREFIX): tuple(tensor.shape) for key, tensor in peer.named_parameters()}
    assert ours == theirs
    assert sum(p.numel() for p in peer.parameters()) / 1e6 == pytest.approx(millions, abs=0.06)

    # 1e-5 or 1e-6: too small a difference for outputs to show
    modules = nnx.iter_modules(nnx.merge(net._graphdef, unflatten(net.shapes)))
    ours = {
        ".".join(map(str, path)): eps(m) for path, m in modules if isinstance(m, (GroupNorm, LayerNorm, nnx.LayerNorm))
    }
    norms = (torch.nn.GroupNorm, torch.nn.LayerNorm)
    theirs = {key.removeprefix(CLIP_PREFIX): m.eps for key, m in peer.named_modules() if isinstance(m, norms)}
    assert ours == theirs


def eps(norm: GroupNorm | LayerNorm | nnx.LayerNorm) -> float:
    return norm.epsilon if isinstance(norm, nnx.LayerNorm) else norm.eps
