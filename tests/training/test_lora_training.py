"""Training of adapters: loss and gradient equal those of merged weights, and nothing else is stored or changed."""

import dataclasses
import json
import re

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
from commands import train_on_one
from compiling import QUICK
from fixtures_folders import write_little
from safetensors import safe_open

import lcm_jax
from lcm_jax import cli, export, sample
from lcm_jax.adapters import lora
from lcm_jax.adapters.lora import LoraConfig
from lcm_jax.config import Config, ModelConfig, from_dict, load_resolved
from lcm_jax.data.config import DataConfig
from lcm_jax.digits import presets
from lcm_jax.errors import UserError
from lcm_jax.host.images import LABEL
from lcm_jax.inference.verify import verify
from lcm_jax.interop.folder import read_folder
from lcm_jax.interop.lora.file import read_header, read_lora, write_lora
from lcm_jax.interop.recipe import Recipe
from lcm_jax.interop.tokenizer import load_tokenizer
from lcm_jax.objectives.denoising import DenoisingConfig
from lcm_jax.objectives.lcd import LCDConfig
from lcm_jax.training import identity
from lcm_jax.training.checkpoint import restore_params
from lcm_jax.training.losses import make_losses
from lcm_jax.training.networks import frozen_params, initial_params, make_parts
from lcm_jax.training.previews import LEAST, make_preview

