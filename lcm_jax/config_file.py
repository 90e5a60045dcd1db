"""Reads a config file (`configs/*.py`) and the command line's overrides into a `Config`."""

import difflib
import functools
import os
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from lcm_jax.config import Config, from_dict
from lcm_jax.errors import UserError, nearest, plain

_TYPES = {
    bool: "true or false",
    int: "a whole number, as in 32",
    float: "a number, as in 1e-5",
    tuple: "a list in parentheses, as in '(10, 12)'",
}


def option_keys(tree: ConfigDict, prefix: str = "") -> Iterator[str]:
    """Yields the names of all options: "steps", "data.image_size"."""
    for name, value in tree.items():
        if isinstance(value, ConfigDict):
            yield from option_keys(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def load(file: str, overrides: Sequence[str] = ()) -> Config:
    """Reads a config file and applies the command line's overrides.

    Args:
      file: path of a Python file with `get_config(variant="")`, or the name of one of lcm_jax's own; `path:variant`
        passes the variant.
      overrides: `--config.<option>=<value>` strings.

    Raises:
      UserError: no such file or variant, an option that does not exist, a value of the wrong type or out of range.
    """
    file = _found(file)
    for override in overrides:
        if not override.startswith("--config."):
            raise UserError(
                f"{override!r} is not an option of this command; the run's options are --config.<name>=<value>"
            )
        if "=" not in override:
            raise UserError(f"{override}: a value is missing; write {override}=<value>")
    before = _parse(file, ())
    known = list(option_keys(before))
    for override in overrides:
        key = override.removeprefix("--config.").split("=", 1)[0]
        if key not in known:
            raise UserError(f"{override}: there is no option config.{key}{_nearest_option(key, known)}")
    return from_dict(_parse(file, overrides, before).to_dict())


def own_configs() -> dict[str, str]:
    """Returns the name → path of each config file that lcm_jax comes with."""
    folder = pathlib.Path(__file__).parent / "configs"
    return {path.stem: str(path) for path in sorted(folder.glob("*.py"))}


def _found(file: str) -> str:
    """Returns the config file with its path: `file` itself, or lcm_jax's own config of that name."""
    path, colon, variant = file.partition(":")
    if os.path.isfile(path):  # pathlib raises for a name that is too long
        return file
    own = own_configs()
    if path in own:
        return own[path] + colon + variant
    stem = os.path.basename(path).removesuffix(".py")
    hint = (
        f"; lcm_jax's own config of that name is --config={stem}{colon}{variant}" if stem in own else nearest(stem, own)
    )
    raise UserError(f"--config={plain(file, 100)}: there is no file {plain(path, 200)}{hint}")


def _parse(file: str, overrides: Sequence[str], before: ConfigDict | None = None) -> ConfigDict:
    """Runs the config file, which may import its neighbours, and lets config_flags apply the overrides.

    `before` is the tree without them, which says what type each option has.
    """
    argv = ["config", f"--config={file}", *overrides]
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
    sys.path.insert(0, str(pathlib.Path(file.split(":")[0]).parent.resolve()))
    try:
        values(argv)
        tree = values["config"].value
    except Exception as error:
        for override in overrides if before else ():
            _check_type(file, override, before)
        # config_flags puts the config file's own traceback into its message; its last line says what is wrong
        raise UserError(f"{' '.join(argv[1:])}: {str(error).strip().splitlines()[-1]}") from None
    finally:
        sys.path.pop(0)
    if not isinstance(tree, ConfigDict):
        raise UserError(f"--config={file}: get_config() returns {type(tree).__name__}; return the ConfigDict")
    return tree


def _check_type(file: str, override: str, before: Any) -> None:
    """Raises UserError if config_flags does not read this value as the option's type."""
    key, _, value = override.removeprefix("--config.").partition("=")
    try:
        _parse(file, [override])
    except UserError:
        old = functools.reduce(getattr, key.split("."), before)
        if type(old) in _TYPES:
            raise UserError(f"--config.{key} is {value!r}; it must be {_TYPES[type(old)]}") from None


def _nearest_option(key: str, known: list[str]) -> str:
    """The option of this last part; else of the same section, by its initials or spelling; else by the whole name."""
    section, _, last = key.rpartition(".")
    parts = {name: name.rpartition(".") for name in known}
    same = {part[2]: name for name, part in parts.items() if part[0] == section}
    initials = {"".join(word[0] for word in leaf.split("_")): name for leaf, name in same.items() if "_" in leaf}
    close = [name for name, part in parts.items() if part[2] == last]
    close += [initials[last]] if last in initials else []
    close += [same[leaf] for leaf in difflib.get_close_matches(last, same, n=1)]
    if close:
        return f"; did you mean 'config.{close[0]}'?"
    return nearest(f"config.{key}", [f"config.{name}" for name in known])
