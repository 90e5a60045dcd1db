"""Errors, warnings and Ctrl-C in every command."""

import subprocess
import sys
import warnings

import pytest

from lcm_jax import __main__, cli
from lcm_jax.errors import UserError


def test_mistake_is_one_line_and_two(capsys):
    def main(argv):
        raise UserError(f"{argv[0]} is wrong")

    assert cli.run(main, ["x"], "sample") == 2
    assert capsys.readouterr().err == "lcm-jax sample: error: x is wrong\n"


def test_the_command_is_named_after_its_module(capsys):
    def main(argv):
        raise UserError("wrong")

    main.__module__ = "lcm_jax.export"
    cli.run(main, [])
    assert capsys.readouterr().err.startswith("lcm-jax export: ")


def test_warning_is_one_line_each_time(capsys):
    def main(argv):
        for _ in range(2):
            warnings.warn("look out", UserWarning, stacklevel=1)
        return 0

    assert cli.run(main, [], "sample") == 0
    assert capsys.readouterr().err == "lcm-jax sample: warning: look out\n" * 2


def test_interrupted(capsys):
    def main(argv):
        raise KeyboardInterrupt

    assert cli.run(main, [], "sample") == 130
    assert "Traceback" not in capsys.readouterr().err


def test_other_errors_keep_their_traceback():
    def main(argv):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        cli.run(main, [], "sample")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--steps=1", "--step=1"], "there is no option --step=1; did you mean '--steps'?"),
        (["--step=1"], "there is no option --step=1; did you mean '--steps'?"),
        (["--steps=four"], "--steps=four: it must be a whole number"),
        (["--steps=--"], "--steps=--: -- is not a value of an option"),
        (["--num_inference_steps=4"], "there is no option --num-inference-steps=4; it is --steps here"),
        ([], "the following arguments are required: --steps"),
    ],
)
def test_parser(argv, message):
    parser = cli.parser("sample", "doc")
    parser.add_argument("--steps", type=int, required=True)
    with pytest.raises(UserError) as error:
        parser.parse_args(argv)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("option", "ours"), [("--max_train_steps=4", "--config.steps"), ("--lr=1", "--config.optimizer.learning_rate")]
)
def test_an_option_of_the_run_without_config(option, ours):
    parser = cli.parser("train", "doc")
    with pytest.raises(UserError, match=f"there is no option .*; it is {ours} here"):
        parser.parse_with_config([option])
    with pytest.raises(UserError, match="there is no option .*; did you mean|there is no option .*; choose from"):
        cli.parser("sample", "doc").parse_args([option])  # which has no such options


@pytest.mark.parametrize("spelling", ["--guidance-scale", "--guidance_scale"])
def test_hyphens_and_underscores_are_alike(spelling):
    parser = cli.parser("sample", "doc")
    parser.add_argument("--guidance-scale", type=float)
    parser.add_argument("--note")
    args = parser.parse_args([f"{spelling}=4", "--note=a_b"])
    assert (args.guidance_scale, args.note) == (4, "a_b")
    args, rest = parser.parse_with_config([spelling, "5", "--config.data.image_size=8"])
    assert (args.guidance_scale, rest) == (5, ["--config.data.image_size=8"])


@pytest.mark.parametrize(
    ("argv", "code", "text"),
    [
        (["lcm-jax"], 2, "usage: lcm-jax <command>"),
        (["lcm-jax", "--help"], 0, "  sample "),
        (["lcm-jax", "--version"], 0, "lcm_jax 0."),
        (["lcm-jax", "sampel"], 2, "there is no command 'sampel'; did you mean 'sample'?"),
        (["lcm-jax", "sample"], 2, "lcm-jax sample: error: the following arguments are required: --model"),
    ],
)
def test_dispatcher(monkeypatch, capsys, argv, code, text):
    monkeypatch.setattr("sys.argv", argv)
    assert __main__.main() == code
    printed = capsys.readouterr()
    assert text in printed.out + printed.err


def test_no_command_imports_another_framework():
    # in the tests' environment they are all installed
    program = f"""
import importlib, sys
for command in {sorted(__main__.COMMANDS)}:
    importlib.import_module("lcm_jax." + command)
print({{"torch", "tensorflow", "diffusers", "peft"}} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_a_warning_is_escaped(capsys):
    def main(argv):
        warnings.warn("a caption\x1b]0;title\x07\nof two lines", UserWarning, stacklevel=1)
        return 0

    cli.run(main, [], "sample")
    assert capsys.readouterr().err == "lcm-jax sample: warning: a caption\\x1b]0;title\\x07 of two lines\n"


def test_a_path_that_is_no_text_can_be_printed(capfd, monkeypatch):
    with open(1, "w", encoding="utf-8", closefd=False) as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert cli.run(lambda argv: print("caf\udce9.png") or 0, [], "sample") == 0
    assert capfd.readouterr().out == "caf\\udce9.png\n"


# The main thread is in C, where no handler runs; a folder stands for the lock that a run gives back.
BLOCKED = """
import hashlib, os, pathlib, signal, sys, threading
from lcm_jax import cli
from lcm_jax.host import interrupts
def main(argv):
    lock = pathlib.Path(argv[0])
    lock.mkdir()
    number = getattr(signal, argv[1])
    threading.Timer(0.2, os.kill, (os.getpid(), number)).start()
    with interrupts.last_act(lambda error: lock.rmdir()):
        hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
sys.exit(cli.run(main, command="train"))
"""


@pytest.mark.parametrize(("name", "code", "word"), [("SIGINT", 130, "interrupted"), ("SIGTERM", 143, "terminated")])
def test_a_signal_ends_a_command_that_is_not_in_python(name, code, word, tmp_path):
    command = [sys.executable, "-c", BLOCKED, str(tmp_path / "lock"), name]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (code, f"lcm-jax train: {word}\n")
    assert not (tmp_path / "lock").exists()
