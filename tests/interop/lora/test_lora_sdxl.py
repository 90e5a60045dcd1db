"""LoRAs of SDXL and its small relatives, in the names of kohya's scripts ("SGM"), compared with diffusers."""

import diffusers
import numpy as np
import pytest
import transformers
from fixtures_loras import assert_same_differences, differences
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.numpy import save_file

from lcm_jax.adapters import lora
from lcm_jax.interop import names
from lcm_jax.interop.folder import make_network
from lcm_jax.interop.lora.file import read_lora
from lcm_jax.interop.lora.ldm_names import ldm_names

UNET = {
    "block_out_channels": (4, 8, 12),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (1, 2, 2),
    "cross_attention_dim": 14,
    "transformer_layers_per_block": (1, 1, 2),
    "use_linear_projection": True,
    "norm_num_groups": 2,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 32,
}
UNETS = {
    "SDXL": UNET,
    "SSD-1B": {
        **UNET,
        "transformer_layers_per_block": [1, [1, 2], [2, 1]],
        "reverse_transformer_layers_per_block": [[1, 2, 1], [2, 1, 1], 1],
        "mid_block_type": "UNetMidBlock2D",
    },
    "KOALA": {**UNET, "layers_per_block": 1, "mid_block_type": None},
}
TEXT = {"intermediate_size": 10, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 20}


def text_encoder(kind, width):
    return kind(transformers.CLIPTextConfig(hidden_size=width, projection_dim=8, **TEXT))


def pipeline(unet):
    """A StableDiffusionXLPipeline of diffusers without what a LoRA does not touch."""
    return diffusers.StableDiffusionXLPipeline(
        unet=diffusers.UNet2DConditionModel(**unet),
        text_encoder=text_encoder(transformers.CLIPTextModel, 6),
        text_encoder_2=text_encoder(transformers.CLIPTextModelWithProjection, 8),
        scheduler=diffusers.EulerDiscreteScheduler(),
        add_watermarker=False,
        **dict.fromkeys(("vae", "tokenizer", "tokenizer_2")),
    )


def kernels(peer):
    found = {}
    for name in ("unet", "text_encoder", "text_encoder_2"):
        part = getattr(peer, name)
        config = part.config.to_dict() if isinstance(part, transformers.PreTrainedModel) else dict(part.config)
        found[name] = lora.kernels(make_network(type(part).__name__, config, where=name).shapes)
    return found


def spelled(known):
    """component → module → its name in kohya's scripts: SGM in the UNet, transformers' in the text encoders."""
    flat = {
        "unet": {module: f"lora_unet_{name}" for module, name in ldm_names(known["unet"]).items()},
        "text_encoder": {module: f"lora_te1_text_model_{module}" for module in known["text_encoder"]},
        "text_encoder_2": {
            module: f"lora_te2_{'' if module == 'text_projection' else 'text_model_'}{module}"
            for module in known["text_encoder_2"]
        },
    }
    return {component: {m: name.replace(".", "_") for m, name in of.items()} for component, of in flat.items()}


def tensors_of(known, spellings):
    random, found = np.random.default_rng(0), {}
    for component, modules in known.items():
        for module, kernel in modules.items():
            out, *rest = names.file_shape("kernel", kernel)
            name = spellings[component][module]
            found[f"{name}.lora_down.weight"] = random.standard_normal((2, *rest)).astype(np.float32)
            found[f"{name}.lora_up.weight"] = random.standard_normal((out, 2, *[1] * len(rest[1:]))).astype(np.float32)
            found[f"{name}.alpha"] = np.asarray(3, np.float32)
    return found


def their_differences(peer):
    return {
        f"{component}.{path.removeprefix('text_model.')}": names.from_file(
            "kernel", module.get_delta_weight("x").detach().numpy()
        )
        for component in ("unet", "text_encoder", "text_encoder_2")
        for path, module in getattr(peer, component).named_modules()
        if isinstance(module, BaseTunerLayer)
    }


@pytest.mark.parametrize("unet", UNETS.values(), ids=UNETS)
def test_sgm_names_of_each_module(unet, tmp_path):
    """Each linear layer and convolution, also those outside the blocks."""
    peer = pipeline(unet)
    known = kernels(peer)
    spellings = spelled(known)
    assert spellings["unet"].keys() == known["unet"].keys()
    save_file(tensors_of(known, spellings), tmp_path / "x.safetensors")
    peer.load_lora_weights(str(tmp_path), weight_name="x.safetensors", adapter_name="x")
    ours = differences(read_lora(tmp_path / "x.safetensors", known))
    assert len(ours) == sum(map(len, known.values()))
    assert_same_differences(ours, their_differences(peer))


def test_both_namings_in_one_file(tmp_path):
    """diffusers would drop the SGM half without a word."""
    known = kernels(pipeline(UNETS["KOALA"]))
    sgm = spelled(known)
    mixed = {
        **sgm,
        "unet": {
            module: name if i % 2 else f"lora_unet_{module.replace('.', '_')}"
            for i, (module, name) in enumerate(sgm["unet"].items())
        },
    }
    found = []
    for spellings in (sgm, mixed):
        save_file(tensors_of(known, spellings), tmp_path / "x.safetensors")
        found.append(differences(read_lora(tmp_path / "x.safetensors", known)))
    assert len(found[1]) == sum(map(len, known.values()))
    assert_same_differences(found[1], found[0], tolerance=0.0)


@pytest.mark.parametrize("module", ["encoder.layers.1.self_attn.q_proj", "encoder.layers.0.mlp.fc1", "text_projection"])
def test_one_module_of_the_second_text_encoder(module, tmp_path):
    """diffusers expects out_proj beside the others: q_proj alone raises an error there."""
    known = {"text_encoder_2": kernels(pipeline(UNETS["KOALA"]))["text_encoder_2"]}
    one = {"text_encoder_2": {module: known["text_encoder_2"][module]}}
    save_file(tensors_of(one, spelled({"unet": {}, "text_encoder": {}, **one})), tmp_path / "x.safetensors")
    assert differences(read_lora(tmp_path / "x.safetensors", known)).keys() == {f"text_encoder_2.{module}"}
