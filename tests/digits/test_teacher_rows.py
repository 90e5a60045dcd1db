"""Tests of the teacher's rows: choice of guidance, and the files that they are tied to."""

import json
import os
import shutil
from types import SimpleNamespace

import pytest

from lcm_jax.digits import guidance as choice
from lcm_jax.digits import teacher_rows
from lcm_jax.digits.measures import Score, Share
from lcm_jax.digits.report import Row
from lcm_jax.digits.teacher_rows import folder_hash, measure, shipped, to_json
from lcm_jax.errors import UserError


def score_of(accuracy, frechet):
    share = Share(round(1000 * accuracy), 1000)
    return Score({"prompt": share, "seen": share, "digit": share, "colours": share, "frechet": frechet})


# ---- the choice of guidance


def measured(monkeypatch, table, *, guidance):
    """Returns the rows of a fake model, the calls that were made, and the printed lines.

    Its (prompt accuracy, distance) is table[guidance] for validation prompts, and (0, guidance) for test prompts.
    """
    asked = []
    monkeypatch.setattr(teacher_rows, "GUIDANCE", guidance)
    monkeypatch.setattr(choice, "validation_prompts", lambda: "validation prompts")
    monkeypatch.setattr(teacher_rows, "test_prompts", lambda: "test prompts")

    def sample_all(pipe, prompts, steps, guidance_scale, sampler, *, seed=None, done=None):
        assert pipe == "a model"
        assert (seed == choice.VALIDATION_SEED) == (prompts == "validation prompts")  # the test rows use other noise
        asked.append((prompts, sampler, steps, guidance_scale))
        return (prompts, guidance_scale), 10.0 * steps

    def score(images, prompts, classifier, features):
        kind, scale = images
        assert prompts == kind
        split = kind.split()[0]
        assert features == f"features of {split} images of {kind}"
        return score_of(*table[scale]) if split == "validation" else score_of(0, scale)

    for module in (teacher_rows, choice):
        monkeypatch.setattr(module, "sample_all", sample_all)
        monkeypatch.setattr(module, "score", score)
        monkeypatch.setattr(module, "real_images", lambda prompts, split, *_: f"{split} images of {prompts}")
    lines = []
    return measure("a model", lambda images: (f"features of {images}", None), lines.append), asked, lines


def test_every_sampler_and_number_of_steps(monkeypatch):
    monkeypatch.setattr(teacher_rows, "STEPS", (1, 4))
    rows, asked, lines = measured(monkeypatch, {1.0: (0.5, 9.0), 3.0: (0.9, 5.0)}, guidance=(1.0, 3.0))
    expected = [("ddim", 1), ("ddim", 4), ("dpmpp", 1), ("dpmpp", 4)]
    assert [(row.name, row.steps) for row in rows] == [(teacher_rows.SAMPLERS[s], n) for s, n in expected]
    assert rows[1] == Row("teacher, DDIM", score_of(0, 3.0), 4, 3.0, 40.0)
    validation, test = "validation prompts", "test prompts"
    assert asked == [
        call for s, n in expected for call in ((validation, s, n, 1.0), (validation, s, n, 3.0), (test, s, n, 3.0))
    ]
    assert lines[0] == "teacher, DDIM, 1 step: guidance 3, 0.0 %, 3.0"


@pytest.mark.parametrize(
    ("table", "best"),
    [
        ({1.0: (0.90, 1.0), 2.0: (0.95, 9.0), 3.0: (0.80, 0.5)}, 2.0),  # accuracy first
        ({1.0: (0.941, 3.0), 2.0: (0.950, 4.0), 3.0: (0.945, 5.0)}, 1.0),  # within a point of the best, by distance
        ({1.0: (0.938, 3.0), 2.0: (0.950, 4.0), 3.0: (0.945, 5.0)}, 2.0),  # but not beyond a point
    ],
)
def test_the_guidance_that_is_chosen(monkeypatch, table, best):
    monkeypatch.setattr(teacher_rows, "STEPS", (2,))
    rows, _, _ = measured(monkeypatch, table, guidance=tuple(table))
    assert [row.guidance_scale for row in rows] == [best, best]


def test_usual_numbers():
    assert teacher_rows.STEPS == (1, 2, 4, 8, 50)
    assert {1.0, 6.0} <= set(choice.GUIDANCE)


