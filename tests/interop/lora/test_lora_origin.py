"""LoRAs for other models: one error line that names the base model."""

import pathlib

import numpy as np
import pytest
from safetensors.numpy import save_file

from lcm_jax.errors import UserError
from lcm_jax.interop.lora.file import read_lora

TO_K = "attentions.0.transformer_blocks.0.attn2.to_k"
SD1 = {
    "unet": {f"down_blocks.0.{TO_K}": (768, 320), "down_blocks.0.resnets.0.conv1": (3, 3, 320, 320)},
    "text_encoder": {"encoder.layers.0.mlp.fc1": (768, 3072)},
}
SDXL = {
    "unet": {f"down_blocks.1.{TO_K}": (2048, 640)},
    "text_encoder": {"encoder.layers.0.mlp.fc1": (768, 3072)},
    "text_encoder_2": {"encoder.layers.0.mlp.fc1": (1280, 5120)},
}
OTHERS = {
    "down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k": (1024, r"Stable Diffusion 2\.x \(text width 1024\)"),
    "input_blocks_4_1_transformer_blocks_1_attn2_to_k": (2048, r"SDXL \(text width 2048\)"),
    "double_blocks_0_img_attn_qkv": (3072, "Flux or a model like it"),
    "joint_blocks_0_x_block_attn_qkv": (1536, "Stable Diffusion 3 or a model like it"),
    "down_blocks_0_motion_modules_0_temporal_transformer_proj_in": (320, "a video model with motion modules"),
    "blocks_0_self_attn_q": (1536, "Wan, a video model"),
    "layers_0_mlp_gate_proj": (2048, "a language model"),
}


def write(path, modules, rank=2, out=320, number=1):
    """A file in kohya's dialect: module -> the width that it takes; `number` numbered copies of each."""
    tensors = {}
    for module, width in modules.items():
        for i in range(number):
            name = module.replace("_0_", f"_{i}_") if number > 1 else module
            tensors[f"{name}.lora_down.weight"] = np.ones((rank, width), np.float32)
            tensors[f"{name}.lora_up.weight"] = np.ones((out, rank), np.float32)
    save_file(tensors, path)
    return path


def message(path, kernels=SD1) -> str:
    with pytest.raises(UserError) as error:
        read_lora(path, kernels)
    return str(error.value)


@pytest.mark.parametrize("module", OTHERS)
def test_what_it_was_made_for(module, tmp_path):
    width, name = OTHERS[module]
    path = write(tmp_path / "x.safetensors", {f"lora_unet_{module}": width})
    with pytest.raises(
        UserError, match=rf"x.safetensors: it was trained on {name}; this model is Stable Diffusion 1\.x"
    ):
        read_lora(path, SD1)


def test_text_encoder_of_sdxl(tmp_path):
    path = write(tmp_path / "x.safetensors", {"lora_te2_text_model_encoder_layers_0_mlp_fc1": 1280})
    assert "it was trained on SDXL; this model is Stable Diffusion 1.x with text width 768: 1 of its 1" in message(path)


def test_unet_and_text_encoders_of_sdxl(tmp_path):
    modules = {"lora_te2_text_model_encoder_layers_0_mlp_fc1": 1280, f"lora_unet_{TO_K.replace('.', '_')}": 2048}
    found = message(write(tmp_path / "x.safetensors", modules))
    assert (
        "it was trained on SDXL (text width 2048); this model is Stable Diffusion 1.x with text width 768: 2 " in found
    )


UNKNOWN = {  # tensor -> model, message: by names alone
    "lora_unet_input_blocks_4_1_transformer_blocks_1_ff_net_2": (SD1, "on SDXL; this model is Stable Diffusion 1.x"),
    "unet.down_blocks.1.attentions.1.transformer_blocks.1.attn1.to_q": (SD1, "on SDXL; this model is Stable"),
    "lora_unet_label_emb_0_0": (SD1, "on SDXL; this model is Stable Diffusion 1.x"),
    "lora_unet_input_blocks_10_0_in_layers_2": (SDXL, "on Stable Diffusion 1.x or Stable Diffusion 2.x; this model is"),
    "unet.down_blocks.0.attentions.0.proj_in": (SDXL, "on Stable Diffusion 1.x or Stable Diffusion 2.x; this model is"),
    "lora_unet_output_blocks_0_1_transformer_blocks_8_ff_net_2": (SDXL, "on a larger model of SDXL's kind; this model"),
    "unet.mid_block.attentions.0.proj_in": (SDXL, "on a larger model of SDXL's kind; this model has fewer transformer"),
}


