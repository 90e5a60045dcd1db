"""LoRA files to and from diffusers with peft: the same weight differences, and the same images."""

import dataclasses

import diffusers
import numpy as np
import peft
import pytest
import torch
from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_kohya
from fixtures_folders import latents
from fixtures_loras import (
    assert_same_differences,
    differences,
    kernels,
    random_lora,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

import lcm_jax
from lcm_jax.adapters import lora
from lcm_jax.errors import UserError
from lcm_jax.inference.verify import injected_noise, verify
from lcm_jax.interop import names
from lcm_jax.interop.folder import read_folder
from lcm_jax.interop.lora.file import read_lora, write_lora
from lcm_jax.interop.lora.ldm_names import ldm_names

SHAPE = (1, 8, 8, 4)
MODULES = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "ff.net.0.proj", "ff.net.2", "conv1", "time_emb_proj"]
TEXT_MODULES = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1"]


@pytest.fixture(scope="module")
def folder(teacher_folder):
    return read_folder(teacher_folder)


@pytest.fixture(scope="module")
def pipe(teacher_folder):
    return lcm_jax.load_pipeline(teacher_folder)


@pytest.fixture
def peer(teacher_folder):
    """A new pipeline for each test, since adapters stay in the modules."""
    loaded = diffusers.StableDiffusionPipeline.from_pretrained(teacher_folder)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def their_differences(peer, adapter: str) -> dict[str, np.ndarray]:
    """'component.module' -> dW in our layout, as peft would merge it."""
    found = {}
    for component in ("unet", "text_encoder"):
        for path, module in getattr(peer, component).named_modules():
            if isinstance(module, BaseTunerLayer):
                delta = module.get_delta_weight(adapter).detach().float().numpy()
                found[f"{component}.{path}"] = names.from_file("kernel", delta)
    return found


def nchw(array):
    return torch.from_numpy(np.moveaxis(array, -1, -3).copy())


def assert_same_image(pipe, peer, guidance_scale=2.0):
    """Two steps of consistency sampling: a diffusion model with an LCM-LoRA."""
    z_T, noise = latents(1, *SHAPE), latents(2, 1, *SHAPE)
    peer.scheduler = diffusers.LCMScheduler.from_config(peer.scheduler.config)
    with injected_noise(list(nchw(noise))):
        theirs = peer(
            "a red seven",
            num_inference_steps=2,
            guidance_scale=guidance_scale,
            latents=nchw(z_T),
            output_type="latent",
        )
    ours = pipe("a red seven", 2, guidance_scale, latents=z_T, noise=noise, sampler="lcm", output="latents")
    theirs = np.moveaxis(theirs.images.numpy(), 1, -1)
    assert np.abs(ours - theirs).max() <= 1e-4 * np.abs(theirs).max()
    return ours


@pytest.mark.parametrize("dialect", ["diffusers", "kohya"])
def test_written_by_us(folder, pipe, peer, dialect, tmp_path, caplog):
    adapters = random_lora(folder)
    file = write_lora(tmp_path / "x.safetensors", adapters, dialect=dialect)
    peer.load_lora_weights(str(file), adapter_name="x")
    assert not caplog.records  # keys that it doesn't know only give a warning there
    assert_same_differences(differences(adapters), their_differences(peer, "x"))
    peer.set_adapters("x", 0.7)
    pipe.set_loras({file: 0.7})
    with_lora = assert_same_image(pipe, peer)
    pipe.set_loras({file: 0.0})
    noise = {"latents": latents(1, *SHAPE), "noise": latents(2, 1, *SHAPE)}
    without = pipe("a red seven", 2, 2.0, **noise, sampler="lcm", output="latents")
    pipe.set_loras({})
    assert not np.allclose(with_lora, without)


@pytest.mark.parametrize("component", ["unet", "text_encoder"])
def test_kohya_file_of_one_network(folder, peer, component, tmp_path):
    adapters = {component: random_lora(folder)[component]}
    file = write_lora(tmp_path / "x.safetensors", adapters, dialect="kohya")
    peer.load_lora_weights(str(file), adapter_name="x")
    assert_same_differences(differences(adapters), their_differences(peer, "x"))
    assert verify(folder.path, lora=file) <= 1e-4


