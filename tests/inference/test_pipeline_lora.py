"""Tests of pipelines with LoRAs: attaching, detaching, sampling, saving, in Python and from the command line."""

import json
import shutil

import numpy as np
import PIL.Image
import pytest
from fixtures_loras import random_lora
from safetensors.numpy import load_file

from lcm_jax import cli, export, load_pipeline, sample
from lcm_jax.errors import UserError
from lcm_jax.inference.verify import verify
from lcm_jax.interop.folder import read_folder
from lcm_jax.interop.lora.file import write_lora

UNET_FILE = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def files(teacher_folder, tmp_path_factory):
    """Two LoRA files, in the default dialect and in kohya's."""
    root, folder = tmp_path_factory.mktemp("loras"), read_folder(teacher_folder)
    first = write_lora(root / "lcm.safetensors", random_lora(folder, 1))
    second = write_lora(root / "style.safetensors", random_lora(folder, 2), dialect="kohya")
    return first, second


@pytest.fixture(scope="module")
def pipe(teacher_folder):
    return load_pipeline(teacher_folder)


def weights(pipe) -> dict[str, np.ndarray]:
    return {
        f"{name}.{path}": np.asarray(array)
        for name in ("unet", "vae", "text_encoder")
        for path, array in getattr(pipe, name).params.items()
    }


def changed(before, after) -> set[str]:
    assert before.keys() == after.keys()
    return {path for path in before if before[path].tobytes() != after[path].tobytes()}


def test_attach_detach_attach(pipe, files):
    own = weights(pipe)
    pipe.set_loras({files[0]: 1.0, files[1]: 0.8})
    both = weights(pipe)
    assert {path.split(".")[0] for path in changed(own, both)} == {"unet", "text_encoder"}
    assert all(path.endswith(".kernel") for path in changed(own, both))
    pipe.set_loras({files[1]: 0.8})
    assert changed(both, weights(pipe))
    pipe.set_loras({})
    assert not changed(own, weights(pipe))
    pipe.set_loras({files[0]: 1.0, files[1]: 0.8})
    assert not changed(both, weights(pipe))
    pipe.set_loras({})


def test_weights_are_per_adapter(pipe, teacher_folder, files):
    """The weight difference with two LoRAs is the weighted sum of their differences."""
    path = "unet.mid_block.resnets.0.conv1.kernel"
    own, found = weights(pipe)[path], []
    for loras in ({files[0]: 1.0}, {files[1]: 1.0}, {files[0]: -0.5, files[1]: 0.8}):
        found.append(weights(load_pipeline(teacher_folder, loras=loras))[path] - own)
    np.testing.assert_allclose(found[2], -0.5 * found[0] + 0.8 * found[1], atol=1e-6)
    assert np.abs(found[0] - found[1]).max() > 0.01


def test_weight_zero_changes_nothing(pipe, teacher_folder, files):
    assert not changed(weights(pipe), weights(load_pipeline(teacher_folder, loras={files[0]: 0.0})))


def test_failed_attachment_changes_nothing(pipe, files, tmp_path):
    own = weights(pipe)
    for loras, message in (
        ({files[0]: 1.0, tmp_path / "no.safetensors": 1.0}, "there is no LoRA file"),
        ({files[0]: float("nan")}, "is nan; it must be a finite number"),
        ({files[0]: 1e39}, r"lcm.safetensors:1e\+39 the weights of .* are not finite in float32"),
        ({files[0]: "1.0"}, "is '1.0'; it must be a finite number"),
        ({files[0]: True}, "is True; it must be a finite number"),
        ({files[0]: 10**400}, "it must be a finite number"),
        ({3: 1.0}, "3 in loras must be the path of a file"),
        ([files[0]], "it must be a dict of file → weight"),
        ({files[0]: 1.0, str(files[0]): 0.5}, "are the same LoRA; give one weight"),
    ):
        with pytest.raises(UserError, match=message):
            pipe.set_loras(loras)
        assert not changed(own, weights(pipe))


def test_base_of_half_precision(teacher_folder, files, tmp_path):
    """Attached weights are not rounded to the base's dtype; saved ones are, once."""
    from safetensors.numpy import save_file

    copy = shutil.copytree(teacher_folder, tmp_path / "half")
    tensors = {key: array.astype(np.float16) for key, array in load_file(copy / UNET_FILE).items()}
    save_file(tensors, copy / UNET_FILE, {"format": "pt"})
    save_file({key: array.astype(np.float32) for key, array in tensors.items()}, tmp_path / "wide.safetensors")
    wide = shutil.copytree(copy, tmp_path / "wide")
    shutil.move(tmp_path / "wide.safetensors", wide / UNET_FILE)
    loras = {files[0]: 1.0, files[1]: 0.5}
    pipe, exact = load_pipeline(copy, loras=loras), load_pipeline(wide, loras=loras)
    for path, array in exact.networks["unet"].params.items():
        np.testing.assert_array_equal(pipe.networks["unet"].params[path], array)
    pipe.save(tmp_path / "out")
    saved = load_pipeline(tmp_path / "out").networks["unet"].params
    assert {array.dtype.name for array in saved.values()} == {"float16"}
    for path, array in exact.networks["unet"].params.items():
        np.testing.assert_array_equal(saved[path], array.astype(np.float16))


