"""What is wrong with a model folder is one line."""

import json
import pathlib
import shutil

import numpy as np
import pytest
from folder_files import TEXT_FILE, UNET_FILE, VAE_FILE, edit, fails, files, rewrite

from lcm_jax.interop.folder import read_folder
from lcm_jax.interop.folder_writing import write_folder


@pytest.mark.parametrize(
    "name", ["model_index.json", "scheduler/scheduler_config.json", "unet/config.json", "vae/config.json"]
)
def test_missing_file(copy, name):
    (copy / name).unlink()
    fails(copy, f"{name} is missing")


def test_missing_weights(copy):
    (copy / UNET_FILE).unlink()
    fails(copy, "unet holds no weights")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float8_e5m2", "float64"])
def test_weights_that_are_not_finite(copy, value, dtype):
    def spoil(tensors):
        for key in ("conv_in.weight", "conv_out.bias", "conv_norm_out.weight", "time_embedding.linear_1.bias"):
            tensors[key] = tensors[key].astype(dtype)
            tensors[key].flat[-1] = value
        return tensors

    rewrite(copy / UNET_FILE, spoil)
    fails(copy, rf"/{UNET_FILE}: not finite floating-point numbers: .* \(NaN or infinity in 1 of \d+\).* and 1 more$")


@pytest.mark.parametrize("dtype", ["int8", "int64", "bool", "uint16", "complex64"])
def test_weights_that_are_no_floating_point_numbers(copy, dtype):
    rewrite(copy / TEXT_FILE, lambda t: {**t, "final_layer_norm.bias": np.ones(16, dtype)})
    fails(copy, rf"{TEXT_FILE}: not finite floating-point numbers: final_layer_norm.bias \({dtype}\)$")


def test_the_file_of_a_weight_that_is_not_finite_is_named_among_shards(teacher_pipeline, tmp_path):
    teacher_pipeline.save_pretrained(tmp_path / "model", max_shard_size="60KB")
    shard = sorted((tmp_path / "model/unet").glob("*-of-*.safetensors"))[1]
    rewrite(shard, lambda t: {key: np.full_like(a, np.nan) if a.ndim == 1 else a for key, a in t.items()})
    fails(tmp_path / "model", f"{shard.name}: not finite")


