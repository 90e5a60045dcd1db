"""Shared code of the commands: option parsing, and one-line errors and warnings on stderr without traceback."""

import argparse
import gc
import importlib.metadata
import importlib.util
import io
import logging
import os
import pathlib
import re
import shlex
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

from etils import epath

from lcm_jax.errors import Unavailable, UserError, nearest, plain
from lcm_jax.host import files, interrupts

Main = Callable[[Sequence[str]], int]
# Options that users of diffusers, or of other trainers, look for → the option here
OTHER_NAMES = {
    "--num-inference-steps": "--steps",
    "--generator": "--seed",
    "--num-images-per-prompt": "--images-per-prompt",
    "--num-images": "--images-per-prompt",
    "--output-dir": "--workdir",
    "--pretrained-model-name-or-path": "--config.model.folder",
    "--pretrained-teacher-model": "--config.model.folder",
    "--train-batch-size": "--config.batch_size",
    "--max-train-steps": "--config.steps",
    "--learning-rate": "--config.optimizer.learning_rate",
    "--resolution": "--config.data.image_size",
    "--steps": "--config.steps",
    "--batch-size": "--config.batch_size",
    "--seed": "--config.seed",
    "--lr": "--config.optimizer.learning_rate",
}


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises UserError instead of printing its usage, and suggests the closest option.

    Options are spelled with hyphens; underscores are accepted ("--guidance_scale").
    """

    _of_a_run = False  # whether the command takes --config.<name>=<value>

    def error(self, message: str) -> NoReturn:
        """Raises UserError with argparse's message, that of a wrong type in our own words."""
        if wrong := re.fullmatch(r"argument (\S+): invalid (int|float) value: '(.*)'", message):
            message = f"{wrong[1]}={wrong[3]}: it must be {'a whole number' if wrong[2] == 'int' else 'a number'}"
        raise UserError(message)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parses arguments like argparse; for an unknown option, raises UserError with the closest known one."""
        args = self._checked(args)
        values, unknown = self.parse_known_args(args, namespace)
        self._refuse(unknown)
        return values

    def parse_with_config(self, args: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
        """Parses the command's options; returns them and the remaining --config.<name>=<value> arguments."""
        self._of_a_run = True
        values, overrides = self.parse_known_args(self._checked(args))
        self._refuse([text for text in overrides if text.startswith("--") and not text.startswith("--config.")])
        return values, overrides

    def _checked(self, args: Sequence[str] | None) -> list[str]:
        """Returns the arguments with hyphens in the options' names.

        Rejects misspelled options before argparse reports the correct one as missing, and `--x=--`, which argparse
        parses as a list up to Python 3.12.
        """
        options = {name for action in self._actions for name in action.option_strings}
        args = [_with_hyphens(text) for text in (sys.argv[1:] if args is None else args)]
        given = [text for text in args if text.startswith("--")]
        for text in given:
            if text.endswith("=--"):
                raise UserError(f"{text}: -- is not a value of an option")
        self._refuse([t for t in given if not t.startswith("--config.") and t.split("=")[0] not in options])
        return args

    def _refuse(self, unknown: Sequence[str]) -> None:
        if unknown:
            options = [name for action in self._actions for name in action.option_strings if name.startswith("--")]
            name = unknown[0].split("=")[0]
            ours = OTHER_NAMES.get(name, "")
            known = ours in options or (self._of_a_run and ours.startswith("--config."))
            hint = f"; it is {ours} here" if known else nearest(name, options)
            raise UserError(f"there is no option {unknown[0]}{hint}")


def parser(command: str, doc: str | None) -> Parser:
    """Returns a parser for `lcm-jax <command>` whose --help prints the module docstring unchanged."""
    made = Parser(
        f"lcm-jax {command}", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    made.add_argument("--version", action="version", version=version())
    return made


def to_type(command: str, *words: str) -> str:
    """Returns the line that runs another command of lcm_jax, with the Python of this one."""
    python, found = sys.executable or "python", shutil.which("python")
    if found and os.path.abspath(found) == python:
        python = "python"
    elif python.startswith(os.path.join(os.getcwd(), "")):
        python = os.path.relpath(python)
    return shlex.join([python, "-m", f"lcm_jax.{command}", *words])


def version() -> str:
    """Returns the name and version of the package, and those of JAX."""
    return f"lcm_jax {importlib.metadata.version('lcm_jax')} (jax {importlib.metadata.version('jax')})"


def _with_hyphens(text: str) -> str:
    name, equals, value = text.partition("=")
    return (
        name.replace("_", "-") + equals + value if text.startswith("--") and not text.startswith("--config") else text
    )


def add_lora(parser: argparse.ArgumentParser) -> None:
    """Adds the option --lora=FILE:WEIGHT; parse its values with `loras`."""
    parser.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="FILE:WEIGHT",
        help="a LoRA from diffusers, peft or kohya's scripts, and its weight (default: 1); repeatable",
    )


