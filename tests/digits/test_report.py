"""Tests of rows as JSON, as a table and as curves."""

import json

import numpy as np
import pytest

from lcm_jax.digits import report
from lcm_jax.digits.measures import Score, Share
from lcm_jax.digits.report import Row, curves, table
from lcm_jax.errors import UserError

SCORE = Score(Share(50, 100), Share(45, 80), Share(5, 20), Share(70, 100), Share(60, 100), 12.34, 0.756)
PLAIN = Score(Share(9, 9), Share(9, 9), None, Share(9, 9), Share(9, 9), 0.5)
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


def test_table():
    lines = table(ROWS).splitlines()
    assert len(lines) == 2 + len(ROWS)
    assert len({tuple(i for i, c in enumerate(line) if c == "|") for line in lines}) == 1  # the columns are aligned
    rule = [cell.strip() for cell in lines[1].strip("|").split("|")]
    assert [cell.endswith(":") for cell in rule] == [False] + [True] * 9
    assert all(set(cell) <= set("-:") for cell in rule)
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == list(report.HEADER)
    assert cells[2] == ["real", "", "", "100.0 %", "70.1 to 100.0", "100.0 %", "", "0.5", "", ""]
    assert cells[4] == ["student", "1", "2.5", "50.0 %", "40.4 to 59.6", "56.2 %", "25.0 %", "12.3", "0.76", "1234"]


def test_curves_show_the_rows():
    picture = curves(ROWS)
    assert picture.dtype == np.uint8
    assert picture.shape[0] > 200 < picture.shape[1]
    np.testing.assert_array_equal(curves(ROWS), picture)
    middle = picture.shape[1] // 2
    for change in ({"prompt": Share(90, 100)}, {"frechet": 90.0}, {"seen": Share(9, 80), "digit": Share(9, 100)}):
        changed = Score(**{**vars(SCORE), **change})
        differs = (curves([*ROWS[:2], Row("student", changed, 1, 2.5, 1.0), ROWS[3]]) != picture).any((0, 2))
        assert differs[:middle].any() == ("prompt" in change)
        assert differs[middle:].any() == ("frechet" in change)
    assert (curves(ROWS[1:]) != picture).any()  # real images have their own line


def test_curves_without_matplotlib(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match=r"the curves need matplotlib: pip install 'lcm_jax\[demo\]'"):
        curves(ROWS)
