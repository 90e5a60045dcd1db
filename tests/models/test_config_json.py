"""A config.json with an unsupported value raises an error that names key and value."""

import inspect
import re

import diffusers
import pytest
import transformers

from lcm_jax.errors import UserError, plain
from lcm_jax.models import (
    MODEL_CLASSES,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Network,
    UNetConfig,
    VAEConfig,
)
from lcm_jax.models.config_json import warn_of_unknown

NUMBER, OPTION = "; supported: a positive whole number", "; supported: None, False"
POSITIVE, BOOLEAN = "; supported: a positive number", "; supported: true, false"
REFUSED = [  # class, key, value, what is said after "key is value"
    (UNetConfig, "act_fn", "gelu", "; supported: 'silu'"),
    (UNetConfig, "resnet_time_scale_shift", "scale_shift", "; supported: 'default'"),
    (UNetConfig, "only_cross_attention", True, "; supported: False"),
    (UNetConfig, "only_cross_attention", [True, False], "; supported: False"),
    (UNetConfig, "mid_block_type", "UNetMidBlock2D", "; supported: 'UNetMidBlock2DCrossAttn'"),
    (UNetConfig, "mid_block_type", None, "; supported: 'UNetMidBlock2DCrossAttn'"),
    (UNetConfig, "downsample_padding", 0, "; supported: 1"),
    (UNetConfig, "time_embedding_type", "fourier", "; supported: 'positional'"),
    (UNetConfig, "class_embed_type", "timestep", OPTION),
    (UNetConfig, "num_class_embeds", 10, OPTION),
    (UNetConfig, "center_input_sample", True, OPTION),
    (UNetConfig, "reverse_transformer_layers_per_block", [[1]], OPTION),
    (UNetConfig, "sample_size", [64, "64"], NUMBER),
    (UNetConfig, "sample_size", 10**6, NUMBER),
    (UNetConfig, "block_out_channels", [320] * 10**5, NUMBER),
    (UNetConfig, "block_out_channels", 10**9, NUMBER),
    (UNetConfig, "down_block_types", [["DownBlock2D"]] * 4, "; supported: a text"),
    (UNetConfig, "addition_embed_type", "text", "; supported: None, 'text_time'"),
    (UNetConfig, "norm_num_groups", None, NUMBER),
    (UNetConfig, "cross_attention_dim", [768, 768, 768, 1024], "; supported: one width for all levels"),
    (UNetConfig, "block_out_channels", "320", NUMBER),
    (UNetConfig, "layers_per_block", True, NUMBER),
    (UNetConfig, "attention_head_dim", None, NUMBER),
    (UNetConfig, "time_cond_proj_dim", 0, NUMBER),  # not None to diffusers' pipelines: it turns guidance off
    (UNetConfig, "only_cross_attention", None, "; supported: False"),
    (UNetConfig, "addition_time_embed_dim", [256], NUMBER),
    (UNetConfig, "projection_class_embeddings_input_dim", "2816", NUMBER),
    (UNetConfig, "norm_eps", None, POSITIVE),
    (UNetConfig, "norm_eps", 0, POSITIVE),
    (UNetConfig, "freq_shift", "0", "; supported: a number"),
    (UNetConfig, "freq_shift", None, "; supported: a number"),  # as diffusers, which fails at it
    (UNetConfig, "use_linear_projection", "false", BOOLEAN),
    (UNetConfig, "flip_sin_to_cos", 1, BOOLEAN),
    (VAEConfig, "act_fn", "relu", "; supported: 'silu'"),
    (VAEConfig, "latents_mean", [0.1], "; supported: None"),
    (VAEConfig, "layers_per_block", 0, NUMBER),
    (VAEConfig, "scaling_factor", None, POSITIVE),
    (VAEConfig, "scaling_factor", float("nan"), POSITIVE),
    (VAEConfig, "shift_factor", True, "; supported: a number"),
    (VAEConfig, "use_quant_conv", "no", BOOLEAN),
    (VAEConfig, "use_post_quant_conv", None, BOOLEAN),
    (VAEConfig, "mid_block_add_attention", [], BOOLEAN),
    (CLIPTextConfig, "hidden_act", "relu", "; did you mean 'gelu'?"),
    (CLIPTextConfig, "model_type", "t5", "; choose from clip_text_model"),
    (CLIPTextConfig, "vocab_size", "many", NUMBER),
    (CLIPTextConfig, "projection_dim", -1, NUMBER),
    (CLIPTextConfig, "eos_token_id", [1, 2], "; supported: one token id"),
    (CLIPTextConfig, "eos_token_id", [49407], "; supported: one token id"),  # transformers fails at it, and at null
    (CLIPTextConfig, "eos_token_id", None, "; supported: one token id"),
    (CLIPTextConfig, "projection_dim", False, NUMBER),
    (CLIPTextConfig, "eos_token_id", True, "; supported: one token id"),
    (CLIPTextConfig, "layer_norm_eps", "1e-5", POSITIVE),
]
INCONSISTENT = [  # class, config, message
    (UNetConfig, {"num_attention_heads": 8}, "num_attention_heads is set; diffusers stores the number of heads as"),
    (UNetConfig, {"addition_embed_type": "text_time"}, "addition_time_embed_dim is None" + NUMBER),
    (
        UNetConfig,
        {"addition_embed_type": "text_time", "addition_time_embed_dim": 4},
        "projection_class_embeddings_input_dim is None" + NUMBER,
    ),
    (UNetConfig, {"down_block_types": ["AttnDownBlock2D"] * 4}, "down_block_types is 'AttnDownBlock2D'; did you mean"),
    (UNetConfig, {"up_block_types": ["DownBlock2D"] * 4}, "up_block_types is 'DownBlock2D'; did you mean 'UpBlock2D'"),
    (
        UNetConfig,
        {"down_block_types": ["DownBlock2D"]},
        "down_block_types has 1 values; block_out_channels has 4 levels",
    ),
    (UNetConfig, {"cross_attention_dim": [768]}, "cross_attention_dim has 1 values; block_out_channels has 4 levels"),
    (UNetConfig, {"only_cross_attention": [False]}, "only_cross_attention has 1 values; block_out_channels has 4"),
    (UNetConfig, {"attention_head_dim": [8, 8]}, "attention_head_dim has 2 values; block_out_channels has 4 levels"),
    (UNetConfig, {"transformer_layers_per_block": [1, [2], 1, 1]}, "per_block is [1, [2], 1, 1]" + NUMBER),
    (UNetConfig, {"attention_head_dim": 7}, "block_out_channels has 320, not a multiple of 7 heads and 32 norm groups"),
    (UNetConfig, {"norm_num_groups": 48}, "block_out_channels has 320, not a multiple of 8 heads and 48 norm groups"),
    (UNetConfig, {"layers_per_block": 10**6}, "it describes a network of more than 20000 tensors"),
    (VAEConfig, {"layers_per_block": 10**6}, "it describes a network of more than 20000 tensors"),
    (CLIPTextConfig, {"num_hidden_layers": 10**6}, "it describes a network of more than 20000 tensors"),
    (VAEConfig, {"down_block_types": ["AttnDownEncoderBlock2D"]}, "down_block_types is 'AttnDownEncoderBlock2D'; did"),
    (VAEConfig, {"up_block_types": ["UpDecoderBlock2D"] * 2}, "up_block_types has 2 values; block_out_channels has 1"),
    (VAEConfig, {"block_out_channels": [64, 80]}, "block_out_channels has 80, not a multiple of 32 norm groups"),
    (CLIPTextConfig, {"num_attention_heads": 7}, "hidden_size is 512, not a multiple of 7 heads"),
]


