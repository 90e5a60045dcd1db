"""Checks the networks' declared shapes and dtypes at run time, in both policies and with remat."""

import subprocess
import sys

PROGRAM = """
import jaxtyping

with jaxtyping.install_import_hook(["lcm_jax.models"], "beartype.beartype"):
    import lcm_jax.interop.network_configs as network_configs
    import lcm_jax.models as models

import jax
import jax.numpy as jnp

FLOAT = jnp.float32
S = jax.ShapeDtypeStruct


def shape(net, *args, **kwargs):
    return jax.eval_shape(lambda params, args: net.apply(params, *args, **kwargs), net.shapes, args)


unet = {
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "cross_attention_dim": 12,
    "attention_head_dim": [2, 4],
    "norm_num_groups": 4,
    "time_cond_proj_dim": 10,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 7 + 6 * 4,
    "out_channels": 3,
}
added = {"text_embeds": S((2, 7), FLOAT), "time_ids": S((2, 6), jnp.int32)}
vae = {
    "block_out_channels": [8, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "norm_num_groups": 4,
    "in_channels": 1,
    "out_channels": 2,
}
clip = {"vocab_size": 9, "hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1, "projection_dim": 6}


def network(name, config, **options):
    known = network_configs.MODEL_CLASSES[name]
    return models.Network(known.model, known.read(config), **options)


for policy in map(models.Policy.named, ("float32", "bfloat16")):
    for remat in ("none", "block"):
        for t, linear in ((jnp.int32, True), (FLOAT, False)):
            net = network("UNet2DConditionModel", {**unet, "use_linear_projection": linear}, policy=policy, remat=remat)
            given = S((2, 7, 5, 4), FLOAT), S((2,), t), S((2, 3, 12), FLOAT), S((2, 10), FLOAT), added
            out = shape(net, *given)
            assert (out.shape, out.dtype) == ((2, 7, 5, 3), FLOAT)
    for options in ({}, {"use_quant_conv": False, "mid_block_add_attention": False}):
        net = network("AutoencoderKL", {**vae, **options}, policy=policy)
        image, latent = S((2, 6, 8, 1), FLOAT), S((2, 3, 4, 4), FLOAT)
        assert shape(net, image).shape == (2, 6, 8, 2)
        assert shape(net, image, latent, method="to_latents").shape == (2, 3, 4, 4)
        assert shape(net, image, None, method="to_latents").shape == (2, 3, 4, 4)
        assert shape(net, latent, method="to_images").shape == (2, 6, 8, 2)
    for name, width in (("CLIPTextModel", 8), ("CLIPTextModelWithProjection", 6)):
        net, ids = network(name, clip, policy=policy), S((2, 5), jnp.int32)
        assert shape(net, ids).shape == (2, 5, 8)
        assert shape(net, ids, method="hidden_states")[1].shape == (2, width)

try:  # and a wrong one is noticed
    shape(network("CLIPTextModel", clip), S((2, 5), FLOAT))
except jaxtyping.TypeCheckError:
    print("checked")
"""


def test_shapes_and_dtypes_are_as_declared():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == "checked\n"
