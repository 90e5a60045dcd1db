"""Tests of the evaluate command, from the command line to the files that it writes."""

import functools
import json
import re
import shutil

import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
import torch

from lcm_jax import cli, evaluate, load_pipeline
from lcm_jax.digits import evaluation_set, guidance, sampling, teacher_rows
from lcm_jax.digits.evaluation_set import first_noise, later_noise, real_images, sheet_prompts
from lcm_jax.digits.measures import score
from lcm_jax.digits.presets import write_blank
from lcm_jax.digits.report import Row, table
from lcm_jax.digits.sampling import sample_all
from lcm_jax.digits.sheet import HEAD, LEFT
from lcm_jax.errors import UserError
from lcm_jax.host.images import GAP
from lcm_jax.inference.verify import lcm_sampler
from lcm_jax.monitor import progress

PROMPTS = [*evaluation_set.test_prompts()[::400], sheet_prompts()[8]]  # three, and one with a held-out pair
ON_SHEET = sheet_prompts()[3:8:4]


@pytest.fixture
def few(monkeypatch, micro_teacher, micro_student):
    """Patches in few prompts and steps, one batch size, and the micro teacher as the packaged one."""
    for module in (evaluate, teacher_rows):
        monkeypatch.setattr(module, "test_prompts", lambda: PROMPTS)
    monkeypatch.setattr(guidance, "validation_prompts", lambda: PROMPTS[::-1])
    monkeypatch.setattr(evaluate, "sheet_prompts", lambda: ON_SHEET)
    for module in (evaluate, sampling):
        monkeypatch.setattr(module, "BATCH", 2)
    monkeypatch.setattr(teacher_rows, "SAMPLERS", {"ddim": "teacher, DDIM"})
    monkeypatch.setattr(teacher_rows, "STEPS", (4,))
    for module in (guidance, teacher_rows):
        monkeypatch.setattr(module, "GUIDANCE", (2.0, 3.0))
    monkeypatch.setattr(teacher_rows, "TEACHER", micro_teacher)
    return f"--model={micro_student}"


def ship(rows_file, micro_teacher, monkeypatch):
    monkeypatch.setattr(teacher_rows, "shipped", functools.partial(teacher_rows.shipped, micro_teacher, rows_file))


@pytest.fixture
def shipped(few, micro_teacher, tmp_path_factory, monkeypatch):
    """Patches in a file of packaged rows for the micro teacher."""
    row = Row("teacher, DDIM", score_of(PROMPTS), 4, 2.0, 10.0)
    rows_file = tmp_path_factory.mktemp("assets") / "rows.json"
    values = teacher_rows.to_json([row, Row("teacher, DDIM", score_of(PROMPTS), 50, 3.0, 1.0)], micro_teacher)
    rows_file.write_text(json.dumps({**values, "machine": "a slide rule"}))
    ship(rows_file, micro_teacher, monkeypatch)
    return few


def score_of(prompts):
    features = np.random.default_rng(0).standard_normal((2, len(prompts), 64))
    return score(
        real_images(prompts, "test"), prompts, lambda _: (features[0], np.zeros(len(prompts), int)), features[1]
    )


def cell(sheet, row, column):
    """Returns an image of the sheet at its original size."""
    top, left = HEAD + row * (64 + GAP), LEFT + column * (64 + GAP)
    return sheet[top : top + 64 : 2, left : left + 64 : 2]