def test_truncated_weights(copy):
    content = (copy / UNET_FILE).read_bytes()
    (copy / UNET_FILE).write_bytes(content[: len(content) // 2])
    fails(copy, f"{UNET_FILE} can't be read as safetensors")


def test_missing_key(copy):
    rewrite(copy / UNET_FILE, lambda t: {key: a for key, a in t.items() if key != "conv_out.bias"})
    fails(copy, rf"{UNET_FILE}: .* 1 missing \(conv_out.bias\)$")


def test_extra_key(copy):
    rewrite(copy / VAE_FILE, lambda t: {**t, "surplus": np.zeros(1)})
    fails(copy, rf"{VAE_FILE}: .* 1 unexpected \(surplus\)$")


def test_wrong_shape(copy):
    rewrite(copy / TEXT_FILE, lambda t: {**t, "final_layer_norm.bias": np.zeros(17, np.float32)})
    fails(copy, r"final_layer_norm.bias is \(17,\) and should be \(16,\)")


def test_pickle(copy):
    (copy / UNET_FILE).rename(copy / "unet/diffusion_pytorch_model.bin")
    fails(copy, "a pickle")


def test_unknown_pipeline(copy):
    edit(copy / "model_index.json", _class_name="FluxPipeline")
    fails(copy, "_class_name is FluxPipeline; supported: StableDiffusionPipeline, LatentConsistencyModelPipeline")


def test_unknown_class(copy):
    edit(copy / "model_index.json", unet=["diffusers", "UNet3DConditionModel"])
    fails(copy, "the class of unet is UNet3DConditionModel; supported: UNet2DConditionModel$")


@pytest.mark.parametrize("name", ["FlowMatchEulerDiscreteScheduler", "TCDScheduler"])
def test_unknown_scheduler(copy, name):
    edit(copy / "model_index.json", scheduler=["diffusers", name])
    fails(
        copy,
        f"scheduler_config.json: _class_name is '{name}'; supported, each with Scheduler behind: DDIMParallel, DDIM",
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"scheduler": ["diffusers", ["DDIMScheduler"]]},
            r"scheduler is \['diffusers', \['DDIMScheduler'\]\]; supported: a",
        ),
        ({"unet": "UNet2DConditionModel"}, "unet is 'UNet2DConditionModel'; supported: a library and a class, like"),
        ({"unet": {"a": 1}}, "unet is {'a': 1}; supported: a library and a class"),
        (
            {"safety_checker": 1},
            r"safety_checker is 1; .* like \[\"stable_diff.*Checker\"\], or \[null, null\] for none$",
        ),
        ({"text_encoder": None}, r"text_encoder is None; supported: .* like \[\"transformers\", \"CLIPTextModel\"\]$"),
        ({"_class_name": ["pipeline", "Mine"]}, r"_class_name is \['pipeline', 'Mine'\]; supported: a text"),
        (
            {"controlnet": ["diffusers", "ControlNetModel"]},
            "names controlnet, a ControlNetModel, which Sta",
        ),
        (
            {"unet_2": ["diffusers", "UNet2DConditionModel"]},
            "names unet_2, a UNet2DConditionModel, which Sta",
        ),
        ({"../evil": ["diffusers", "UNet2DConditionModel"]}, r"names '\.\./evil', which is not a plain name"),
        ({"/tmp/evil": ["transformers", "CLIPImageProcessor"]}, "names '/tmp/evil', which is not a plain name"),
        ({"a\x1b[2J": [None, None]}, r"names 'a\\x1b\[2J', which is not a plain name"),
        (
            {"text_encoder": ["transformers", "CLIPTextModelWithProjection"]},
            "the class of text_encoder is CLIPTextModelW",
        ),
        (
            {"tokenizer": ["transformers", "T5Tokenizer"]},
            "the class of tokenizer is T5Tokenizer; supported: CLIPTokeniz",
        ),
    ],
    ids=str,
)
def test_what_model_index_can_not_name(copy, values, message):
    edit(copy / "model_index.json", **values)
    fails(copy, rf"model_index\.json:? {message}")


@pytest.mark.parametrize(
    "values",
    [
        {"feature_extractor": ["transformers", "CLIPImageProcessorPil"]},
        {"feature_extractor": ["transformers", "AnyProcessorOfTomorrow"], "image_encoder": ["transformers", "Dino"]},
        {"safety_checker": ["my_module", "MyChecker"]},
        {"unet": ["stable_diffusion", "UNet2DConditionModel"]},
        {"text_encoder_2": [None, None], "requires_safety_checker": None, "force_zeros": True},
        {"tokenizer": ["transformers", "CLIPTokenizerFast"]},
        {"resolution": [512, 512], "sizes": ["a", "b", "c"], "limits": {"a": 1}, "../x": 3},
    ],
    ids=str,
)
def test_what_model_index_can_name(copy, values):
    edit(copy / "model_index.json", **values)
    for name in {"safety_checker", "feature_extractor", "image_encoder"}.intersection(values):
        (copy / name).mkdir()
        (copy / name / "config.json").write_text("{}")
    assert read_folder(copy, only=()).model_index.items() >= values.items()


def test_null_is_no_part(copy, tmp_path):
    edit(copy / "model_index.json", safety_checker=None, resolution=[512, 512])
    out = write_folder(read_folder(copy), tmp_path / "out")
    written = json.loads((out / "model_index.json").read_text())
    assert (written["safety_checker"], written["resolution"]) == ([None, None], [512, 512])


def test_copied_parts_that_can_not_be_exported_are_a_warning(copy):
    """The warning comes before training, not at export."""
    checker = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    edit(copy / "model_index.json", safety_checker=checker, feature_extractor=["transformers", "CLIPImageProcessor"])
    with pytest.warns(
        UserWarning, match=r"safety_checker holds no config\.json.*, or set .* \[null, null\].*1 more"
    ) as seen:
        read_folder(copy, only=())
    assert len(seen) == 1
    edit(copy / "model_index.json", feature_extractor=[None, None])
    (copy / "safety_checker").mkdir()
    (copy / "safety_checker/config.json").write_text("{}")
    with pytest.warns(UserWarning, match="not exported: .*safety_checker holds no weights"):  # the hub has pickles only
        read_folder(copy, only=())
    (copy / "safety_checker/pytorch_model.bin").write_bytes(b"")
    read_folder(copy, only=())
    (copy / "safety_checker/pytorch_model.bin").unlink()
    (copy / "safety_checker/pytorch_model.bin").symlink_to("gone")
    with pytest.warns(UserWarning, match="not exported: .*pytorch_model.bin is a broken link"):
        read_folder(copy, only=())