@pytest.mark.parametrize(
    ("config_class", "config", "message"),
    [(c, {key: value}, f"{key} is {plain(repr(value), 100)}{rest}") for c, key, value, rest in REFUSED] + INCONSISTENT,
    ids=lambda value: str(value)[:60],
)
def test_what_is_not_supported_is_named(config_class, config, message):
    with pytest.raises(UserError, match=re.escape(message)) as error:
        config_class.from_dict(config)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("class_name", MODEL_CLASSES)
def test_an_empty_config_takes_the_peers_defaults(class_name):
    config_class, _ = MODEL_CLASSES[class_name]
    if class_name.startswith("CLIP"):
        defaults = transformers.CLIPTextConfig().to_dict()
    else:
        signature = inspect.signature(getattr(diffusers, class_name).__init__)
        defaults = {name: p.default for name, p in signature.parameters.items() if name != "self"}
    assert config_class.from_dict({}) == config_class.from_dict(defaults)


@pytest.mark.parametrize("class_name", ["UNet2DConditionModel", "AutoencoderKL"])
def test_all_keys_of_diffusers_are_known(class_name, recwarn):
    parameters = set(inspect.signature(getattr(diffusers, class_name).__init__).parameters) - {"self"}
    known = MODEL_CLASSES[class_name][0].KNOWN
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
    assert UNetConfig.from_dict(off) == UNetConfig.from_dict({})


def test_the_size_of_the_pictures_is_no_part_of_the_network():
    """The file gives one number or a pair; a list in the config would keep it from being the key of a cache."""
    for config_class in (UNetConfig, VAEConfig):
        plain = config_class.from_dict({})
        for size in (64, [64, 96], None):
            config = config_class.from_dict({"sample_size": size})
            assert config == plain
            assert hash(config) == hash(plain)


@pytest.mark.parametrize(
    ("config_class", "config", "same"),
    [
        (UNetConfig, {"cross_attention_dim": [768] * 4}, {"cross_attention_dim": 768}),
        (UNetConfig, {"only_cross_attention": [False] * 4}, {}),
        (UNetConfig, {"use_linear_projection": None}, {}),
        (VAEConfig, {"force_upcast": None}, {}),
    ],
    ids=str,
)
def test_values_that_mean_the_same_to_diffusers(config_class, config, same):
    assert config_class.from_dict(config) == config_class.from_dict(same)


def test_lists_of_the_file_become_hashable():
    lists = {
        "attention_head_dim": [5, 10, 20, 20],
        "layers_per_block": [2] * 4,
        "transformer_layers_per_block": [1] * 4,
    }
    assert hash(UNetConfig.from_dict(lists)) == hash(UNetConfig.from_dict(lists))


@pytest.mark.parametrize("width", [None, 0])
def test_a_projection_needs_its_width(width):
    config = CLIPTextConfig.from_dict({"projection_dim": width, "num_hidden_layers": 1})
    Network(CLIPTextModel, config)
    with pytest.raises(
        UserError, match=f"projection_dim is {width}; CLIPTextModelWithProjection needs a positive whole"
    ):
        Network(CLIPTextModelWithProjection, config)
