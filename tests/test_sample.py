"""The sample command, from the command line to the PNG."""

import numpy as np
import PIL.Image
import pytest

from lcm_jax import cli, load_pipeline, sample
from lcm_jax.errors import UserError
from lcm_jax.host.images import GAP, LABEL


def test_one_prompt(lcm_folder, tmp_path, capsys):
    out = tmp_path / "new/folder/picture.png"
    assert sample.main([f"--model={lcm_folder}", "--prompt=a red seven", "--steps=1", "--seed=3", f"--out={out}"]) == 0
    with PIL.Image.open(out) as picture:
        assert np.array_equal(picture, load_pipeline(lcm_folder)("a red seven", 1, seed=3)[0])
    assert capsys.readouterr().out.splitlines()[-1] == f"The image is in {out}"
    assert [p.name for p in out.parent.iterdir()] == ["picture.png"]


def test_several_prompts_are_one_grid(lcm_folder, tmp_path, capsys):
    out = tmp_path / "grid.png"
    arguments = ["--prompt=a", "--prompt=b", "--prompt=c", "--guidance_scale=4", "--timesteps=999", "--height=12"]
    sample.main([f"--model={lcm_folder}", *arguments, f"--out={out}"])
    expected = load_pipeline(lcm_folder)(["a", "b", "c"], guidance_scale=4, timesteps=[999], height=12)
    with PIL.Image.open(out) as picture:
        found = np.asarray(picture)
    # two columns; each picture is somewhere in the grid, whatever lies between them
    assert found.shape[1] >= 32
    assert found.shape[0] >= 24
    windows = np.lib.stride_tricks.sliding_window_view(found, (12, 16, 3))[:, :, 0]
    for picture in expected:
        assert (windows == picture).all(axis=(-1, -2, -3)).any()
    assert capsys.readouterr().out.splitlines()[-1] == f"The 3 images are in {out}"


def test_options_of_a_diffusion_model(teacher_folder, tmp_path):
    out = tmp_path / "x.png"
    arguments = ["--negative_prompt=blue", "--sampler=dpmpp", "--steps=2", "--guidance_scale=2", "--dtype=bfloat16"]
    sample.main([f"--model={teacher_folder}", "--prompt=a", *arguments, f"--out={out}"])
    pipe = load_pipeline(teacher_folder, dtype="bfloat16")
    expected = pipe("a", 2, 2.0, negative_prompt="blue", sampler="dpmpp")[0]
    with PIL.Image.open(out) as picture:
        assert np.array_equal(picture, expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps=0"], "steps"),
        (["--timesteps=9,x"], "'9,x' is not a list of whole numbers like 999,759"),
        (["--negative_prompt=ugly"], "takes no negative_prompt"),
        (["--prompt=caf\udce9"], r"--prompt is 'caf.udce9', which is not UTF-8; give it in UTF-8"),
        (["--seed=18446744073709551616"], r"seed is 18446744073709551616; it must be in 0 … 18446744073709551615"),
        (["--out=picture.jpg"], "should end in .png"),
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


def test_warnings_are_plain_lines(lcm_folder, tmp_path, capsys):
    prompt = " ".join(["red"] * 20)
    code = cli.run(sample.main, [f"--model={lcm_folder}", f"--prompt={prompt}", "--steps=1", f"--out={tmp_path}/x.png"])
    assert code == 0
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "warning" in line)
    assert line.startswith("lcm-jax sample: warning: the prompt 'red red")
    assert line.endswith("cut off: 'red red red red red red'")


def test_no_such_model(capsys, tmp_path):
    assert cli.run(sample.main, [f"--model={tmp_path}/nowhere", "--prompt=a"]) == 2
    assert capsys.readouterr().err == f"lcm-jax sample: error: there is no folder {tmp_path}/nowhere\n"


def test_pictures_are_enlarged_and_labelled(lcm_folder, tmp_path):
    def size(*more):
        out = tmp_path / "x.png"
        sample.main([f"--model={lcm_folder}", "--prompt=a", "--prompt=b", "--steps=1", f"--out={out}", *more])
        with PIL.Image.open(out) as picture:
            return picture.size

    width, height = size()
    assert size("--scale=3") == (3 * (width - GAP) + GAP, 3 * height)
    assert size("--label") == (width, height + LABEL)
    with pytest.raises(UserError, match="--scale=0 must be at least 1"):
        size("--scale=0")