@pytest.fixture
def one_thread_of_torch():
    """Limits torch to one thread, which is fastest for layers this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread_of_torch")
def test_everything(few, micro_teacher, micro_student, tmp_path, classifier, capsys, monkeypatch):
    monkeypatch.setattr(progress, "LINE_EVERY", 0.0)
    out = tmp_path / "new" / "results"
    assert evaluate.main([few, "--teacher", "--steps=2", "--diffusers", f"--out={out}"]) == 0
    printed = capsys.readouterr().out
    for name in ("teacher, DDIM, 4 steps", "student, 2 steps"):  # the last line of each, with all of the work done
        assert re.search(rf"^{name}  4/4 images  \d+\.\d images/s  0:00:00 left$", printed, re.MULTILINE)
    assert {path.name for path in out.iterdir()} == {
        *("teacher.json", "evaluation.json", "table.md"),
        *("sheet.png", "curves.png"),
    }
    values = json.loads((out / "evaluation.json").read_text())
    assert (values["prompts"], values["model"]) == (len(PROMPTS), str(micro_student))
    rows = [Row.from_dict(row) for row in values["rows"]]
    assert [(row.name, row.steps) for row in rows] == [
        ("real test images", None),
        ("the same through the VAE", None),
        ("teacher, DDIM", 4),
        ("student", 2),
        ("student in diffusers", 2),
    ]
    assert table(rows) in printed
    assert (out / "table.md").read_text() == table(rows) + "\n"
    assert json.loads((out / "teacher.json").read_text())["rows"] == values["rows"][2:3]
    assert "images/s: teacher on" not in printed  # all rows are from one machine
    assert all(row.score.prompt.count == 4 and row.score["held_out"].count == 1 for row in rows)

    # rows score the images that the model samples from the fixed noise
    student, real = load_pipeline(micro_student), real_images(PROMPTS, "test")
    features, _ = classifier(real)
    chosen = rows[3].guidance_scale
    assert chosen == guidance.best_guidance(student, classifier, 2, (2.0, 3.0))
    images, _ = sample_all(student, PROMPTS, 2, chosen)
    assert rows[3].score == score(images, PROMPTS, classifier, features)
    assert rows[4].score.frechet == pytest.approx(rows[3].score.frechet, rel=2e-4)
    others, _ = sample_all(student, PROMPTS, 2, 5.0 - chosen)
    other = score(others, PROMPTS, classifier, features)
    assert other.frechet != pytest.approx(rows[3].score.frechet, rel=1e-3)
    sampled, _ = sample_all(load_pipeline(micro_teacher), PROMPTS, 4, rows[2].guidance_scale, "ddim")
    assert rows[2].score == score(sampled, PROMPTS, classifier, features)

    with PIL.Image.open(out / "sheet.png") as image:
        sheet = np.asarray(image)
    teachers, _ = sample_all(load_pipeline(micro_teacher), ON_SHEET, 4, rows[2].guidance_scale, "ddim")
    students, _ = sample_all(student, ON_SHEET, 2, chosen)
    for column in range(2):
        np.testing.assert_array_equal(cell(sheet, 0, column), real_images(ON_SHEET, "test")[column])
        np.testing.assert_array_equal(cell(sheet, 1, column), teachers[column])
        np.testing.assert_array_equal(cell(sheet, 2, column), students[column])
    assert sheet.shape[0] == HEAD + 3 * (64 + GAP) - GAP


@pytest.mark.usefixtures("one_thread_of_torch")
def test_images_in_diffusers_are_ours(micro_student, capfd):
    """Within one grey level, from the same noise."""
    pipe = load_pipeline(micro_student, quiet=True)
    texts, first = [prompt.text for prompt in PROMPTS[:2]], first_noise(2, (8, 8, 4), 0)
    between = later_noise(2, 2, (8, 8, 4), 1)
    theirs = lcm_sampler(pipe, 2)(texts, first, between, guidance_scale=2.5).astype(int)
    assert theirs.shape == (2, 32, 32, 3)
    assert np.abs(theirs - pipe(texts, 2, 2.5, latents=first, noise=between)).max() <= 1
    assert np.abs(theirs[0] - theirs[1]).max() > 50
    assert capfd.readouterr() == ("", "")


def test_rows_that_come_with_the_package(shipped, micro_student, tmp_path, capsys, monkeypatch):
    """Results are written next to the model, and the teacher's rows are used unchanged."""
    asked = []

    def sample_all(pipe, prompts, steps, guidance_scale, sampler=None, *, fill=False, done=None):
        asked.append((pipe.is_lcm, len(prompts), steps, guidance_scale))
        return real_images(prompts, "train"), 7.0

    monkeypatch.setattr(evaluate, "sample_all", sample_all)
    lcm = shutil.copytree(micro_student, tmp_path / "run" / "lcm")
    evaluate.main([f"--model={lcm}", "--steps=4,1", "--guidance_scale=2.5"])
    out = tmp_path / "run" / "evaluation"
    assert {path.name for path in out.iterdir()} == {"evaluation.json", "table.md", "sheet.png", "curves.png"}
    values = json.loads((out / "evaluation.json").read_text())
    rows = [Row.from_dict(row) for row in values["rows"]]
    assert rows[2:4] == teacher_rows.shipped()[0]
    assert [(row.name, row.steps, row.guidance_scale) for row in rows[4:]] == [("student", 4, 2.5), ("student", 1, 2.5)]
    assert rows[5].images_per_second == 7
    students = [(True, count, steps, 2.5) for count in (4, 2) for steps in (4, 1)]
    assert sorted(asked) == sorted([*students, (False, 2, 4, 2.0), (False, 2, 50, 3.0)])
    with PIL.Image.open(out / "sheet.png") as image:
        assert image.height == HEAD + 5 * (64 + GAP) - GAP
    assert values["teacher_machine"] == "a slide rule"
    assert f"teacher on a slide rule; other rows on this machine, {values['machine']}" in capsys.readouterr().out


class Model:
    """A fake pipeline whose VAE returns its input, darkened."""

    @staticmethod
    def vae(x, noise=None, *, method):
        assert noise is None
        return x if method == "to_latents" else 0.6 * jnp.asarray(x) - 0.4