def test_too_much_for_half_precision_is_not_saved(teacher_folder, files, tmp_path):
    from safetensors.numpy import save_file

    copy = shutil.copytree(teacher_folder, tmp_path / "half")
    tensors = {key: array.astype(np.float16) for key, array in load_file(copy / UNET_FILE).items()}
    save_file(tensors, copy / UNET_FILE, {"format": "pt"})
    pipe = load_pipeline(copy, loras={files[0]: 1e9})
    with pytest.raises(UserError, match="weights of unet are not finite in float16"):
        pipe.save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_consistency_sampling_of_a_diffusion_model(pipe, files):
    """Without w-embedding, guidance defaults to 1 (one network call per step), and steps to 4."""
    pipe.set_loras({files[0]: 1.0})
    default, one = (pipe("a red seven", guidance_scale=g, sampler="lcm", output="latents") for g in (None, 1.0))
    four, two = (pipe("a red seven", n, sampler="lcm", output="latents") for n in (4, 2))
    guided = pipe("a red seven", guidance_scale=1.5, sampler="lcm", negative_prompt="blue", output="latents")
    pipe.set_loras({files[0]: 0.0})
    without = pipe("a red seven", sampler="lcm", output="latents")
    pipe.set_loras({})
    np.testing.assert_array_equal(default, one)
    np.testing.assert_array_equal(default, four)
    for other in (two, guided, without):
        assert not np.allclose(default, other)
    with pytest.raises(UserError, match="noise has no effect with the sampler ddim"):
        pipe("x", 2, noise=np.zeros((1, 1, 8, 8, 4)))


def test_saved_folder_is_plain(pipe, teacher_folder, files, tmp_path):
    pipe.set_loras({files[0]: 1.0, files[1]: 0.8})
    merged = weights(pipe)
    pipe.save(tmp_path / "out")
    pipe.set_loras({})
    assert not changed(merged, weights(load_pipeline(tmp_path / "out")))
    names = sorted(p.relative_to(teacher_folder) for p in teacher_folder.rglob("*") if p.is_file())
    assert names == sorted(p.relative_to(tmp_path / "out") for p in (tmp_path / "out").rglob("*") if p.is_file())
    vae = "vae/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "out" / vae).read_bytes() == (teacher_folder / vae).read_bytes()


def test_only_the_variant_that_was_read_is_written(teacher_folder, files, tmp_path):
    copy = shutil.copytree(teacher_folder, tmp_path / "model")
    for name in ("unet", "vae"):
        (copy / name / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"another variant")
    load_pipeline(copy, loras={files[0]: 1.0}).save(tmp_path / "out")
    for name in ("unet", "vae"):
        written = [path.name for path in (tmp_path / "out" / name).glob("*.safetensors")]
        assert written == ["diffusion_pytorch_model.safetensors"]


# ---- commands


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([], {}),
        (["a.safetensors:0.5", "b:-1"], {"a.safetensors": 0.5, "b": -1.0}),
        (["a.safetensors"], {"a.safetensors": 1.0}),
        (["C:\\a.safetensors", "x:y/b"], {"C:\\a.safetensors": 1.0, "x:y/b": 1.0}),
    ],
)
def test_option(given, expected):
    assert cli.loras(given) == expected


def test_option_given_twice():
    with pytest.raises(UserError, match="--lora=a is given twice"):
        cli.loras(["a:1", "a:0.5"])


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("a.safetensors:abc", "--lora=a.safetensors:abc: the weight of a.safetensors is 'abc', not a number"),
        ("a.safetensors:", "the weight of a.safetensors is '', not a number"),
        ("", "--lora= names no file; give FILE or FILE:WEIGHT"),
        (":1", "--lora=:1 names no file"),
    ],
)
def test_option_mistakes(given, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.safetensors").touch()
    with pytest.raises(UserError) as error:
        cli.loras([given])
    assert said in str(error.value)


def test_sample(pipe, teacher_folder, files, tmp_path):
    arguments = [f"--lora={files[0]}:0.5", f"--lora={files[1]}", "--sampler=lcm", "--steps=1", "--prompt=a"]
    assert sample.main([f"--model={teacher_folder}", *arguments, f"--out={tmp_path}/x.png"]) == 0
    pipe.set_loras({files[0]: 0.5, files[1]: 1.0})
    expected = pipe("a", 1, sampler="lcm")[0]
    pipe.set_loras({})
    with PIL.Image.open(tmp_path / "x.png") as image:
        assert np.array_equal(image, expected)


def test_export(pipe, teacher_folder, files, tmp_path, capsys):
    out = tmp_path / "merged"
    arguments = [f"--model={teacher_folder}", f"--lora={files[0]}:0.5", f"--lora={files[1]}:-1", f"--out={out}"]
    assert export.main([*arguments, "--sampler=lcm"]) == 0
    assert f"{out} holds {teacher_folder} with 2 LoRAs merged into it" in capsys.readouterr().out
    pipe.set_loras({files[0]: 0.5, files[1]: -1.0})
    merged = load_pipeline(out)
    assert not changed(weights(pipe), weights(merged))
    pipe.set_loras({})
    assert merged.is_lcm
    assert merged.default_guidance == 1.0
    scheduler = json.loads((out / "scheduler/scheduler_config.json").read_text())
    assert (scheduler["_class_name"], scheduler["original_inference_steps"]) == ("LCMScheduler", 50)
    assert verify(out, steps=2) <= 1e-4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --workdir, .* or --model"),
        (["--workdir=x", "--model=y"], "give --workdir, .* or --model"),
        (["--workdir=x", "--lora=y"], "--lora has no effect with --workdir"),
        (["--model=x", "--lora=y", "--which=ema"], "--which has no effect with --model"),
        (["--model=x"], "would only copy the folder; give --lora"),
        (["--model=x", "--lora=y", "--step=0"], "--step has no effect with --model"),
        (["--model=x", "--lora=y", "--out=z.safetensors"], "--model writes a folder"),
    ],
)
def test_export_mistakes(arguments, message, tmp_path):
    with pytest.raises(UserError, match=message):
        export.main([f"--out={tmp_path}/out", *arguments])
    assert not list(tmp_path.iterdir())