@pytest.mark.filterwarnings("ignore:The following alpha_pattern keys did not match:RuntimeWarning")  # peft's own words
def test_verify_names_the_module_with_another_alpha(folder, tmp_path):
    """In other people's kohya files alphas differ: diffusers 0.42 gives all attention layers the most frequent one."""
    adapters = random_lora(folder)
    weak = {
        name: dataclasses.replace(a, params={path: 1e-3 * array for path, array in a.params.items()})
        for name, a in adapters.items()
    }  # nothing is seen in what it draws
    file = write_lora(tmp_path / "x.safetensors", weak, dialect="kohya")
    assert verify(folder.path, lora=file) <= 1e-4
    tensors = load_file(file)
    tensors["lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q.alpha"] *= 2
    save_file(tensors, file)
    with pytest.raises(UserError, match=r"weight difference of unet\.mid_block\..*attn1\.to_q.* another alpha"):
        verify(folder.path, lora=file)


def test_verify_names_a_module_that_diffusers_leaves_out(folder, monkeypatch, tmp_path):
    file = write_lora(tmp_path / "x.safetensors", random_lora(folder))
    loading = diffusers.StableDiffusionPipeline.load_lora_weights

    def without_one(self, path, **options):
        loading(self, {k: v for k, v in load_file(path).items() if "mid_block.resnets.0.conv1" not in k}, **options)

    monkeypatch.setattr(diffusers.StableDiffusionPipeline, "load_lora_weights", without_one)
    with pytest.raises(
        UserError, match=r"disagree about 1 of its modules, for example unet\.mid_block\.resnets\.0\.conv1"
    ):
        verify(folder.path, lora=file)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")  # two are meant so
def test_two_with_weights(folder, pipe, peer, tmp_path):
    files = {}
    for name, seed, dialect, weight in (("a", 3, "diffusers", 0.5), ("b", 5, "kohya", -0.8)):
        file = write_lora(tmp_path / f"{name}.safetensors", random_lora(folder, seed), dialect=dialect)
        peer.load_lora_weights(str(file), adapter_name=name)
        files[file] = weight
    peer.set_adapters(["a", "b"], [0.5, -0.8])
    pipe.set_loras(files)
    assert_same_image(pipe, peer, guidance_scale=1.0)


DTYPES = ("float8_e4m3fn", "float8_e5m2", "bfloat16", "float16", "float32", "float64")


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")  # six are meant so
def test_kohya_in_ldm_names_and_every_dtype(folder, peer, tmp_path):
    """Attention, convolutions and layers outside the blocks; diffusers decides each name."""
    targets = (lora.Target(rf"{lora.MODULES}|conv_in|conv_out|linear_1|linear_2", rank=4, alpha=2.0),)
    written = load_file(write_lora(tmp_path / "x.safetensors", random_lora(folder, targets=targets), dialect="kohya"))
    pairs = ldm_names(kernels(folder)["unet"]).items()
    ldm = {module.replace(".", "_"): name.replace(".", "_") for module, name in pairs}
    tensors = {}
    for key, tensor in written.items():
        module, _, part = key.partition(".")
        if "upsamplers" not in module:  # diffusers takes one of a level without attention for a transformer
            module = f"lora_unet_{ldm[module[10:]]}" if module.startswith("lora_unet_") else module
            tensors[f"{module}.{part}"] = tensor
    assert not any(key.startswith(("lora_unet_down_", "lora_unet_mid_", "lora_unet_up_")) for key in tensors)
    for dtype in DTYPES:
        file = tmp_path / f"{dtype}.safetensors"
        save_file({key: tensor.to(getattr(torch, dtype)) for key, tensor in tensors.items()}, file)
        peer.load_lora_weights(str(file), adapter_name=f"as_{dtype}", unet_config=peer.unet.config)
        ours = differences(read_lora(file, kernels(folder)))
        assert_same_differences(ours, their_differences(peer, f"as_{dtype}"))
        assert len(ours) == len(tensors) // 3


def add_adapters(peer, lora_alpha=6, **unet_options):
    """Random adapters of peft's own, with an alpha that is not the rank."""
    given = ((peer.unet, MODULES, unet_options), (peer.text_encoder, TEXT_MODULES, {}))
    for seed, (part, modules, options) in enumerate(given):
        config = peft.LoraConfig(r=4, lora_alpha=lora_alpha, target_modules=modules, **options)
        part.add_adapter(config, adapter_name="default")
        generator = torch.Generator().manual_seed(seed)
        for path, parameter in part.named_parameters():
            if ".lora_" in path:
                parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)


def layers(peer) -> dict[str, dict[str, torch.Tensor]]:
    return {
        "unet_lora_layers": get_peft_model_state_dict(peer.unet),
        "text_encoder_lora_layers": get_peft_model_state_dict(peer.text_encoder),
    }


def metadata(peer) -> dict[str, dict]:
    return {
        f"{name}_lora_adapter_metadata": getattr(peer, name).peft_config["default"].to_dict()
        for name in ("unet", "text_encoder")
    }