TOLD = LCDConfig(w_embedding_dim=0, huber_c=0.1)
BOTH = DenoisingConfig(train_text_encoder=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Models of one level of channels: every kind of module that has an adapter, and few of them."""
    return read_folder(write_little(tmp_path_factory.mktemp("little") / "teacher", vae_channels=[8, 8, 8]))


def configure(folder, **changes):
    config = Config(
        model=ModelConfig(folder=str(folder.path), **changes.pop("model", {})),
        data=DataConfig(image_size=32),
        **{"lora": LoraConfig(rank=4, alpha=2.0), **changes},
    )
    return config, make_parts(config, folder, load_tokenizer(folder))


def random_adapters(config, parts, folder, seed):
    """Neither half is zero."""
    random = np.random.default_rng(seed)
    return {
        name: {path: a + 0.2 * random.standard_normal(a.shape, np.float32) for path, a in flat.items()}
        for name, flat in initial_params(config, parts, folder).items()
    }


@pytest.mark.parametrize(
    "changes",
    [
        {"objective": "lcd", "lcd": TOLD, "model": {"remat": "block"}},
        {"objective": "denoising", "denoising": BOTH},
    ],
    ids=["lcd, remat", "denoising"],
)
def test_loss_and_gradient_are_those_of_merged_weights(changes, folder):
    config, parts = configure(folder, **changes)
    whole_config = dataclasses.replace(config, lora=LoraConfig())
    whole_parts = make_parts(whole_config, folder, load_tokenizer(folder))
    params, target = (random_adapters(config, parts, folder, seed) for seed in (0, 1))
    components = {"unet", "text_encoder"} if config.objective == "denoising" else {"unet"}
    assert params.keys() == components
    frozen, whole_frozen = frozen_params(parts, folder), frozen_params(whole_parts, folder)
    (loss,), (whole_loss,) = (make_losses(of).values() for of in (parts, whole_parts))
    base = initial_params(whole_config, whole_parts, folder)
    random = np.random.default_rng(2)
    batch = {
        "image": random.integers(0, 256, (2, 32, 32, 3), np.uint8),
        "input_ids": random.integers(0, 300, (2, *parts.null_ids.shape[1:]), np.int32),
    }
    noise, drawn = loss.draw(jax.random.key(3), (2, *parts.latent_shape(32)))
    draws = noise, drawn._replace(drop=jnp.array([True, False]))  # so that the empty prompt is seen

    def merged(adapters):
        return {name: lora.merge(base[name], flat, lora.alphas(parts.adapted[name])) for name, flat in adapters.items()}

    def of_adapters(params):
        return loss.loss(params, target, frozen, batch, draws)[0]

    def of_merged(params):
        return whole_loss.loss(merged(params), merged(target), whole_frozen, batch, draws)[0]

    found, grads = jax.jit(jax.value_and_grad(of_adapters), compiler_options=QUICK)(params)
    expected, expected_grads = jax.jit(jax.value_and_grad(of_merged), compiler_options=QUICK)(params)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    for name, flat in expected_grads.items():
        for path, grad in flat.items():
            assert np.abs(grad).max() > 0, path
            np.testing.assert_allclose(
                grads[name][path], grad, atol=2e-3 * np.abs(grad).max(), err_msg=f"{name} {path}"
            )


def test_the_base_is_kept_once(folder):
    """Teacher and student read the same frozen weights; the state has adapters alone, and starts as the teacher."""
    config, parts = configure(folder, lcd=TOLD)
    assert set(frozen_params(parts, folder)) == {"vae", "text_encoder", "unet"}
    params = initial_params(config, parts, folder)
    unet = parts.networks["unet"].shapes
    assert {lora.module_of(path) + ".kernel" for path in params["unet"]} < set(unet)
    assert not any(np.any(a) for path, a in params["unet"].items() if path.endswith(lora.B))
    again = initial_params(config, parts, folder)
    assert all(np.array_equal(params["unet"][path], array) for path, array in again["unet"].items())


def test_patterns(folder):
    patterns = (r"mid_block\..*to_q=2/1", r"text_encoder\..*fc1=3", "conv_in=1")
    settings = LoraConfig(rank=4, modules="to_q|fc1|fc2", patterns=patterns)
    _, parts = configure(folder, objective="denoising", denoising=BOTH, lora=settings)
    ranks = {
        f"{name}.{module}": (target.rank, target.alpha)
        for name, chosen in parts.adapted.items()
        for module, target in chosen.items()
    }
    assert ranks["unet.conv_in"] == (1, None)
    for module, found in ranks.items():
        if module.startswith("unet.mid_block"):
            assert found == (2, 1.0)
        elif module != "unet.conv_in":
            assert found == ((3, None) if module.endswith("fc1") else (4, None))
    assert {module.rpartition(".")[2] for module in ranks} == {"conv_in", "to_q", "fc1", "fc2"}
    # without a text encoder to train, none of its layers is chosen
    _, parts = configure(folder, objective="denoising")
    assert parts.adapted.keys() == {"unet"}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"lora": {"rank": 4}}, "config.lcd.w_embedding_dim is 256; with lora.rank it must be 0"),
        ({"lora": {"rank": 4}, "objective": "autoencoder"}, "config.lora.rank has no effect: objective is 'auto"),
        ({"lora": {"alpha": 4.0}}, "config.lora.alpha has no effect: rank is 0"),
        ({"lora": {"rank": -1}}, "config.lora.rank is -1; it can't be negative"),
        ({"lora": {"rank": 2, "alpha": -1.0}}, "config.lora.alpha is -1.0; it must be positive, or 0"),
        ({"lora": {"rank": 2, "init": "zeros"}}, "config.lora.init is 'zeros'"),
        ({"lora": {"rank": 2, "patterns": ["to_q"]}}, "config.lora.patterns has 'to_q'; it should be MODULES=RANK"),
        ({"lora": {"rank": 2, "patterns": [4]}}, "config.lora.patterns has 4; it should be text"),
        ({"lora": {"rank": 2, "patterns": ["to_q=a"]}}, "config.lora.patterns has 'to_q=a'; it should be"),
    ],
)
def test_mistakes(settings, said):
    with pytest.raises(UserError) as error:
        from_dict({"model": {"folder": "x"}, **settings})
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("to_queue=2", "config.lora: the LoRA target 'to_queue' matches no"),
        ("to_q=0", "config.lora: the LoRA rank of"),
        ("to_q=2/inf", "config.lora: the LoRA alpha of 'to_q' is inf; it must be above 0, and finite"),
    ],
)
def test_patterns_that_fit_nothing(pattern, said, folder):
    with pytest.raises(UserError, match=said):
        configure(folder, lcd=TOLD, lora=LoraConfig(rank=2, patterns=(pattern,)))


# ---- the commands


OTHERS = r"mid_block\..*(conv1|to_q)"


@pytest.fixture(scope="module")
def run(folder, digits_data_dir, tmp_path_factory):
    """A run of two steps."""
    root = tmp_path_factory.mktemp("lora")
    (root / "config.py").write_text(
        "from lcm_jax.config import default_config\n"
        "def get_config():\n"
        "    config = default_config()\n"
        f"    config.model.folder = {str(folder.path)!r}\n"
        f"    config.data.data_dir = {digits_data_dir!r}\n"
        "    config.data.image_size = 32\n"
        "    config.batch_size = 4\n"
        "    config.optimizer.learning_rate = 1e-2\n"
        "    config.lora.rank = 4\n"
        "    config.lora.alpha = 2.0\n"
        f"    config.lora.patterns = ({OTHERS + '=3/0.75'!r},)\n"
        "    config.lcd.w_embedding_dim = 0\n"
        "    config.lcd.skip = 40\n"
        "    config.lcd.timestep_scaling = 7.0\n"
        "    config.steps = 2\n"
        "    config.log.samples_every = 2\n"
        "    config.log.prompts = ('a red seven',)\n"
        "    config.log.guidance_scale = 1.0\n"
        "    return config\n"
    )

    assert train_on_one([f"--config={root}/config.py", f"--workdir={root}/run"]) == 0
    return root / "run"


@pytest.fixture(scope="module")
def files(run):
    """The exported file in each dialect."""
    found = {}
    for dialect in ("diffusers", "kohya"):
        found[dialect] = run / f"{dialect}.safetensors"
        assert cli.run(export.main, [f"--workdir={run}", f"--out={found[dialect]}", f"--dialect={dialect}"]) == 0
    return found


def test_checkpoints_hold_the_adapters_alone(run):
    found = restore_params(run, "ema")[0]
    assert found.keys() == {"unet"}
    assert all(lora.module_of(path) != path and np.any(array) for path, array in found["unet"].items())


def test_previews_are_drawn_with_the_adapters(run, folder):
    """The sample grid of the last step equals the pipeline's images with that step's adapters, not the base's."""
    config = load_resolved(run)
    parts = make_parts(config, folder, load_tokenizer(folder))
    preview, frozen = make_preview(config, parts, load_tokenizer(folder)), frozen_params(parts, folder)
    trained, start = (
        preview(restore_params(run, "ema")[0], frozen),
        preview(initial_params(config, parts, folder), frozen),
    )
    assert not np.array_equal(trained, start)
    with PIL.Image.open(run / "samples" / "step_000002.png") as shown:
        first = np.asarray(shown, int)[LABEL : LABEL + LEAST : 4, :LEAST:4]
    np.testing.assert_allclose(first, trained[0].astype(int), atol=1)


def test_another_base_is_noticed(run, folder, tmp_path, monkeypatch):
    bigger = read_folder(presets.write_blank("micro", tmp_path / "micro"))
    monkeypatch.setattr(export, "read_model", lambda _: bigger)
    with pytest.raises(UserError, match="unet weights.* in .*micro changed since the run in .* began"):
        export.export(run, tmp_path / "x.safetensors")
    monkeypatch.setattr(identity, "changed", lambda *_: "")  # as for a run that has recorded nothing
    with pytest.raises(UserError, match="the adapters in .* don't fit .*, which is not the model"):
        export.export(run, tmp_path / "x.safetensors")
    assert not (tmp_path / "x.safetensors").exists()


def test_file_in_each_dialect(run, files, folder):
    params, step = restore_params(run, "ema")
    assert step == 2
    for dialect, file in files.items():
        with safe_open(file, framework="np") as opened:
            header = opened.metadata()
        recipe = json.loads(header["lcm_jax"])
        assert (recipe["original_inference_steps"], recipe["timestep_scaling"]) == (25, 7.0)
        kernels = {"unet": lora.kernels(folder.components["unet"].network().shapes)}
        adapter = read_lora(file, kernels)["unet"]
        for module, alpha in adapter.alphas.items():
            own = re.fullmatch(OTHERS, module)
            assert adapter.ranks[module] == (3 if own else 4), (dialect, module)
            assert alpha == (0.75 if own and dialect == "diffusers" else 2.0), (dialect, module)
        for path, array in params["unet"].items():
            scaled = dialect == "kohya" and path.endswith(lora.B) and re.fullmatch(OTHERS, lora.module_of(path))
            expected = array * np.float32(0.375) if scaled else array
            np.testing.assert_array_equal(adapter.params[path], expected, err_msg=f"{dialect} {path}")


def test_diffusers_draws_the_same(files, folder):
    for file in files.values():
        assert verify(folder.path, lora=file) < 1e-3
    peer = diffusers.StableDiffusionPipeline.from_pretrained(folder.path)
    peer.load_lora_weights(str(files["diffusers"]))
    assert peer.get_active_adapters()


def test_its_own_timesteps_are_taken(files, folder, tmp_path):
    """N = 25 and a timestep scaling of 7 are in the file, not in the folder."""
    pipe = lcm_jax.load_pipeline(folder.path, loras={files["kohya"]: 1.0})
    noise = np.random.default_rng(0).standard_normal((2, *pipe.latent_shape(1))).astype(np.float32)

    def sampled(pipe, **options):
        return pipe("a red seven", latents=noise[0], noise=noise[1:], output="latents", **options)

    found = sampled(pipe, sampler="lcm", steps=2)
    np.testing.assert_array_equal(sampled(pipe, steps=2), found)  # the file says that it is an LCM-LoRA
    assert not np.array_equal(pipe("x", 2, sampler="ddim", output="latents"), pipe("x", 2, output="latents"))
    assert (
        cli.run(
            export.main,
            [f"--model={folder.path}", f"--lora={files['kohya']}", "--sampler=lcm", f"--out={tmp_path / 'merged'}"],
        )
        == 0
    )
    merged = lcm_jax.load_pipeline(tmp_path / "merged")
    assert merged.folder.scheduler["original_inference_steps"] == 25
    assert merged.folder.scheduler["timestep_scaling"] == 7.0
    np.testing.assert_allclose(sampled(merged, steps=2, guidance_scale=1.0), found, atol=1e-4 * np.abs(found).max())
    np.testing.assert_array_equal(sampled(pipe, sampler="lcm", timesteps=[999, 519]), found)  # of 25; of 50: 999, 499
    pipe.set_loras({})
    assert pipe.lora_recipe is None


def test_closing_lines_and_mistakes(run, files, folder, capsys, tmp_path):
    assert train_on_one([f"--config={run.parent}/config.py", f"--workdir={run}"]) == 0
    assert f"lcm_jax.export --workdir={run} --out={run}/lora.safetensors" in capsys.readouterr().out
    assert cli.run(export.main, [f"--workdir={run}", f"--out={tmp_path / 'x.safetensors'}"]) == 0
    *_, line = capsys.readouterr().out.splitlines()
    assert f"--model={folder.path} --lora={tmp_path / 'x.safetensors'} --sampler=lcm" in line
    lora_option = f"--lora={files['diffusers']}"
    options = [f"--model={folder.path}", lora_option, "--sampler=lcm", "--prompt=a", f"--out={tmp_path / 'a.png'}"]
    assert cli.run(sample.main, options) == 0
    assert cli.run(export.main, [f"--workdir={run}", f"--out={tmp_path / 'folder'}"]) == 2
    assert "should end in .safetensors" in capsys.readouterr().err


def with_recipe(files, folder, path, **changes):
    """The run's adapters with another recipe in their header."""
    kernels = {"unet": lora.kernels(folder.components["unet"].network().shapes)}
    recipe = Recipe.of_header(read_header(files["kohya"]), "x")
    header = dataclasses.replace(recipe, **changes).to_header()
    return write_lora(path, read_lora(files["kohya"], kernels), header=header)


def test_each_recipe_has_its_own_program(files, folder, tmp_path):
    """At this small timestep scaling the boundary condition is visible; a LoRA with weight 0 has no effect on it."""
    files = [with_recipe(files, folder, tmp_path / f"{x}.safetensors", timestep_scaling=x) for x in (1e-3, 2e-3)]
    pipe = lcm_jax.load_pipeline(folder.path)

    def sampled(loras):
        pipe.set_loras(loras)
        return pipe("a red seven", steps=1, sampler="lcm", output="latents")

    base, one, other = (sampled(loras) for loras in ({files[1]: 0.0}, {files[0]: 1.0}, {files[1]: 1.0}))
    assert np.abs(one - other).max() > 0.01 * np.abs(one).max()
    np.testing.assert_array_equal(sampled({files[0]: 1.0}), one)
    np.testing.assert_array_equal(sampled({files[0]: 0.0}), base)
    np.testing.assert_array_equal(sampled({files[1]: 0.0, files[0]: 1.0}), one)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"original_inference_steps": 5000}, "original_inference_steps is 5000; supported: a whole number in 1 … 1000"),
        ({"original_inference_steps": 0}, "original_inference_steps is 0"),
        ({"timestep_scaling": float("nan")}, "timestep_scaling is nan; supported: a positive number"),
    ],
)
def test_a_recipe_that_can_not_be(changes, said, files, folder, tmp_path):
    file = with_recipe(files, folder, tmp_path / "x.safetensors", **changes)
    with pytest.raises(UserError) as error:
        lcm_jax.load_pipeline(folder.path, loras={file: 1.0})
    assert str(error.value).startswith(f"{file}: ")
    assert said in str(error.value)


def test_two_recipes_do_not_mix(files, folder, tmp_path):
    other = with_recipe(files, folder, tmp_path / "other.safetensors", original_inference_steps=50)
    with pytest.raises(UserError, match="were distilled for different timesteps"):
        lcm_jax.load_pipeline(folder.path, loras={files["kohya"]: 1.0, other: 0.5})
