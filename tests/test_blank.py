import json
import pathlib

import numpy as np
import pytest
from safetensors.numpy import load_file

from lcm_jax import blank
from lcm_jax.digits import presets
from lcm_jax.digits.dataset import ALL_PAIRS, PHRASES, caption
from lcm_jax.digits.presets import PRESETS, TOKENS, ZERO_INIT, write_blank
from lcm_jax.errors import UserError
from lcm_jax.interop.folder import make_network, read_folder
from lcm_jax.interop.tokenizer import load_tokenizer

WEIGHTS = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}


@pytest.fixture(scope="module")
def micro(tmp_path_factory):
    return write_blank("micro", tmp_path_factory.mktemp("blank") / "micro")


def tensors(folder):
    return {f"{name}/{k}": v for name, file in WEIGHTS.items() for k, v in load_file(folder / name / file).items()}


def test_command_seed_and_dtype(micro, tmp_path, capsys):
    first = tensors(micro)
    assert {v.dtype for v in first.values()} == {np.dtype(np.float32)}
    assert blank.main(["--preset=micro", f"--out={tmp_path}/again"]) == 0
    assert f"{tmp_path}/again" in capsys.readouterr().out
    again = tensors(tmp_path / "again")
    assert all(np.array_equal(first[k], again[k]) for k in first)
    other = tensors(write_blank("micro", tmp_path / "other", seed=1))
    assert not np.array_equal(first["unet/conv_in.weight"], other["unet/conv_in.weight"])
    assert not np.array_equal(first["vae/encoder.conv_in.weight"], other["vae/encoder.conv_in.weight"])


def test_micro_has_no_dead_weights(micro):
    """What tests compare must depend on each matrix and convolution."""
    assert all(v.any() for k, v in tensors(micro).items() if v.ndim > 1)


def test_zero_init_names_the_ends_of_the_branches():
    preset = PRESETS["digits"]
    network = make_network("UNet2DConditionModel", presets.unet_config(preset), where="unet")
    zero = {path.removesuffix(".kernel") for path in network.shapes if ZERO_INIT.fullmatch(path) and "kernel" in path}
    blocks = ("down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0", "up_blocks.1")
    assert {f"{block}.attentions.0.proj_out" for block in blocks} <= zero
    assert {f"{block}.resnets.0.conv2" for block in blocks} <= zero
    assert "conv_out" in zero
    assert all(name.endswith(("conv2", "proj_out", "conv_out")) for name in zero)


def test_digits_fits_into_eight_megabytes_of_float16():
    preset = PRESETS["digits"]
    configs = {
        "UNet2DConditionModel": presets.unet_config(preset),
        "AutoencoderKL": presets.vae_config(preset),
        "CLIPTextModel": presets.text_config(preset, 600),
    }
    count = sum(
        np.prod(leaf.shape)
        for name, config in configs.items()
        for leaf in make_network(name, config, where=name).shapes.values()
    )
    assert 2e6 < count < 4e6


def test_diffusers_loads_and_runs_it(micro):
    """diffusers and transformers load every tensor, and the pipeline samples an image of the right size."""
    import torch
    from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel

    for name, peer in (("unet", UNet2DConditionModel), ("vae", AutoencoderKL), ("text_encoder", CLIPTextModel)):
        _, report = peer.from_pretrained(micro, subfolder=name, output_loading_info=True)
        assert not any(report.values()), (name, report)
    pipe = StableDiffusionPipeline.from_pretrained(micro)
    pipe.set_progress_bar_config(disable=True)
    images = pipe(
        "a red seven on a blue background",
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).images
    assert images.shape == (1, 32, 32, 3)
    assert images.std() > 0


def test_our_loader_reads_it(micro):
    folder = read_folder(micro)
    assert set(folder.components) == set(WEIGHTS)
    assert folder.schedule.prediction_type == "epsilon"


def test_tokenizer_equals_the_peers(micro):
    from transformers import CLIPTokenizer

    theirs = CLIPTokenizer.from_pretrained(micro / "tokenizer")
    assert theirs.model_max_length == TOKENS
    ours = load_tokenizer(read_folder(micro, only=()))
    texts = [caption(digit, *ALL_PAIRS[5 * digit], phrase) for digit in range(10) for phrase in range(len(PHRASES))]
    texts += ["", "A  RED Seven,blue", "zwölf 42 \u2603 don't", "seven " * 40, "a violet zebra_1 on a background"]
    ids = theirs(texts, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="np").input_ids
    np.testing.assert_array_equal(ours(texts), ids)


def test_each_word_of_a_caption_is_one_token(micro):
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(micro / "tokenizer")
    config = json.loads((micro / "text_encoder" / "config.json").read_text())
    words = sorted(presets.caption_words())
    ids = [tokenizer(word, add_special_tokens=False).input_ids for word in words]
    assert all(len(each) == 1 for each in ids)
    assert len({each[0] for each in ids}) == len(words) == 28
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (config["bos_token_id"], config["eos_token_id"])
    assert len(tokenizer) == config["vocab_size"] == config["eos_token_id"] + 1
    vocabulary = json.loads((micro / "tokenizer" / "vocab.json").read_text())
    assert sorted(vocabulary.values()) == list(range(len(vocabulary)))
    alphabet = set(ByteLevel.alphabet())
    assert alphabet | {c + "</w>" for c in alphabet} <= set(vocabulary)  # any other text is spelled out, none is lost
    longest = max(len(tokenizer(caption(7, "magenta", "yellow", k)).input_ids) for k in range(len(PHRASES)))
    assert longest <= TOKENS


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset=digit", "--out=x"], "--preset is 'digit'; did you mean 'digits'?"),
        (["--preset=micro", "--out=x", "--seed=-1"], "--seed is -1"),
        (["--preset=micro", "--out=/dev/null/x"], "/dev/null/x can't be written"),
    ],
)
def test_mistakes(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        blank.main(arguments)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not any(pathlib.Path(tmp_path).iterdir())