def assert_read(folder, peer, path):
    found = read_lora(path, kernels(folder))
    assert_same_differences(differences(found), their_differences(peer, "default"))


def test_save_lora_weights(folder, pipe, peer, tmp_path):
    add_adapters(peer)
    peer.save_lora_weights(tmp_path, **layers(peer), **metadata(peer))
    assert_read(folder, peer, tmp_path)
    pipe.set_loras({tmp_path: 1.0})
    assert_same_image(pipe, peer)


@pytest.mark.parametrize(
    "options",
    [{"use_rslora": True}, {"alpha_pattern": {"to_q": 1, "attn1.to_k": 9}, "rank_pattern": {"conv1": 2}}],
    ids=["rslora", "patterns"],
)
def test_save_lora_weights_with_metadata(folder, peer, tmp_path, options):
    add_adapters(peer, **options)
    peer.save_lora_weights(tmp_path, **layers(peer), **metadata(peer))
    assert_read(folder, peer, tmp_path)


def test_save_lora_weights_without_metadata(folder, peer, tmp_path):
    """The file then stores no alpha, and loaders use the rank."""
    add_adapters(peer, lora_alpha=4)
    peer.save_lora_weights(tmp_path, **layers(peer))
    assert_read(folder, peer, tmp_path)


def test_mixed_spellings(folder, peer, tmp_path):
    """The format that the LCM-LoRA script for SDXL long saved: attention in one spelling, the rest in another."""
    add_adapters(peer, lora_alpha=4)
    mixed = {name: convert_state_dict_to_diffusers(tensors) for name, tensors in layers(peer).items()}
    peer.save_lora_weights(tmp_path, **mixed)
    keys = " ".join(load_file(tmp_path / "pytorch_lora_weights.safetensors"))
    for spelling in ("to_q.lora.down", "conv1.lora_A", "q_proj.lora_linear_layer.up", "fc1.lora_B"):
        assert spelling in keys
    assert_read(folder, peer, tmp_path)


def test_kohya_of_diffusers(folder, peer, tmp_path):
    add_adapters(peer, lora_alpha=4)
    tensors = {
        f"{name.removesuffix('_lora_layers')}.{key}": tensor
        for name, of in layers(peer).items()
        for key, tensor in of.items()
    }
    save_file(convert_state_dict_to_kohya(tensors), tmp_path / "x.safetensors")
    assert_read(folder, peer, tmp_path / "x.safetensors")


def test_files_of_a_wrapped_model(folder, teacher_folder, recwarn, tmp_path):
    """The format that the LCM-LoRA script for SD 1.5 saves: alpha only in peft's own file, in the parent folder."""
    unet = diffusers.UNet2DConditionModel.from_pretrained(teacher_folder, subfolder="unet")
    wrapped = peft.get_peft_model(unet, peft.LoraConfig(r=4, target_modules=MODULES))  # peft's default alpha, 8
    for path, parameter in wrapped.named_parameters():
        if ".lora_" in path:
            torch.nn.init.normal_(parameter.data, std=0.3)
    wrapped.save_pretrained(tmp_path)
    state = get_peft_model_state_dict(wrapped, adapter_name="default")
    diffusers.StableDiffusionPipeline.save_lora_weights(tmp_path / "unet_lora", state)
    assert all(
        key.startswith("unet.base_model.model.")
        for key in load_file(tmp_path / "unet_lora/pytorch_lora_weights.safetensors")
    )
    theirs = {
        f"unet.{path}": names.from_file("kernel", module.get_delta_weight("default").detach().numpy())
        for path, module in unet.named_modules()
        if isinstance(module, BaseTunerLayer)
    }
    for path in (tmp_path / "unet_lora", tmp_path):
        assert_same_differences(differences(read_lora(path, kernels(folder))), theirs)
    (tmp_path / "adapter_config.json").unlink()
    with pytest.warns(UserWarning, match=r"doesn't store its alpha, .*multiply its weight by alpha / rank"):
        found = differences(read_lora(tmp_path / "unet_lora", kernels(folder)))
    assert_same_differences({module: 2 * array for module, array in found.items()}, theirs)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision(folder, peer, dtype, tmp_path):
    adapters = random_lora(folder)
    file = write_lora(tmp_path / "x.safetensors", adapters, dtype=dtype)
    assert {tensor.dtype for tensor in load_file(file).values()} == {getattr(torch, dtype)}
    read = read_lora(file, kernels(folder))
    peer.load_lora_weights(str(file), adapter_name="x")
    assert_same_differences(differences(read), their_differences(peer, "x"))
    assert_same_differences(differences(adapters), differences(read), tolerance=0.02)