@pytest.mark.parametrize("module", UNKNOWN)
def test_what_names_alone_show(module, tmp_path):
    model, said = UNKNOWN[module]
    found = message(write(tmp_path / "x.safetensors", {module: 640}), model)
    assert f"x.safetensors: it was trained {said}" in found
    assert ": 1 of its 1 modules are not in this model" in found


@pytest.mark.parametrize(
    "name", ["input_blocks_1_1_transformer_blocks_0", "unet.down_blocks.0.attentions.0.transformer"]
)
def test_for_the_first_stable_diffusion_in_each_naming(name, tmp_path):
    modules = {f"lora_unet_{name}_attn2_to_k" if "input" in name else f"{name}_blocks.0.attn2.to_k": 768}
    found = message(write(tmp_path / "x.safetensors", modules), SDXL)
    assert "it was trained on Stable Diffusion 1.x (text width 768); this model is SDXL with text width 2048" in found


def test_half_of_the_modules_are_unknown(tmp_path):
    """Nothing is loaded, whoever made the file."""
    own = {f"unet.down_blocks.1.{TO_K}": 2048}
    extra = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.extra"
    path = write(tmp_path / "x.safetensors", {**own, f"unet.{extra}": 640}, out=640)
    found = message(path, SDXL)
    assert f"this model's unet has no module {extra}" in found
    assert found.endswith("was it trained on another base model?")


def test_for_the_first_stable_diffusion_on_sdxl(tmp_path):
    path = write(tmp_path / "x.safetensors", {f"unet.down_blocks.0.{TO_K}": 768})
    found = message(path, SDXL)
    assert "it was trained on Stable Diffusion 1.x (text width 768); this model is SDXL with text width 2048" in found


def test_same_names_and_other_shapes(tmp_path):
    """Stable Diffusion 2's modules have the same names as Stable Diffusion 1's."""
    found = message(write(tmp_path / "x.safetensors", {f"unet.down_blocks.0.{TO_K}": 1024}))
    assert (
        "trained on Stable Diffusion 2.x (text width 1024); this model is Stable Diffusion 1.x with text width" in found
    )
    assert "1 of its 1 modules don't fit this model's unet; unet.down_blocks.0" in found
    assert "is (2, 1024) and should be (2, 768)" in found


def test_three_names_and_a_count(tmp_path):
    modules = {"lora_unet_input_blocks_0_1_transformer_blocks_1_attn2_to_k": 2048}
    found = message(write(tmp_path / "x.safetensors", modules, number=800))
    assert "800 of its 800 modules are not in this model (lora_unet_input_blocks_0_1" in found
    assert "and 797 more)" in found
    assert found.count("lora_unet") == 3
    assert len(found) < 500


def test_unknown_base_and_many_modules(tmp_path, monkeypatch):
    """The nearest name is searched once; searching for each of 1,000 keys would take many seconds."""
    monkeypatch.chdir(tmp_path)  # a short path: the middle of a long message is left out
    found = message(write(pathlib.Path("x.safetensors"), {"lora_unet_somewhere_0_else": 8}, number=1000))
    assert "has no module somewhere_0_else" in found
    assert "(1000 of its" in found
    assert "was it trained on another base model?" in found


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("model.diffusion_model.input_blocks.0.0.weight", "a whole model"),
        ("conditioner.embedders.0.transformer.text_model.final_layer_norm.bias", "a whole model"),
        ("image_proj.proj.weight", "an IP-Adapter"),
        ("emb_params", "a textual inversion"),
    ],
)
def test_no_lora_at_all(key, kind, tmp_path):
    save_file({key: np.ones((2, 2), np.float32)}, tmp_path / "x.safetensors")
    assert f"x.safetensors: it holds {kind} ({key}" in message(tmp_path / "x.safetensors")


def test_a_key_of_a_million_characters(tmp_path):
    save_file({"unet." * 200_000: np.ones((2, 2), np.float32)}, tmp_path / "x.safetensors")
    found = message(tmp_path / "x.safetensors")
    assert "it is not a LoRA: the name of a tensor has 1000000 characters (unet.unet." in found