def test_ceilings(classifier):
    prompts = evaluation_set.test_prompts()[::6]
    assert len(prompts) > evaluate.BATCH
    real, through = evaluate.ceilings(Model, classifier, prompts)
    images, others = (real_images(prompts, split) for split in ("test", "validation"))
    features, _ = classifier(images)
    assert real.score.prompt.value > 0.95
    assert real.score.frechet == score(others, prompts, classifier, features).frechet > 0
    darker, others_darker = (np.round(of * 0.6).astype(np.uint8) for of in (images, others))
    assert through.score.prompt == score(darker, prompts, classifier, features).prompt
    assert through.score.frechet == score(others_darker, prompts, classifier, features).frechet


# ---- mistakes


@pytest.fixture
def nothing_is_drawn(monkeypatch):
    """Makes sampling fail: mistakes must be reported before any long computation."""
    for module in (evaluate, teacher_rows):
        monkeypatch.setattr(module, "sample_all", None)
    monkeypatch.setattr(evaluate, "in_batches", None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --model=FOLDER, or --teacher to measure only the teacher"),
        (["--model=", "--teacher"], "--model= is empty; give a folder"),
        (["--teacher", "--diffusers"], "--diffusers needs a model; add --model=FOLDER"),
        (["--model=nowhere"], "there is no folder nowhere"),
        (["--model=TEACHER"], "TEACHER holds a diffusion model; a consistency model is needed here"),
        (
            ["--model=STUDENT", "--teacher=STUDENT"],
            "STUDENT holds a consistency model; a diffusion model is needed here",
        ),
        (
            ["--model=SMALL", "--teacher"],
            r"SMALL samples 16 x 16 pixels; only .* captioned digits \(32 x 32\) can be evaluated",
        ),
        (["--model=STUDENT", "--steps=0"], "argument --steps: '0' has 0; each must be at least 1"),
        (["--model=STUDENT", "--steps=4,-1"], "argument --steps: '4,-1' has -1; each must be at least 1"),
        (["--model=STUDENT", "--steps=x"], "argument --steps: 'x' is not a list of whole numbers like 1,2,4"),
        (["--model=STUDENT", "--steps=4,60"], "steps is 60; it must be in 1 … 50, the steps of the trained grid"),
        (["--model=STUDENT", "--guidance_scale=much"], "--guidance-scale=much: it must be a number"),
        (["--model=STUDENT", "--guidance_scale=nan"], "--guidance-scale=nan is not a finite number"),
        (["--model=STUDENT", "--step=4"], "there is no option --step=4; did you mean '--steps'.*"),
        (["--model=STUDENT", "--out=file"], "--out: file is a file; choose a folder"),
        (["--teacher", "--out=file/x"], "--out: file/x can't be written: Not a directory"),
        (["--model=STUDENT", "--out=/proc/nowhere"], "--out: /proc/nowhere can't be written: No such file .*"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
@pytest.mark.usefixtures("nothing_is_drawn", "shipped")
def test_mistakes(arguments, message, micro_teacher, micro_student, lcm_folder, tmp_path, monkeypatch):
    places = {"STUDENT": micro_student, "TEACHER": micro_teacher, "SMALL": lcm_folder}
    for name, place in places.items():
        arguments = [argument.replace(name, str(place)) for argument in arguments]
        message = message.replace(name, str(place))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=f"^{message}$") as error:
        evaluate.main(arguments)
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.usefixtures("nothing_is_drawn")
def test_no_rows_of_the_teacher(few, micro_teacher, tmp_path, monkeypatch, capsys):
    ship(tmp_path / "rows.json", micro_teacher, monkeypatch)
    assert cli.run(evaluate.main, [few]) == 2
    line = f"{tmp_path}/rows.json is missing; measure the teacher's rows with --teacher"
    assert capsys.readouterr().err == f"lcm-jax evaluate: error: {line}\n"


@pytest.mark.usefixtures("nothing_is_drawn")
def test_a_student_of_another_teacher(shipped, tmp_path, monkeypatch):
    other = write_blank("micro", tmp_path / "other", seed=1)
    monkeypatch.setattr(teacher_rows, "TEACHER", other)
    with pytest.raises(UserError, match=r"/lcm was not distilled from .*/other, whose rows .* --teacher=FOLDER$"):
        evaluate.main([shipped])


@pytest.mark.usefixtures("nothing_is_drawn")
@pytest.mark.parametrize(
    ("module", "argument", "message"),
    [
        ("matplotlib.figure", "--steps=1", r"the curves need matplotlib: pip install 'lcm_jax\[demo\]'"),
        ("diffusers", "--diffusers", r"sampling in diffusers needs diffusers: pip install lcm_jax\[diffusers\]"),
    ],
)
def test_what_is_not_installed(shipped, tmp_path, monkeypatch, module, argument, message):
    monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(UserError, match=f"^{message}$"):
        evaluate.main([shipped, argument, f"--out={tmp_path}"])
