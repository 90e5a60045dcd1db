"""The text encoder against transformers'."""

import functools

import jax
import numpy as np
import pytest
import torch
import transformers
from compiling import QUICK
from torch_weights import assert_close, network, random_weights

from lcm_jax.errors import UserError
from lcm_jax.interop.network_configs import read_clip_text
from lcm_jax.models import Policy

VOCABULARY, LENGTH, END = 40, 11, 39
CONFIG = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": LENGTH,
    "projection_dim": 10,
    "bos_token_id": 38,
    "eos_token_id": END,
    "pad_token_id": END,
}
CASES = {
    "quick_gelu (CLIP-L)": (transformers.CLIPTextModel, {"hidden_act": "quick_gelu"}),
    "gelu (OpenCLIP), another eps": (transformers.CLIPTextModel, {"hidden_act": "gelu", "layer_norm_eps": 0.1}),
    "an old folder's end token": (transformers.CLIPTextModel, {"hidden_act": "quick_gelu", "eos_token_id": 2}),
    "projection (SDXL's second)": (transformers.CLIPTextModelWithProjection, {"hidden_act": "gelu"}),
}


def token_ids(length: int = LENGTH) -> np.ndarray:
    """Prompts of different lengths, the rest filled up with the end token, which is the largest id."""
    ids = np.random.default_rng(1).integers(3, 38, (3, length)).astype(np.int32)
    for row, end in enumerate((4, length - 1, 7)):
        ids[row, end:] = END
    ids[1, 2] = 2  # an ordinary token, also where a folder says that 2 is the end
    return ids


@pytest.mark.parametrize(("peer_class", "options"), CASES.values(), ids=CASES)
def test_equals_the_peer(peer_class, options):
    peer = peer_class(transformers.CLIPTextConfig(**{**CONFIG, **options}))
    params = random_weights(peer, seed=2)
    net = network(peer)
    ids = token_ids()

    @functools.partial(jax.jit, compiler_options=QUICK)
    def run(params):
        return net.apply(params, ids), net.apply(params, ids, method="hidden_states")

    last, (states, pooled) = run(params)
    with torch.no_grad():
        theirs = peer(torch.from_numpy(ids).long(), output_hidden_states=True)
    assert_close(last, theirs.last_hidden_state)
    assert len(states) == len(theirs.hidden_states) == 4
    for ours, reference in zip(states, theirs.hidden_states, strict=True):
        assert_close(ours, reference)
    with_projection = peer_class is transformers.CLIPTextModelWithProjection
    assert_close(pooled, theirs.text_embeds if with_projection else theirs.pooler_output)


def test_bfloat16_is_close():
    peer = transformers.CLIPTextModel(transformers.CLIPTextConfig(**CONFIG))
    params = random_weights(peer, seed=3)
    ids = token_ids()
    apply = {
        name: jax.jit(network(peer, policy=Policy.named(name)).apply, compiler_options=QUICK)
        for name in ("float32", "bfloat16")
    }
    exact, half = apply["float32"](params, ids), apply["bfloat16"](params, ids)
    assert half.dtype == "bfloat16"
    assert_close(half.astype("float32"), exact, tolerance=5e-2)


def test_the_config_of_a_text_encoder_in_a_larger_one():
    """transformers reads the inner object, whatever is around it."""
    whole = {"model_type": "clip", "hidden_size": 99, "use_attention_mask": True, "text_config": CONFIG}
    assert read_clip_text(whole) == read_clip_text(CONFIG)


@pytest.mark.parametrize(
    ("key", "value", "supported"),
    [
        ("use_attention_mask", True, "False, None"),
        ("is_causal", False, "True"),
        ("is_causal", None, "True"),
        ("pruned_heads", {"0": [1]}, "{}, None"),
        ("quantization_config", {"load_in_8bit": True}, "None"),
        ("transformers_weights", "other.safetensors", "None"),
        ("text_config", None, "an object"),
        ("hidden_act", "gelu_new", None),
    ],
)
def test_a_key_that_changes_the_result_is_refused(key, value, supported):
    with pytest.raises(UserError) as error:
        read_clip_text({**CONFIG, key: value})
    assert str(error.value).startswith(f"{key} is {value!r}; ")
    assert supported is None or str(error.value).endswith(f"; supported: {supported}")


def test_keys_about_training_and_outputs_are_taken():
    others = {"attention_dropout": 0.5, "initializer_range": 1.0, "use_attention_mask": False, "return_dict": False}
    assert read_clip_text({**CONFIG, **others}) == read_clip_text(CONFIG)


def test_a_prompt_that_is_too_long_is_an_error():
    net = network(transformers.CLIPTextModel(transformers.CLIPTextConfig(**CONFIG)))
    with pytest.raises(UserError, match="the prompt has 12 tokens; this text encoder takes 11"):
        jax.eval_shape(net.apply, net.shapes, token_ids(LENGTH + 1))
