"""The progress bar, the plain lines, and the speed they show, with a fake clock."""

import io
import math
import re
import types

import pytest
from rich.console import Console

from lcm_jax.monitor import progress
from lcm_jax.monitor.progress import Progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still unless a test moves it; `clock.now` in seconds."""
    clock = types.SimpleNamespace(now=5.0)
    monkeypatch.setattr(progress, "time", types.SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


def plain(width=80):
    return Console(file=io.StringIO(), width=width)


def lines(console):
    return console.file.getvalue().splitlines()


def test_plain_lines(clock):
    console = plain()
    with Progress(total_steps=400, start_step=0, batch_size=8, console=console) as bar:
        clock.now += 60.0  # the compiler
        bar.update(1, {"loss": 0.123456})
        for step in range(2, 401):
            clock.now += 0.5
            bar.update(step, {"loss": 1.0 / step})
    assert lines(console)[:5] == [
        "Compiling the step ...",
        "First step after 60.0 s",
        "step 1/400  loss 0.1235",
        "step 21/400  loss 0.04762  16.0 images/s  0:03:10 left",
        "step 41/400  loss 0.02439  16.0 images/s  0:02:60 left".replace("2:60", "3:00"),
    ]
    assert lines(console)[-1] == "step 400/400  loss 0.0025  16.0 images/s  0:00:00 left"
    assert len(lines(console)) == 2 + 1 + 19 + 1  # one each ten seconds, and the last step
    assert "\x1b" not in console.file.getvalue()


def test_the_last_step_is_told_at_once(clock):
    console = plain()
    with Progress(3, 0, 8, console) as bar:
        for step in (1, 2, 3):
            clock.now += 0.1
            bar.update(step, {"loss": 1.0})
    assert [line.split("  ")[0] for line in lines(console)[2:]] == ["step 1/3", "step 3/3"]


def test_each_loss_is_shown_until_it_has_a_new_value(clock):
    console = plain()
    with Progress(3, 0, 8, console) as bar:
        for losses in ({"critic/loss": 1.0, "generator/loss": 2.0}, {"critic/loss": 3.0}, {"critic/loss": 4.0}):
            clock.now += 10.0
            bar.update(1, losses)
    said = [line.split("loss ", 1)[1].split("  ")[:2] for line in lines(console)[2:]]
    assert said == [["1", "generator/loss 2"], ["3", "generator/loss 2"], ["4", "generator/loss 2"]]


def test_speed_is_nan_then_without_the_first_step_then_of_the_window(clock):
    with Progress(1000, 0, 4, plain()) as bar:
        clock.now += 100.0
        assert math.isnan(bar.update(1, {"loss": 1.0}))
        clock.now += 2.0
        assert bar.update(2, {"loss": 1.0}) == pytest.approx(4 / 2.0)
        clock.now += 1.0
        assert bar.update(3, {"loss": 1.0}) == pytest.approx(2 * 4 / 3.0)
        for step in range(4, 4 + progress.WINDOW - 1):
            clock.now += 0.5
            assert bar.update(step, {"loss": 1.0}) < 8.0
        clock.now += 0.5
        assert bar.update(4 + progress.WINDOW - 1, {"loss": 1.0}) == pytest.approx(
            8.0
        )  # the slow ones have left the window


def test_a_resumed_run_counts_only_its_own_steps(clock):
    console = plain()
    with Progress(1000, 900, 4, console) as bar:
        clock.now += 30.0
        bar.update(901, {"loss": 1.0})
        clock.now += 10.0
        assert bar.update(902, {"loss": 1.0}) == pytest.approx(0.4)
    assert lines(console)[-1] == "step 902/1000  loss 1  0.4 images/s  0:16:20 left"


def test_long_runs_and_odd_losses(clock):
    console = plain()
    with Progress(100_000, 0, 1, console) as bar:
        bar.update(1, {"loss": math.nan})
        clock.now += 10.0
        bar.update(2, {"loss": math.inf})
    assert lines(console)[-2:] == [
        "step 1/100000  loss nan",
        "step 2/100000  loss inf  0.1 images/s  277:46:20 left",
    ]


def test_a_clock_that_stands_still_is_no_error(clock):
    with Progress(3, 0, 4, plain()) as bar:
        assert math.isnan(bar.update(1, {"loss": 1.0}))
        assert math.isnan(bar.update(2, {"loss": 1.0}))


def test_say_prints_lines_as_they_are():
    console = plain(width=20)
    line = "[bold]no markup[/bold], no :smile: and no break at the width of the terminal"
    Progress(1, 0, 1, console).say(line)
    assert lines(console) == [line]


def test_every_encoding_can_print_it(clock):
    raw = io.BytesIO()
    console = Console(file=io.TextIOWrapper(raw, encoding="ascii", write_through=True))
    with Progress(2, 0, 1, console) as bar:
        bar.update(1, {"loss": 1.0})
        clock.now += 1.0
        bar.update(2, {"loss": 1.0})
    assert b"step 2/2" in raw.getvalue()


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_terminal_gets_a_bar(clock, encoding):
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding, write_through=True)
    console = Console(file=file, force_terminal=True, width=100, legacy_windows=False)
    with Progress(8, 2, 4, console) as bar:
        clock.now += 10.0
        bar.update(3, {"loss": 0.5})
        clock.now += 2.0
        assert bar.update(4, {"loss": 0.25}) == pytest.approx(2.0)
        bar.say("a line above")
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", raw.getvalue().decode(encoding)).replace("\r", "\n")
    shown = [line.strip() for line in shown.split("\n") if line.strip()]
    assert shown[0] == "Compiling the step ..."
    assert any("2/8" in line and "compiling" in line for line in shown)
    assert "First step after 10.0 s" in shown
    assert "a line above" in shown
    assert shown[-1].endswith("4/8 loss 0.25  2.0 images/s  0:00:08 left")
    assert not any(line.startswith("step ") for line in shown)


def test_an_exception_passes_and_ends_the_bar():
    console = Console(file=io.StringIO(), force_terminal=True)
    with pytest.raises(KeyboardInterrupt), Progress(8, 0, 4, console):
        raise KeyboardInterrupt
    assert console.file.getvalue().rstrip("\n").endswith("\x1b[?25h")  # the cursor is back


def test_the_first_step_says_what_the_compiler_did(clock):
    console = plain()
    with Progress(2, 0, 8, console, compiled=lambda: "compile cache: 3 hits, no miss (folder)") as bar:
        clock.now += 1.0
        bar.update(1, {"loss": 1.0})
    assert lines(console)[1] == "First step after 1.0 s; compile cache: 3 hits, no miss (folder)"


def sample(console, clock):
    """Two series: four images of two calls, then two of one; the first batch of each compiles for a minute."""
    with progress.Sampling(10, console) as bar:
        for name, images, calls in (("four", 4, 2), ("two", 2, 1)):
            done = bar.series(name, images, calls)
            for count in range(1, images + 1):
                clock.now += 60.0 if count == 1 else 4.0 * calls
                done(count)


def test_lines_of_sampling(clock):
    console = plain()
    sample(console, clock)
    assert lines(console) == [
        "four  1/4 images",
        "four  3/4 images  0.1 images/s  0:00:16 left",  # ten seconds after the line before
        "two  1/2 images  0:00:12 left",  # 84 s for 7 calls
    ]


def test_a_terminal_gets_a_bar_of_all_series(clock):
    console = Console(file=io.StringIO(), force_terminal=True, width=100, legacy_windows=False)
    sample(console, clock)
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", console.file.getvalue())
    assert "compiling" in shown
    assert "two  2/2 images  0.2 images/s  0:00:00 left" in shown
