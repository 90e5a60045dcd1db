"""A config.json with an unsupported value raises an error that names key and value."""

import inspect
import re

import diffusers
import pytest
import transformers

from lcm_jax.errors import UserError, plain
from lcm_jax.interop.config_json import warn_of_unknown
from lcm_jax.interop.network_configs import MODEL_CLASSES, read_clip_text, read_unet, read_vae
from lcm_jax.models import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Network,
)

NUMBER, OPTION = "; supported: a positive whole number", "; supported: None, False"
LISTS = "; supported: a positive whole number up to 1048576, or a list of at most 16, whose items may be such lists"
POSITIVE, BOOLEAN = "; supported: a positive number", "; supported: true, false"
REFUSED = [  # class, key, value, the message after "key is value"
    (read_unet, "act_fn", "gelu", "; supported: 'silu'"),
    (read_unet, "resnet_time_scale_shift", "scale_shift", "; supported: 'default'"),
    (read_unet, "only_cross_attention", True, "; supported: False"),
    (read_unet, "only_cross_attention", [True, False], "; supported: False"),
    (read_unet, "mid_block_type", "UNetMidBlock2DSimpleCrossAttn", "; did you mean 'UNetMidBlock2DCrossAttn'"),
    (read_unet, "downsample_padding", 0, "; supported: 1"),
    (read_unet, "time_embedding_type", "fourier", "; supported: 'positional'"),
    (read_unet, "class_embed_type", "timestep", OPTION),
    (read_unet, "num_class_embeds", 10, OPTION),
    (read_unet, "center_input_sample", True, OPTION),
    (read_unet, "reverse_transformer_layers_per_block", [[[1]]], LISTS),
    (read_unet, "sample_size", [64, "64"], NUMBER),
    (read_unet, "sample_size", 10**6, NUMBER),
    (read_unet, "block_out_channels", [320] * 10**5, NUMBER),
    (read_unet, "block_out_channels", 10**9, NUMBER),
    (read_unet, "down_block_types", [["DownBlock2D"]] * 4, "; supported: a text"),
    (read_unet, "addition_embed_type", "text", "; supported: None, 'text_time'"),
    (read_unet, "norm_num_groups", None, NUMBER),
    (read_unet, "cross_attention_dim", [768, 768, 768, 1024], "; supported: one width for all levels"),
    (read_unet, "block_out_channels", "320", NUMBER),
    (read_unet, "layers_per_block", True, NUMBER),
    (read_unet, "attention_head_dim", None, NUMBER),
    (read_unet, "time_cond_proj_dim", 0, NUMBER),  # not None to diffusers' pipelines: it turns guidance off
    (read_unet, "only_cross_attention", None, "; supported: False"),
    (read_unet, "addition_time_embed_dim", [256], NUMBER),
    (read_unet, "projection_class_embeddings_input_dim", "2816", NUMBER),
    (read_unet, "norm_eps", None, POSITIVE),
    (read_unet, "norm_eps", 0, POSITIVE),
    (read_unet, "freq_shift", "0", "; supported: a number"),
    (read_unet, "freq_shift", None, "; supported: a number"),  # as diffusers, which fails at it
    (read_unet, "use_linear_projection", "false", BOOLEAN),
    (read_unet, "flip_sin_to_cos", 1, BOOLEAN),
    (read_vae, "act_fn", "relu", "; supported: 'silu'"),
    (read_vae, "latents_mean", 0.1, "; supported: a list of numbers, one per latent channel, or null"),
    (read_vae, "layers_per_block", 0, NUMBER),
    (read_vae, "scaling_factor", None, POSITIVE),
    (read_vae, "scaling_factor", float("nan"), POSITIVE),
    (read_vae, "shift_factor", True, "; supported: a number"),
    (read_vae, "use_quant_conv", "no", BOOLEAN),
    (read_vae, "use_post_quant_conv", None, BOOLEAN),
    (read_vae, "mid_block_add_attention", [], BOOLEAN),
    (read_clip_text, "hidden_act", "relu", "; did you mean 'gelu'?"),
    (read_clip_text, "model_type", "t5", "; choose from clip_text_model"),
    (read_clip_text, "vocab_size", "many", NUMBER),
    (read_clip_text, "projection_dim", -1, NUMBER),
    (read_clip_text, "eos_token_id", [1, 2], "; supported: one token id"),
    (read_clip_text, "eos_token_id", [49407], "; supported: one token id"),  # transformers fails at it, and at null
    (read_clip_text, "eos_token_id", None, "; supported: one token id"),
    (read_clip_text, "projection_dim", False, NUMBER),
    (read_clip_text, "eos_token_id", True, "; supported: one token id"),
    (read_clip_text, "layer_norm_eps", "1e-5", POSITIVE),
]
INCONSISTENT = [  # class, config, message
    (read_unet, {"num_attention_heads": 8}, "num_attention_heads is set; diffusers stores the number of heads as"),
    (read_unet, {"addition_embed_type": "text_time"}, "addition_time_embed_dim is None" + NUMBER),
    (
        read_unet,
        {"addition_embed_type": "text_time", "addition_time_embed_dim": 4},
        "projection_class_embeddings_input_dim is None" + NUMBER,
    ),
    (read_unet, {"down_block_types": ["AttnDownBlock2D"] * 4}, "down_block_types is 'AttnDownBlock2D'; did you mean"),
    (read_unet, {"up_block_types": ["DownBlock2D"] * 4}, "up_block_types is 'DownBlock2D'; did you mean 'UpBlock2D'"),
    (
        read_unet,
        {"down_block_types": ["DownBlock2D"]},
        "down_block_types has 1 values; block_out_channels has 4 levels",
    ),
    (read_unet, {"cross_attention_dim": [768]}, "cross_attention_dim has 1 values; block_out_channels has 4 levels"),
    (read_unet, {"only_cross_attention": [False]}, "only_cross_attention has 1 values; block_out_channels has 4"),
    (read_unet, {"attention_head_dim": [8, 8]}, "attention_head_dim has 2 values; block_out_channels has 4 levels"),
    (read_unet, {"transformer_layers_per_block": [1, [2], 1, 1]}, "per_block has [2] for a block of 2 transformers"),
    (
        read_unet,
        {"transformer_layers_per_block": [1, [2, 1], 1, 1]},
        "has a list for a level; reverse_transformer_layers_per_block must then be given",
    ),
    (
        read_unet,
        {"transformer_layers_per_block": 1, "reverse_transformer_layers_per_block": [1, [2, 1], 1, 1]},
        "reverse_transformer_layers_per_block has [2, 1] for a block of 3 transformers",
    ),
    (read_unet, {"attention_head_dim": 7}, "block_out_channels has 320, not a multiple of 7 heads and 32 norm groups"),
    (read_unet, {"norm_num_groups": 48}, "block_out_channels has 320, not a multiple of 8 heads and 48 norm groups"),
    (read_unet, {"layers_per_block": 10**6}, "it describes a network of more than 20000 tensors"),
    (read_vae, {"layers_per_block": 10**6}, "it describes a network of more than 20000 tensors"),
    (read_clip_text, {"num_hidden_layers": 10**6}, "it describes a network of more than 20000 tensors"),
    (read_vae, {"down_block_types": ["AttnDownEncoderBlock2D"]}, "down_block_types is 'AttnDownEncoderBlock2D'; did"),
    (read_vae, {"up_block_types": ["UpDecoderBlock2D"] * 2}, "up_block_types has 2 values; block_out_channels has 1"),
    (read_vae, {"block_out_channels": [64, 80]}, "block_out_channels has 80, not a multiple of 32 norm groups"),
    (read_vae, {"latents_mean": [0.1]}, "latents_mean has 1 values; latent_channels is 4"),
    (read_vae, {"latents_std": [1] * 4}, "latents_std is given alone; latents_mean and latents_std belong together"),
    (read_vae, {"latents_mean": [0] * 4, "latents_std": [1, 1, 1, 0]}, "its values must be positive"),
    (read_clip_text, {"num_attention_heads": 7}, "hidden_size is 512, not a multiple of 7 heads"),
]


