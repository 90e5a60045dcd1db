"""The names of parameters, ours and the files'."""

import numpy as np
import pytest

from lcm_jax.errors import UserError
from lcm_jax.interop import names

WANTED = {
    "conv_in.kernel": (3, 3, 4, 8),
    "conv_in.bias": (8,),
    "blocks.0.norm1.scale": (8,),
    "blocks.10.to_q.kernel": (8, 6),
    "token.embedding": (20, 8),
}
FOUND = {
    "conv_in.weight": (8, 4, 3, 3),
    "conv_in.bias": (8,),
    "blocks.0.norm1.weight": (8,),
    "blocks.10.to_q.weight": (6, 8),
    "token.weight": (20, 8),
}
VAE = {"mid_block.attentions.0.to_q.kernel": (8, 8), "mid_block.attentions.0.to_out.0.kernel": (8, 8)}
CLIP = {"embeddings.token_embedding.embedding": (20, 8)}


def match(found, wanted=WANTED, library_class="UNet2DConditionModel"):
    return names.match(library_class, found, wanted, "file")


def test_each_parameter_has_one_key():
    found = match(FOUND)
    assert found.keys == {path: names.file_key(path) for path in WANTED}
    assert set(found.keys.values()) == set(FOUND)
    assert found.buffers == ()


@pytest.mark.parametrize("path", WANTED)
def test_layout_there_and_back(path):
    array = np.random.default_rng(0).standard_normal(WANTED[path])
    stored = names.to_file(path, array)
    assert stored.shape == names.file_shape(path, array.shape) == FOUND[names.file_key(path)]
    np.testing.assert_array_equal(names.from_file(path, stored), array)


def test_convolution_kernel_is_oihw_in_the_file():
    ours = np.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)  # h, w, i, o
    assert names.to_file("conv.kernel", ours)[4, 3, 1, 2] == ours[1, 2, 3, 4]


def test_faults_are_named_together():
    found = {**FOUND, "surplus.weight": (1,), "conv_in.weight": (8, 4, 1, 1)}
    del found["token.weight"]
    with pytest.raises(UserError) as error:
        match(found)
    message = str(error.value)
    assert "1 missing (token.weight)" in message
    assert "1 unexpected (surplus.weight)" in message
    assert "1 of the wrong shape (conv_in.weight is (8, 4, 1, 1) and should be (8, 4, 3, 3))" in message
    assert message.startswith("file: ")
    assert "\n" not in message


def test_many_faults_are_counted():
    with pytest.raises(
        UserError, match=r"5 missing \(conv_in.weight, conv_in.bias, blocks.0.norm1.weight and 2 more\)"
    ):
        match({})


def test_old_attention_names_of_the_vae():
    old = {"mid_block.attentions.0.query.weight": (8, 8), "mid_block.attentions.0.proj_attn.weight": (8, 8, 1, 1)}
    found = match(old, VAE, "AutoencoderKL")
    assert list(found.keys.items()) == [*zip(VAE, old, strict=True)]
    with pytest.raises(UserError, match="unexpected"):
        match(old, VAE, "UNet2DConditionModel")


def test_vae_attention_kernel_is_squeezed_only_if_one_by_one():
    wrong = {"mid_block.attentions.0.query.weight": (8, 8, 3, 3), "mid_block.attentions.0.to_out.0.weight": (8, 8)}
    with pytest.raises(UserError, match=r"query.weight is \(8, 8, 3, 3\) and should be \(8, 8\)"):
        match(wrong, VAE, "AutoencoderKL")


def test_both_spellings_of_one_tensor_are_an_error():
    both = {f"mid_block.attentions.0.{name}.weight": (8, 8) for name in ("query", "to_q", "proj_attn")}
    with pytest.raises(UserError, match=r"1 given twice .*query.weight and .*to_q.weight"):
        match(both, VAE, "AutoencoderKL")


@pytest.mark.parametrize("prefix", ["", "text_model."])
@pytest.mark.parametrize("ours", ["", "text_model."])
def test_clip_with_and_without_prefix(prefix, ours):
    wanted = {ours + path: shape for path, shape in CLIP.items()}
    stored = {f"{prefix}embeddings.token_embedding.weight": (20, 8), f"{prefix}embeddings.position_ids": (1, 16)}
    found = match(stored, wanted, "CLIPTextModel")
    assert found.keys == {f"{ours}embeddings.token_embedding.embedding": f"{prefix}embeddings.token_embedding.weight"}
    assert found.buffers == (f"{prefix}embeddings.position_ids",)
