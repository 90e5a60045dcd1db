"""The sample command, from the command line to the PNG."""

import numpy as np
import PIL.Image
import pytest

from lcm_jax import cli, load_pipeline, sample
from lcm_jax.errors import UserError
from lcm_jax.host.images import GAP, LABEL
from lcm_jax.inference.pipeline import Pipeline


def test_one_prompt(lcm_folder, tmp_path, capsys):
    out = tmp_path / "new/folder/image.png"
    assert sample.main([f"--model={lcm_folder}", "--prompt=a red seven", "--steps=1", "--seed=3", f"--out={out}"]) == 0
    with PIL.Image.open(out) as image:
        assert np.array_equal(image, load_pipeline(lcm_folder)("a red seven", 1, seed=3)[0])
    assert capsys.readouterr().out.splitlines()[-1] == f"The image is in {out}"
    assert [p.name for p in out.parent.iterdir()] == ["image.png"]


def test_several_prompts_are_one_grid(lcm_folder, tmp_path, capsys):
    out = tmp_path / "grid.png"
    arguments = ["--prompt=a", "--prompt=b", "--prompt=c", "--guidance_scale=4", "--timesteps=999", "--height=12"]
    sample.main([f"--model={lcm_folder}", *arguments, f"--out={out}"])
    expected = load_pipeline(lcm_folder)(["a", "b", "c"], guidance_scale=4, timesteps=[999], height=12)
    with PIL.Image.open(out) as image:
        found = np.asarray(image)
    # two columns; each image is somewhere in the grid, whatever lies between them
    assert found.shape[1] >= 32
    assert found.shape[0] >= 24
    windows = np.lib.stride_tricks.sliding_window_view(found, (12, 16, 3))[:, :, 0]
    for image in expected:
        assert (windows == image).all(axis=(-1, -2, -3)).any()
    assert capsys.readouterr().out.splitlines()[-1] == f"The 3 images are in {out}"


def test_from_an_image(lcm_folder, tmp_path):
    """A file of another shape is scaled and cropped to the model's size; strength 0.5 starts in the middle."""
    source, out = tmp_path / "in.png", tmp_path / "out.png"
    pixels = np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8)
    PIL.Image.fromarray(pixels).save(source)
    arguments = [f"--model={lcm_folder}", "--prompt=a", "--steps=1", f"--out={out}", f"--image={source}"]
    sample.main([*arguments, "--strength=0.5"])
    pipe = load_pipeline(lcm_folder)
    side = pipe("a", 1).shape[1]
    fitted = np.asarray(PIL.Image.fromarray(pixels[:, 8:40]).resize((side, side), PIL.Image.Resampling.LANCZOS))
    expected = pipe("a", 1, image=fitted, strength=0.5)[0]
    with PIL.Image.open(out) as image:
        np.testing.assert_allclose(np.asarray(image, int), expected.astype(int), atol=2)
        assert image.text["strength"] == "0.5"
    assert not np.array_equal(expected, pipe("a", 1, image=fitted, strength=1.0)[0])
    source.write_bytes(b"no image")
    with pytest.raises(UserError, match=f"--image={source}: Pillow finds no header"):
        sample.main(arguments)