@pytest.mark.parametrize(
    ("read", "config", "message"),
    [(c, {key: value}, f"{key} is {plain(repr(value), 100)}{rest}") for c, key, value, rest in REFUSED] + INCONSISTENT,
    ids=lambda value: getattr(value, "__name__", str(value)[:60]),
)
def test_what_is_not_supported_is_named(read, config, message):
    with pytest.raises(UserError, match=re.escape(message)) as error:
        read(config)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("class_name", MODEL_CLASSES)
def test_an_empty_config_takes_the_peers_defaults(class_name):
    read = MODEL_CLASSES[class_name].read
    if class_name.startswith("CLIP"):
        defaults = transformers.CLIPTextConfig().to_dict()
    else:
        signature = inspect.signature(getattr(diffusers, class_name).__init__)
        defaults = {name: p.default for name, p in signature.parameters.items() if name != "self"}
    assert read({}) == read(defaults)


@pytest.mark.parametrize("class_name", ["UNet2DConditionModel", "AutoencoderKL"])
def test_all_keys_of_diffusers_are_known(class_name, recwarn):
    parameters = set(inspect.signature(getattr(diffusers, class_name).__init__).parameters) - {"self"}
    known = MODEL_CLASSES[class_name].known
    assert parameters <= known
    warn_of_unknown({**dict.fromkeys(parameters, 3), "_note": 3, "off": False, "none": None}, known, "x.json")
    assert not recwarn.list
    with pytest.warns(UserWarning, match="^x.json has unknown keys.* ignored: an_option_of_tomorrow, another$"):
        warn_of_unknown({"an_option_of_tomorrow": 3, "another": [1]}, known, "x.json")


