"""Reads a config file (`configs/*.py`) and the command line's overrides into a `Config`."""

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
    raise UserError(
        f"--config={plain(file, 100)}: there is no file {plain(path, 200)}; lcm_jax's own are {', '.join(own)}"
    )


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
    """The closest option by its whole name, else by its last part."""
    hint = nearest(f"config.{key}", [f"config.{name}" for name in known])
    if "did you mean" in hint:
        return hint
    by_leaf = [name for name in known if name.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]]
    return f"; did you mean 'config.{by_leaf[0]}'?" if by_leaf else hint
