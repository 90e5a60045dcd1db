"""Tests of rows as JSON, as a table and as curves."""

import json

import numpy as np
import pytest

from lcm_jax.digits import measures, report, teacher_rows
from lcm_jax.digits.evaluation_set import Prompt
from lcm_jax.digits.measures import METRICS, Metric, Score, Share
from lcm_jax.digits.report import Row, curves, table
from lcm_jax.errors import UserError

SCORE = Score(
    {
        **{"prompt": Share(50, 100), "seen": Share(45, 80), "held_out": Share(5, 20)},
        **{"digit": Share(70, 100), "colours": Share(60, 100), "frechet": 12.34, "variety": 0.756},
    }
)
PLAIN = Score({**dict.fromkeys(("prompt", "seen", "digit", "colours"), Share(9, 9)), "frechet": 0.5})
ROWS = [
    Row("real", PLAIN),
    Row("teacher, DDIM", SCORE, 50, 2.0, 7.6),
    Row("student", SCORE, 1, 2.5, 1234.4),
    Row("student", PLAIN, 4, 2.5, 300.0),
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_there_and_back_through_json(row):
    assert Row.from_dict(json.loads(json.dumps(row.to_dict()))) == row


def test_json_has_shares_with_their_intervals():
    values = ROWS[1].to_dict()
    assert values["score"]["held_out"] == {
        "right": 5,
        "count": 20,
        "share": 0.25,
        "low": pytest.approx(0.1119, abs=1e-4),
        "high": pytest.approx(0.4687, abs=1e-4),
    }
    assert (values["name"], values["steps"], values["score"]["frechet"]) == ("teacher, DDIM", 50, 12.34)
    assert ROWS[0].to_dict()["score"]["held_out"] is None


def cells_of(rows):
    """The cells of the table's lines without the rule, as caption → cell."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table(rows).splitlines()]
    return [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]


def test_table():
    lines = table(ROWS).splitlines()
    assert len(lines) == 2 + len(ROWS)
    assert len({tuple(i for i, c in enumerate(line) if c == "|") for line in lines}) == 1  # the columns are aligned
    first, *others = (cell.strip() for cell in lines[1].strip("|").split("|"))
    assert set(first) == {"-"}
    assert {cell.lstrip("-") for cell in others} == {":"}
    captions = [caption for metric in METRICS if not metric.optional for caption in metric.columns]
    cells = cells_of(ROWS)
    assert list(cells[0]) == ["", "steps", "guidance", *captions, "images/s"]
    empty = dict.fromkeys(cells[0], "")
    real = {"": "real", "prompt right": "100.0 %", "95 % interval": "70.1 to 100.0", "seen": "100.0 %"}
    assert cells[0] == {**empty, **real, "Fréchet": "0.5"}
    student = {"": "student", "steps": "1", "guidance": "2.5", "images/s": "1234"}
    shares = {"prompt right": "50.0 %", "95 % interval": "40.4 to 59.6", "seen": "56.2 %", "held out": "25.0 %"}
    assert cells[2] == {**empty, **student, **shares, "Fréchet": "12.3", "variety": "0.76"}


def test_an_optional_column_comes_last_and_only_if_the_first_row_has_a_value():
    styled = Row("styled", Score({**SCORE.values, "style": Share(3, 4)}), 2, 1.0, 5.0)
    assert "style right" not in cells_of(ROWS)[0]
    first, second = cells_of([styled, ROWS[1]])
    assert list(first)[-2:] == ["images/s", "style right"]
    assert (first["style right"], second["style right"]) == ("75.0 %", "")


def test_a_new_metric_is_one_entry_of_the_table(monkeypatch):
    """It is measured, recorded and shown; rows that were recorded before have an empty cell."""
    old = json.loads(json.dumps(ROWS[1].to_dict()))
    brightness = Metric("brightness", lambda given: float(given.images.mean() / 255), {"bright": "{:.3f}".format})
    for module in (measures, report):
        monkeypatch.setattr(module, "METRICS", (*METRICS, brightness))
    prompts = [Prompt(7, "red", "blue", 0)] * 2
    images = np.full((2, 32, 32, 3), 51, np.uint8)
    features = np.random.default_rng(0).standard_normal((2, 64))
    new = Row("new", measures.score(images, prompts, lambda images: (features, np.zeros(2, int)), features))
    assert new.to_dict()["score"]["brightness"] == pytest.approx(0.2)
    assert Row.from_dict(new.to_dict()) == new
    assert [cells["bright"] for cells in cells_of([new, Row.from_dict(old)])] == ["0.200", ""]


def test_the_shipped_rows_are_read_without_a_later_metric():
    for values in json.loads(teacher_rows.ROWS.read_text())["rows"]:
        del values["score"]["variety"]  # as if they had been recorded before it
        score = Row.from_dict(values).score
        assert score.values.keys() == {metric.name for metric in METRICS}
        assert score["variety"] is None
        assert {name: value for name, value in score.to_dict().items() if name in values["score"]} == values["score"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prmpt": 1.0}, "'prmpt' is not a metric"),
        ({"prompt": None}, "a score needs 'prompt' and 'frechet'"),
        ({"frechet": None}, "a score needs 'prompt' and 'frechet'"),
    ],
)
def test_what_is_no_score(change, message):
    with pytest.raises(TypeError, match=message):
        Score({**SCORE.values, **change})


def test_curves_show_the_rows():
    image = curves(ROWS)
    assert image.dtype == np.uint8
    assert image.shape[0] > 200 < image.shape[1]
    np.testing.assert_array_equal(curves(ROWS), image)
    middle = image.shape[1] // 2
    for change in ({"prompt": Share(90, 100)}, {"frechet": 90.0}, {"seen": Share(9, 80), "digit": Share(9, 100)}):
        changed = Score({**SCORE.values, **change})
        differs = (curves([*ROWS[:2], Row("student", changed, 1, 2.5, 1.0), ROWS[3]]) != image).any((0, 2))
        assert differs[:middle].any() == ("prompt" in change)
        assert differs[middle:].any() == ("frechet" in change)
    assert (curves(ROWS[1:]) != image).any()  # real images have their own line


def test_curves_without_matplotlib(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match=r"the curves need matplotlib: pip install 'lcm_jax\[demo\]'"):
        curves(ROWS)
