"""The compiled step in a file: carried to the machines that run it, or read while Python traces the same step again.

`plan --save` writes one for `train --compiled`. And a run on one process keeps its own beside the compile cache: in a
second start XLA takes as long to load the step of a small UNet for a CPU as Python to get there; they go side by side.

The file is a line of JSON, then a pickle of `jax.experimental.serialize_executable`; as with JAX's own compile cache,
reading it runs what is in it. It is used for the very step that it was compiled from, and for no other: the line has
a hash of the lowered program, and all else that the executable depends on.
"""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import pathlib
import pickle
import sys
from typing import Any

import jax
from etils import epath
from jax.experimental import serialize_executable
from jax.sharding import Mesh

from lcm_jax import compile_cache, files
from lcm_jax.config import Config
from lcm_jax.errors import UserError

CPU_INFO = pathlib.Path("/proc/cpuinfo")


def save(path: str | os.PathLike[str], mesh: Mesh, lowered: jax.stages.Lowered, compiled: jax.stages.Compiled) -> None:
    """Writes a step that was lowered and compiled for these devices.

    It must come from the compiler itself: one that a CPU read from a cache is written without its functions.

    Raises: UserError where it can't be written.
    """
    made_for = {**_environment(mesh), "program": _hash(lowered.as_text())}
    content = pickle.dumps(serialize_executable.serialize(compiled))
    files.write(path, json.dumps(made_for).encode() + b"\n" + content)


def given(text: str) -> str:
    """The type of --compiled; raises UserError where there is no such file."""
    if not epath.Path(text).is_file():
        raise UserError(f"--compiled={text}: there is no such file; plan --save={text} writes it")
    return text


class Ahead:
    """A run's step, which is read from its file, if there is one, from now on and in a thread of its own."""

    def __init__(self, config: Config, mesh: Mesh, given: str | os.PathLike[str] | None = None) -> None:
        """Begins to read.

        Args:
          config, mesh: of the run.
          given: a file of `save`; else a run on one process and CPUs keeps its own in the folder of the compile cache.
        """
        self._mesh, self._given, self._own = mesh, given, ""
        if not given and (folder := compile_cache.folder()) and _is_kept(mesh):
            options = {k: v for k, v in dataclasses.asdict(config).items() if k not in _BESIDE_THE_STEP}
            self._own = f"{folder}/step-{_hash(json.dumps([options, dict(mesh.shape)]))[:32]}"
        path = given or (self._own if self._own and epath.Path(self._own).is_file() else "")
        thread = concurrent.futures.ThreadPoolExecutor(1)
        self._read = thread.submit(_read, epath.Path(path), mesh) if path else None
        thread.shutdown(wait=False)

    def step(self, lowered: jax.stages.Lowered) -> jax.stages.Compiled:
        """Returns the step that was lowered: from the file if that holds this very step, else compiled (and kept).

        A given file that is not used is told in one line.
        """
        if self._read:
            try:
                made_for, compiled = self._read.result()
                if made_for["program"] != _hash(lowered.as_text()):
                    raise UserError("it is another step: the options, the folder's configurations or the code differ")
            except UserError as error:
                if self._given and jax.process_index() == 0:
                    print(f"--compiled={self._given} is not used: {error}", file=sys.stderr)
            else:
                compile_cache.note_hit()
                return compiled
        before = compile_cache.from_cache()
        compiled = lowered.compile()
        if self._own and compile_cache.from_cache() == before:
            with contextlib.suppress(UserError):  # a cache that can't be written costs time, nothing else
                save(self._own, self._mesh, lowered, compiled)
        return compiled


_BESIDE_THE_STEP = ("checkpoint", "log", "max_skipped", "profile")  # options that compile nothing else


def _is_kept(mesh: Mesh) -> bool:
    return jax.process_count() == 1 and mesh.devices.flat[0].platform == "cpu"


def _read(path: epath.Path, mesh: Mesh) -> tuple[dict[str, Any], jax.stages.Compiled]:
    with files.one_line(path, "read"):
        line, _, content = path.read_bytes().partition(b"\n")
    here = _environment(mesh)
    try:
        made_for = json.loads(line)
        differing = [
            f"{name} {made_for[name]!r}, here {value!r}" for name, value in here.items() if made_for[name] != value
        ]
        if differing:
            raise UserError(f"it was compiled elsewhere: {', '.join(differing)}")
        payload, in_tree, out_tree = pickle.loads(content)
        devices = list(mesh.devices.flat)
        return made_for, serialize_executable.deserialize_and_load(
            payload, in_tree, out_tree, backend=devices[0].client, execution_devices=devices
        )
    except UserError:
        raise
    except Exception as error:  # pickle and the runtimes have many
        reason = str(error).strip() or type(error).__name__
        raise UserError(f"it is damaged, or this runtime can't load it: {reason.splitlines()[0][:200]}") from None


def _environment(mesh: Mesh) -> dict[str, Any]:
    """What an executable depends on besides its program."""
    devices = list(mesh.devices.flat)
    flags = {name: os.environ.get(name, "") for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")}
    cpu = ""
    if devices[0].platform == "cpu" and CPU_INFO.exists():
        cpu = _hash("".join(sorted({line for line in CPU_INFO.read_text().splitlines() if line.startswith("flags")})))
    return {
        "jax": jax.__version__,
        "jaxlib": importlib.metadata.version("jaxlib"),
        "devices": f"{len(devices)} x {devices[0].device_kind}",
        **flags,
        "cpu": cpu[:12],
    }


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