def loras(given: Sequence[str]) -> dict[str, float]:
    """Parses --lora values to {file: weight}. Raises UserError for a missing file name, a bad weight or a duplicate."""
    found: dict[str, float] = {}
    for text in given:
        file, colon, weight = text.rpartition(":")
        try:
            file, value = file, float(weight) if colon else 1.0
        except ValueError:
            colon, value = "", 1.0  # the colon is part of the path
        file = file if colon else text
        if not file:
            raise UserError(f"--lora={text} names no file; give FILE or FILE:WEIGHT")
        if not os.path.exists(file) and os.path.exists(shorter := file.rpartition(":")[0]):
            raise UserError(f"--lora={text}: the weight of {shorter} is {file.rpartition(':')[2]!r}, not a number")
        if file in found:
            raise UserError(f"--lora={file} is given twice; give one weight")
        found[file] = value
    return found


def folder(text: str) -> pathlib.Path:
    """Parses an option that names a local folder. Raises UserError for a URL, which would create a local folder."""
    if "://" in text:
        raise UserError(f"{text} is not a local folder; only a run's workdir may be in a bucket (gs://BUCKET/PATH)")
    return pathlib.Path(text)


def workdir(text: str) -> epath.Path:
    """Parses --workdir: a folder, or a path in Google Cloud Storage, `gs://BUCKET/PATH`. Raises UserError."""
    if not text:
        raise UserError("--workdir= is empty; give a folder, or gs://BUCKET/PATH")
    if not files.in_bucket(text):
        if "://" in text:
            raise UserError(f"--workdir={text} must be a local folder, or gs://BUCKET/PATH")
        if "://" in str(epath.Path(os.path.abspath(text))):  # epath, and so Orbax, reads /gs/… as gs://…
            raise UserError(f"--workdir={text} would be read as a gs:// path; choose another folder")
        return epath.Path(text)
    files.check_bucket("--workdir", text)
    if importlib.util.find_spec("gcsfs") is None:
        raise UserError(f'--workdir={text} needs gcsfs: pip install gcsfs, or lcm_jax with its extra "tpu"')
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it also raises the errors that it logs with tracebacks
    return epath.Path(text.rstrip("/"))


def run(main: Main, argv: Sequence[str] | None = None, command: str | None = None) -> int:
    """Runs a command and returns its exit code: that of `main`, 2 for UserError, 1 for Unavailable.

    Ctrl-C and SIGTERM end it within two seconds, with 130 and 143, unless `main` handles them itself.

    Args:
      main: takes the arguments without the program's name and returns the exit code.
      argv: arguments; default: those of the command line.
      command: name printed in messages; default: the name of the module of `main`.
    """
    command = command or _module_name(main)
    gc.set_threshold(50_000, 10, 10)  # tracing creates many objects, few of them garbage: a fifth faster
    if isinstance(sys.stdout, io.TextIOWrapper):  # a path may hold undecodable bytes: print them escaped
        sys.stdout.reconfigure(errors="backslashreplace")

    def interrupted(error: KeyboardInterrupt) -> None:
        print(f"lcm-jax {command}: {interrupts.word(error)}", file=sys.stderr, flush=True)

    try:
        with one_line_warnings(command), interrupts.ends_soon(interrupted):
            from lcm_jax.host import platforms  # late: it imports jax, which `lcm-jax --help` need not

            platforms.skip_absent_tpu()
            return main(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        print(f"lcm-jax {command}: error: {error}", file=sys.stderr)
        return 1 if isinstance(error, Unavailable) else 2
    except KeyboardInterrupt as error:
        interrupted(error)
        return interrupts.EXIT_CODES[interrupts.word(error)]


@contextmanager
def one_line_warnings(command: str) -> Iterator[None]:
    """Context manager that prints every UserWarning as one plain line; other warnings are unchanged."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        usual = warnings.showwarning

        def show(message, category, filename, lineno, file=None, line=None):
            if category is UserWarning:
                print(f"lcm-jax {command}: warning: {plain(message)}", file=sys.stderr)
            else:
                usual(message, category, filename, lineno, file, line)

        warnings.showwarning = show
        yield


@contextmanager
def each_warning_once() -> Iterator[None]:
    """Context manager that shows a warning of the same text only once, for a loop that repeats it."""
    with warnings.catch_warnings():
        usual, shown = warnings.showwarning, set()

        def show(message, *rest, **named):
            if str(message) not in shown:
                shown.add(str(message))
                usual(message, *rest, **named)

        warnings.showwarning = show
        yield


def _module_name(main: Main) -> str:
    spec = getattr(sys.modules.get(main.__module__), "__spec__", None)  # under `python -m` the module is __main__
    return (spec.name if spec else main.__module__).rpartition(".")[2]
