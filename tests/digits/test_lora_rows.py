"""Tests of the evaluate command with LoRAs."""

import json

import numpy as np
import pytest
from fixtures_loras import random_lora

from lcm_jax import evaluate, load_pipeline
from lcm_jax.digits import evaluation_set, guidance, lora_rows, sampling
from lcm_jax.digits.classifier import STYLE_WEIGHTS, load_classifier
from lcm_jax.digits.evaluation_set import real_images, sheet_prompts
from lcm_jax.digits.measures import score
from lcm_jax.digits.report import Row, table
from lcm_jax.digits.sampling import sample_all
from lcm_jax.errors import UserError
from lcm_jax.interop.folder import read_folder
from lcm_jax.interop.lora.file import write_lora

PROMPTS = [*evaluation_set.test_prompts()[::400], sheet_prompts()[8]]
ON_SHEET = sheet_prompts()[3:8:4]


@pytest.fixture
def few(monkeypatch):
    for module in (evaluate, lora_rows):
        monkeypatch.setattr(module, "test_prompts", lambda: PROMPTS)
    monkeypatch.setattr(guidance, "validation_prompts", lambda: PROMPTS[::-1])
    monkeypatch.setattr(evaluate, "sheet_prompts", lambda: ON_SHEET)
    for module in (evaluate, sampling):
        monkeypatch.setattr(module, "BATCH", 2)
    monkeypatch.setattr(lora_rows, "BASE_STEPS", (2, 3))
    monkeypatch.setattr(lora_rows, "BASE_GUIDANCE", (2.0,))
    monkeypatch.setattr(lora_rows, "LORA_GUIDANCE", (1.0,))


@pytest.fixture(scope="module")
def files(micro_teacher, tmp_path_factory):
    """A random LCM-LoRA and a random style LoRA."""
    root = tmp_path_factory.mktemp("loras")
    folder = read_folder(micro_teacher)
    for seed, name in enumerate(("lcm", "style")):
        write_lora(root / f"{name}.safetensors", random_lora(folder, seed))
    return [str(root / f"{name}.safetensors") for name in ("lcm", "style")]


@pytest.mark.usefixtures("few")
def test_rows_are_those_of_what_is_attached(micro_teacher, files, tmp_path, capsys, recwarn):
    lcm, style = files
    out = tmp_path / "results"
    arguments = [f"--lora={lcm}:0.5", f"--lora={style}:0.8", "--style=italic", "--weights=0,1", "--steps=2"]
    assert evaluate.main([f"--model={micro_teacher}", *arguments, f"--out={out}"]) == 0
    assert {path.name for path in out.iterdir()} == {"evaluation.json", "table.md", "sheet.png", "weights.png"}
    values = json.loads((out / "evaluation.json").read_text())
    assert values["loras"] == {lcm: 0.5, style: 0.8}
    rows = [Row.from_dict(row) for row in values["rows"]]
    assert table(rows) in capsys.readouterr().out
    assert "style right" in (out / "table.md").read_text()
    assert [(row.name, row.steps) for row in rows] == [
        ("real test images", None),
        ("the same through the VAE", None),
        *((lora_rows.WITHOUT, n) for n in (2, 3)),
        (lora_rows.WITH, 2),
        *((f"{lora_rows.WITH} × {weight}", 2) for weight in (0, 1)),
    ]
    assert rows[0].score["style"].value == 1

    classifier = load_classifier(STYLE_WEIGHTS)
    features, _ = classifier(real_images(PROMPTS, "test", "italic"))

    def expected(attached, steps, scale, sampler):  # added to the weights in this order, as the command does
        pipe = load_pipeline(micro_teacher, loras=attached)
        images, _ = sample_all(pipe, PROMPTS, steps, scale, sampler)
        return score(images, PROMPTS, classifier, features, "italic")

    assert rows[3].score == expected({style: 0.8}, 3, 2.0, "ddim")
    assert rows[4].score == expected({style: 0.8, lcm: 0.5}, 2, 1.0, "lcm")
    assert rows[5].score == expected({style: 0.8}, 2, 1.0, "lcm")
    assert rows[6].score == expected({style: 0.8, lcm: 1.0}, 2, 1.0, "lcm")
    assert len({row.score.frechet for row in rows[2:]}) == 5
    assert "lcm.safetensors doesn't record that it is an LCM-LoRA" in str(recwarn.list[0].message)


@pytest.mark.usefixtures("few")
def test_the_sheet_shows_the_rows(micro_teacher, files):
    lcm, style = files
    pipe = load_pipeline(micro_teacher)
    classifier = load_classifier(STYLE_WEIGHTS)
    measured = lora_rows.Measured(pipe, (lcm, 0.5), {style: 0.8}, classifier, "italic")
    rows = [Row(lora_rows.WITHOUT, None, 2, 2.0), Row(lora_rows.WITH, None, 2, 1.0)]
    sampled = measured.sheet(ON_SHEET, rows)
    for (name, images), attached, row in zip(
        list(sampled.items())[1:], ({style: 0.8}, {lcm: 0.5, style: 0.8}), rows, strict=True
    ):
        sampler = "ddim" if row.name == lora_rows.WITHOUT else "lcm"
        expected, _ = sample_all(load_pipeline(micro_teacher, loras=attached), ON_SHEET, 2, row.guidance_scale, sampler)
        # other orders of the two LoRAs' sums round differently
        np.testing.assert_allclose(images.astype(int), expected.astype(int), atol=1, err_msg=name)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--teacher", "--lora=LCM"], "--lora needs a model; add --model=FOLDER"),
        (["--model=TEACHER", "--lora=LCM", "--teacher"], "--teacher has no effect with --lora; leave it out"),
        (["--model=TEACHER", "--lora=LCM", "--diffusers"], "--diffusers has no effect with --lora; leave it out"),
        (["--model=TEACHER", "--style=italic"], "--style has no effect without --lora; leave it out"),
        (["--model=TEACHER", "--weights=1"], "--weights has no effect without --lora; leave it out"),
        (["--model=TEACHER", "--lora=LCM", "--guidance_scale=0"], "--guidance-scale has no effect with --lora; leave"),
        (["--model=TEACHER", "--lora=LCM", "--steps=100"], "steps is 100; it must be in 1 … 50"),
        (["--model=STUDENT", "--lora=LCM"], "STUDENT holds a consistency model; a diffusion model is needed here"),
        (["--model=TEACHER", "--lora=nowhere"], "there is no LoRA file nowhere"),
        (
            ["--model=TEACHER", "--lora=LCM", "--weights=a"],
            "argument --weights: 'a' is not a list of numbers like 0,0.5,1",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_with_loras(arguments, message, micro_teacher, micro_student, files, tmp_path, monkeypatch):
    for name, place in {"STUDENT": micro_student, "TEACHER": micro_teacher, "LCM": files[0]}.items():
        arguments = [argument.replace(name, str(place)) for argument in arguments]
        message = message.replace(name, str(place))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(lora_rows, "sample_all", None)
    with pytest.raises(UserError) as error:
        evaluate.main(arguments)
    assert str(error.value).startswith(message)


def test_no_style_is_asked_of_upright_digits(classifier):
    images = np.stack([real_images(PROMPTS, "test")[0]] * len(PROMPTS))
    features = np.random.default_rng(0).standard_normal((len(PROMPTS), 64))
    assert score(images, PROMPTS, classifier, features)["style"] is None