def test_absent_component(copy):
    edit(copy / "model_index.json", vae=[None, None])
    fails(copy, "does not name a vae")


def test_unsupported_configuration(copy):
    edit(copy / "unet/config.json", class_embed_type="timestep")
    fails(copy, r"unet/config.json: .*class_embed_type.*timestep")


def test_keys_of_newer_versions_are_a_warning(copy):
    edit(copy / "unet/config.json", option_of_tomorrow=3, another=None)
    with pytest.warns(UserWarning, match=r"unet/config\.json has unknown keys.* ignored: option_of_tomorrow$") as seen:
        read_folder(copy, only=())
    assert len(seen) == 1
    edit(copy / "unet/config.json", option_of_tomorrow=None)
    edit(copy / "scheduler/scheduler_config.json", a=1, b=[2], c="3", d={})
    with pytest.warns(UserWarning, match=r"scheduler_config\.json has unknown keys.* ignored: a, b, c and 1 more$"):
        read_folder(copy, only=())


@pytest.mark.parametrize("name", ["model_index.json", "scheduler/scheduler_config.json", "vae/config.json"])
def test_json_that_is_nested_too_deep(copy, name):
    (copy / name).write_text("[" * 100_000)
    fails(copy, f"{name} can't be read as JSON: brackets nested")


def test_a_configuration_of_many_megabytes_is_not_parsed(copy):
    (copy / "unet/config.json").write_text(json.dumps({"block_out_channels": [32] * 10**6}))
    fails(copy, r"unet/config\.json can't be read as JSON: it is larger than 1 MiB")


@pytest.mark.parametrize("layers", [50, 4000])
def test_a_configuration_of_far_more_layers_than_the_weights(copy, layers):
    """Finding the shapes of such a network would take minutes."""
    edit(copy / "text_encoder/config.json", num_hidden_layers=layers)
    fails(
        copy, r"text_encoder/(model.safetensors: its \d+ tensors don't fit|config.json: it describes a network of more)"
    )


@pytest.mark.parametrize(
    ("value", "shown"), [(1, "is 1"), (float("nan"), "is nan"), (16.0, "is 16.0"), ("77", "is '77'")]
)
def test_length_of_prompts_that_can_not_be(copy, value, shown):
    edit(copy / "tokenizer/tokenizer_config.json", model_max_length=value)
    fails(copy, f"tokenizer/tokenizer_config.json.* {shown};")


@pytest.mark.parametrize("value", [0, 2000, None, "50"])
def test_a_trained_grid_that_can_not_be_is_found_when_it_is_read(lcm_folder, tmp_path, value):
    folder = pathlib.Path(shutil.copytree(lcm_folder, tmp_path / "model"))
    edit(folder / "scheduler/scheduler_config.json", original_inference_steps=value)
    fails(folder, f"scheduler_config.json: original_inference_steps is {value!r}")


def test_clipping_of_latents(copy, lcm_folder, tmp_path):
    """StableDiffusionPipeline turns it off in every scheduler; LatentConsistencyModelPipeline would clip."""
    edit(copy / "scheduler/scheduler_config.json", clip_sample=True)
    read_folder(copy, only=())
    folder = pathlib.Path(shutil.copytree(lcm_folder, tmp_path / "lcm"))
    edit(folder / "scheduler/scheduler_config.json", clip_sample=True)
    fails(folder, r"scheduler_config\.json: clip_sample is true, so LatentConsistencyModelPipeline would clip")