def test_a_student_is_asked_for_what_it_was_trained_for():
    def candidates(low, high, w_embedding=True):
        recipe = SimpleNamespace(guidance_min=low, guidance_max=high) if low else None
        folder = SimpleNamespace(path="a folder")
        pipe = SimpleNamespace(w_embedding_dim=w_embedding, recipe=recipe, default_guidance=7.0, folder=folder)
        return choice.trained_range(pipe)

    assert candidates(1.0, 4.0) == [1.0, 1.5, 2.0, 3.0, 4.0]
    assert candidates(2.0, 3.5) == [2.0, 3.0]
    assert candidates(7.0, 9.0) == [7.0]  # no candidate in range: the default
    assert candidates(1.0, 4.0, w_embedding=False) == [7.0]
    with pytest.warns(UserWarning, match=r"a folder has no lcm_jax.json, .*: using 7, as diffusers does"):
        assert candidates(None, None) == [7.0]


def test_one_candidate_needs_no_images():
    assert choice.best_guidance(None, None, 4, [2.5]) == 2.5


# ---- files


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "teacher"
    (made / "unet").mkdir(parents=True)
    (made / "unet/weights").write_bytes(b"\0\1\2")
    (made / "model_index.json").write_text("{}")
    (made / "README.md").write_text("a card")
    return made


CHANGES = {
    "byte": lambda folder: (folder / "unet/weights").write_bytes(b"\0\1\3"),
    "name": lambda folder: (folder / "unet/weights").rename(folder / "unet/weight"),
    "place": lambda folder: (folder / "unet/weights").rename(folder / "weights"),
    "one more": lambda folder: (folder / "unet/more").write_bytes(b""),
    "one less": lambda folder: (folder / "model_index.json").unlink(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_folders_hash_follows_its_files(folder, tmp_path, change):
    before = folder_hash(folder)
    assert folder_hash(shutil.copytree(folder, tmp_path / "elsewhere")) == before
    CHANGES[change](folder)
    assert folder_hash(folder) != before


def test_a_folders_hash_does_not_follow_its_card(folder):
    before = folder_hash(folder)
    (folder / "README.md").write_text("another card")
    assert folder_hash(folder) == before
    (folder / "README.md").unlink()
    (folder / ".DS_Store").write_text("what a file manager leaves")
    assert folder_hash(folder) == before


ROWS = [Row("teacher, DDIM", score_of(0.5, 3.0), 4, 2.0, 10.0), Row("teacher, DPM-Solver++", score_of(0.6, 2.0), 50)]


@pytest.fixture
def rows_file(folder, tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(to_json(ROWS, folder)))
    return path


def test_shipped_rows_there_and_back(folder, rows_file):
    assert shipped(folder, rows_file) == (ROWS, teacher_rows.machine())


@pytest.mark.parametrize("change", CHANGES)
def test_rows_of_another_folder(folder, rows_file, change):
    CHANGES[change](folder)
    with pytest.raises(UserError, match=f"^{rows_file} was not measured with the present files of {folder}; .*--teac"):
        shipped(folder, rows_file)


def test_rows_of_another_classifier(folder, rows_file, tmp_path, monkeypatch):
    other = tmp_path / "classifier.safetensors"
    other.write_bytes(teacher_rows.WEIGHTS.read_bytes() + b" ")
    monkeypatch.setattr(teacher_rows, "WEIGHTS", other)
    with pytest.raises(
        UserError, match=f"not measured with the present files of {other}; measure again with --teacher"
    ):
        shipped(folder, rows_file)


def test_damaged_rows(folder, rows_file):
    values = json.loads(rows_file.read_text())
    for damaged in ({**values, "rows": [{"name": "x"}]}, {k: v for k, v in values.items() if k != "rows"}):
        rows_file.write_text(json.dumps(damaged))
        with pytest.raises(UserError, match=f"^{rows_file} is not a table of rows .*; measure again with --teacher$"):
            shipped(folder, rows_file)


def test_no_rows(folder, tmp_path):
    with pytest.raises(UserError, match=r"rows.json is missing; measure the teacher's rows with --teacher"):
        shipped(folder, tmp_path / "rows.json")


def test_the_machine_is_named():
    assert teacher_rows.machine().startswith(f"{os.cpu_count()} cores, ")
    assert len(teacher_rows.machine()) > len(f"{os.cpu_count()} cores, ")
