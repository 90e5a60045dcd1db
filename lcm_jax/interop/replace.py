"""Writing a folder so that it is whole or not there."""

import contextlib
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator

from lcm_jax.errors import UserError


@contextlib.contextmanager
def replacing(out: str | os.PathLike[str], source: pathlib.Path | None = None) -> Iterator[pathlib.Path]:
    """Gives a new folder beside `out` to write into, and renames it to `out` when all went well.

    Raises:
      UserError: `out` is `source`, a file, or a folder with something in it that is no model folder; no place to write.
    """
    target = pathlib.Path(out).expanduser().absolute()
    if target.exists():
        if source is not None and target.resolve() == source.resolve():
            raise UserError(f"{out} is the folder that the model was read from; choose another one")
        if not target.is_dir():
            raise UserError(f"{out} is a file; choose a folder")
        target = target.resolve()
        if any(target.iterdir()) and not (target / "model_index.json").is_file():
            raise UserError(
                f"{out} has something in it and is no model folder (no model_index.json); choose another one"
            )
    temporary = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = pathlib.Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
        temporary.chmod(0o777 & ~_umask())  # mkdtemp's folders are for the owner alone
        yield temporary
        if target.exists():
            old = temporary.with_suffix(".old")
            target.rename(old)
            temporary.rename(target)
            shutil.rmtree(old)
        else:
            temporary.rename(target)
    except OSError as error:
        raise UserError(f"{out} can't be written: {error.strerror or error}") from None
    finally:
        if temporary is not None and temporary.exists():
            shutil.rmtree(temporary, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