@pytest.mark.parametrize(
    ("part", "values", "message"),
    [
        (
            "unet",
            {"in_channels": 9},
            r"unet/config\.json has in_channels 9 \(an inpainting UNet\), vae/config\.json has lat",
        ),
        ("unet", {"in_channels": 8}, r"has in_channels 8 \(a UNet that edits images, like InstructPix2Pix's\)"),
        ("unet", {"in_channels": 5}, r"unet/config\.json has in_channels 5, vae/config\.json has latent_channels 4"),
        ("unet", {"out_channels": 8}, r"has out_channels 8 \(it predicts the variance too\)"),
        (
            "unet",
            {"cross_attention_dim": 24},
            "has cross_attention_dim 24, text_encoder/config.json has hidden_size 16",
        ),
        (
            "text_encoder",
            {"hidden_size": 24},
            "has cross_attention_dim 16, text_encoder/config.json has hidden_size 24",
        ),
        ("vae", {"latent_channels": 8}, r"in_channels 4, vae/config\.json has latent_channels 8; they must be equal"),
        ("vae", {"in_channels": 1}, r"vae/config\.json: in_channels is 1; supported: 3"),
        (
            "unet",
            {
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": 4,
                "projection_class_embeddings_input_dim": 8,
            },
            r"unet/config\.json: addition_embed_type is 'text_time'; supported: None",
        ),
    ],
    ids=str,
)
def test_parts_that_do_not_fit_each_other(copy, part, values, message):
    edit(copy / part / "config.json", **values)
    fails(copy, message)


def test_parts_that_are_links(copy, tmp_path):
    """Models share parts by links to folders; a link to a file elsewhere could bring anything into an export."""
    for part in ("unet", "tokenizer", "scheduler"):
        (copy / part).rename(tmp_path / f"shared_{part}")
        (copy / part).symlink_to(tmp_path / f"shared_{part}")
    read_folder(copy, only=())
    (copy / "vae/config.json").rename(tmp_path / "elsewhere.json")
    (copy / "vae/config.json").symlink_to(tmp_path / "elsewhere.json")
    fails(copy, r"vae/config\.json is a link to .*elsewhere\.json, outside of ")


def test_links_that_nobody_reads(copy, tmp_path):
    for name, target in {
        "unet/diffusion_pytorch_model.bin": "../../../blobs/gone",
        "unet/diffusion_pytorch_model.fp16.safetensors": "../../../blobs/gone",
        "unet/model.ckpt": "/etc/hostname",
        "unet/checkpoints": "/etc",
        "tokenizer/old": "/etc",
        "scheduler/notes.md": "gone",
    }.items():
        (copy / name).symlink_to(target)
    expected = {name for name, path in files(copy).items() if not path.is_symlink()}
    with pytest.warns(UserWarning, match=r"links to missing files, which are not copied: scheduler/notes\.md$") as seen:
        out = write_folder(read_folder(copy), tmp_path / "out")
    assert len(seen) == 1
    assert files(out).keys() == expected


@pytest.mark.parametrize(
    "name", ["unet/notes.txt", UNET_FILE, "tokenizer/vocab.json", "scheduler/scheduler_config.json"]
)
def test_links_that_leave_the_folder(copy, tmp_path, name):
    (tmp_path / "secret").write_text("")
    (copy / name).unlink(missing_ok=True)
    (copy / name).symlink_to(tmp_path / "secret")
    fails(copy, f"{name} is a link to .*/secret, outside of")


def test_a_broken_link_is_called_by_its_own_name(copy):
    (copy / UNET_FILE).unlink()
    (copy / UNET_FILE).symlink_to("nowhere")
    fails(copy, rf"{UNET_FILE} is a broken link: .*/nowhere is missing")


def test_unsupported_schedule(copy):
    edit(copy / "scheduler/scheduler_config.json", beta_schedule="sigmoid")
    fails(copy, r"scheduler_config\.json: .*sigmoid")


def test_no_folder(tmp_path):
    fails(tmp_path / "nowhere", "there is no folder")
    fails("\ud800", r"'.ud800' is no path: it has a character that no file's name can have")
    fails("~no-such-user/a/b", "there is no folder ~no-such-user/a/b")
    fails(tmp_path / ("x" * 300), "x can't be read: File name too long")


def test_file_in_place_of_a_folder(tmp_path):
    (tmp_path / "x").write_text("")
    fails(tmp_path / "x", "is a file; give the folder")


def test_the_workdir_of_a_run_is_not_a_model(tmp_path):
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    fails(tmp_path / "run", f"is the workdir of a run, not a model: python -m lcm_jax.export --workdir={tmp_path}/run ")