def test_notes_and_options_that_are_off_are_read_over():
    off = {
        "_class_name": "UNet2DConditionModel",
        "_name_or_path": "/x",
        "an_option_of_tomorrow": None,
        "another": False,
    }
    assert read_unet(off) == read_unet({})


def test_the_size_of_the_images_is_no_part_of_the_network():
    """The file gives one number or a pair; a list in the config would keep it from being the key of a cache."""
    for read in (read_unet, read_vae):
        plain = read({})
        for size in (64, [64, 96], None):
            config = read({"sample_size": size})
            assert config == plain
            assert hash(config) == hash(plain)


@pytest.mark.parametrize(
    ("read", "config", "same"),
    [
        (read_unet, {"cross_attention_dim": [768] * 4}, {"cross_attention_dim": 768}),
        (read_unet, {"only_cross_attention": [False] * 4}, {}),
        (read_unet, {"use_linear_projection": None}, {}),
        (read_vae, {"force_upcast": None}, {}),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_values_that_mean_the_same_to_diffusers(read, config, same):
    assert read(config) == read(same)


def test_lists_of_the_file_become_hashable():
    lists = {
        "attention_head_dim": [5, 10, 20, 20],
        "layers_per_block": [2] * 4,
        "transformer_layers_per_block": [1] * 4,
    }
    assert hash(read_unet(lists)) == hash(read_unet(lists))


@pytest.mark.parametrize("width", [None, 0])
def test_a_projection_needs_its_width(width):
    config = read_clip_text({"projection_dim": width, "num_hidden_layers": 1})
    Network(CLIPTextModel, config)
    with pytest.raises(
        UserError, match=f"projection_dim is {width}; CLIPTextModelWithProjection needs a positive whole"
    ):
        Network(CLIPTextModelWithProjection, config)