def test_options_of_a_diffusion_model(teacher_folder, tmp_path):
    out = tmp_path / "x.png"
    arguments = ["--negative_prompt=blue", "--sampler=dpmpp", "--steps=2", "--guidance_scale=2", "--dtype=bfloat16"]
    sample.main([f"--model={teacher_folder}", "--prompt=a", *arguments, f"--out={out}"])
    pipe = load_pipeline(teacher_folder, dtype="bfloat16")
    expected = pipe("a", 2, 2.0, negative_prompt="blue", sampler="dpmpp")[0]
    with PIL.Image.open(out) as image:
        assert np.array_equal(image, expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps=0"], "steps"),
        (["--timesteps=9,x"], "'9,x' is not a list of whole numbers like 999,759"),
        (["--negative_prompt=ugly"], "takes no negative_prompt"),
        (["--prompt=caf\udce9"], r"--prompt is 'caf.udce9', which is not UTF-8; give it in UTF-8"),
        (["--seed=18446744073709551616"], r"seed is 18446744073709551616; it must be in 0 … 18446744073709551615"),
        (["--out=image.jpg"], r"should end in .png; or .* with a slash: image.jpg/"),
        (["--out="], "--out= is empty"),
        (["--images-per-prompt=0"], "--images-per-prompt is 0; it must be at least 1"),
        (["--images-per-prompt=257"], r"would be a grid of 257 images, more than 256; give a folder: --out=FOLDER/"),
        (["--batch-size=0", "--out=folder/"], "--batch-size is 0; it must be at least 1"),
        (["--prompts=nowhere"], "nowhere can't be read: No such file or directory"),
        (["--step=4"], "there is no option --step=4; did you mean '--steps'"),
        (["--steps=1", "--out=/proc/nowhere/x.png"], "/proc/nowhere"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_mistakes(lcm_folder, tmp_path, arguments, message, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message) as error:
        sample.main([f"--model={lcm_folder}", "--prompt=a", *arguments])
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


PROMPTS_FILE = """\ufeffa red seven
# a comment

  à la mer \r
"""


def test_a_file_per_image_of_a_file_of_prompts(lcm_folder, tmp_path, capsys):
    """Each file holds what it takes to make the same image again."""
    (tmp_path / "prompts.txt").write_text(PROMPTS_FILE, encoding="utf-8", newline="")
    out = tmp_path / "images"
    arguments = [f"--model={lcm_folder}", "--prompt=red", f"--prompts={tmp_path}/prompts.txt", "--images-per-prompt=2"]
    assert sample.main([*arguments, "--steps=1", "--seed=3", f"--out={out}/"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"The 6 images are in {out}/"
    prompts = [prompt for prompt in ("red", "a red seven", "à la mer") for _ in range(2)]
    expected = load_pipeline(lcm_folder)(prompts, 1, seed=3)
    assert sorted(path.name for path in out.iterdir()) == [f"0000{i}.png" for i in range(6)]
    for i, prompt in enumerate(prompts):
        with PIL.Image.open(out / f"0000{i}.png") as image:
            assert np.array_equal(image, expected[i])
            texts = image.text
        assert (texts["prompt"], texts["image"], texts["seed"], texts["steps"]) == (prompt, str(i), "3", "1")
    assert (texts["guidance_scale"], texts["sampler"], texts["model"]) == ("8.5", "lcm", str(lcm_folder))
    assert texts["command"].startswith("lcm-jax sample --model=")
    again = [f"--model={lcm_folder}", f"--prompt={texts['prompt']}", "--steps=1", "--seed=3", "--first-image=5"]
    sample.main([*again, f"--out={tmp_path}/again.png"])
    with PIL.Image.open(tmp_path / "again.png") as image:
        assert np.array_equal(image, expected[5])


def test_images_are_written_as_they_are_done(lcm_folder, tmp_path, monkeypatch):
    """Whatever ends the command leaves the finished images, each whole."""
    sampled = []

    def images(self, prompts, **options):
        sampled.append((prompts, options["first_image"], options["batch_size"]))
        if len(sampled) == 3:
            raise KeyboardInterrupt
        return np.zeros((len(prompts), 4, 4, 3), np.uint8)

    monkeypatch.setattr(Pipeline, "__call__", images)
    argv = [f"--model={lcm_folder}", *(f"--prompt={i}" for i in range(9)), "--batch-size=2", f"--out={tmp_path}/x"]
    assert cli.run(sample.main, argv) == 130
    assert sampled == [(["0", "1"], 0, 2), (["2", "3"], 2, 2), (["4", "5"], 4, 2)]
    assert sorted(path.name for path in (tmp_path / "x").iterdir()) == [f"0000{i}.png" for i in range(4)]


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"red\ncaf\xe9\n", "line 2 is .*, which is not UTF-8; give it in UTF-8"), (b"# a\n\n", "has no prompt; write")],
)
def test_mistakes_in_a_file_of_prompts(lcm_folder, tmp_path, content, message):
    (tmp_path / "prompts.txt").write_bytes(content)
    with pytest.raises(UserError, match=f"--prompts={tmp_path}/prompts.txt:? {message}"):
        sample.main([f"--model={lcm_folder}", f"--prompts={tmp_path}/prompts.txt"])


def test_warnings_are_plain_lines(lcm_folder, tmp_path, capsys):
    prompts = 2 * [f"--prompt={' '.join(['red'] * 20)}"]  # the same warning twice
    code = cli.run(sample.main, [f"--model={lcm_folder}", *prompts, "--steps=1", f"--out={tmp_path}/x.png"])
    assert code == 0
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "warning" in line)
    assert line.startswith("lcm-jax sample: warning: the prompt 'red red")
    assert line.endswith("cut off: 'red red red red red red'")


def test_no_such_model(capsys, tmp_path):
    assert cli.run(sample.main, [f"--model={tmp_path}/nowhere", "--prompt=a"]) == 2
    assert capsys.readouterr().err == f"lcm-jax sample: error: there is no folder {tmp_path}/nowhere\n"


def test_images_are_enlarged_and_labelled(lcm_folder, tmp_path):
    def size(*more):
        out = tmp_path / "x.png"
        sample.main([f"--model={lcm_folder}", "--prompt=a", "--prompt=b", "--steps=1", f"--out={out}", *more])
        with PIL.Image.open(out) as image:
            return image.size

    width, height = size()
    assert size("--scale=3") == (3 * (width - GAP) + GAP, 3 * height)
    assert size("--label") == (width, height + LABEL)
    with pytest.raises(UserError, match="--scale=0 must be at least 1"):
        size("--scale=0")
