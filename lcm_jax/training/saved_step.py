"""Saves the compiled train step to a file, and loads it on another machine or in a later run.

`plan --save` writes a file for `train --compiled`. A run with one process on CPU devices also caches its step in the
folder of the compile cache. On a restart, it is loaded while Python traces the step: for a small network on a CPU, both
take equally long.

File format: a line with a checksum of the rest, a line of JSON, and the output of
`jax.experimental.serialize_executable`. That output is a pickle, so loading it can run any code. It is unpickled only
for the step it was compiled from: the JSON has a hash of the lowered program, and everything else that the executable
depends on. A cached step must be owned by this user and writable by nobody else. Only its XLA executable, which is not
a pickle, is loaded while the program is traced.
"""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import importlib.metadata
import io
import json
import os
import pathlib
import pickle
import pickletools
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from etils import epath
from jax.experimental import serialize_executable
from jax.sharding import Mesh
from jaxlib import xla_client

from lcm_jax.config import OUTSIDE_THE_STEP, Config
from lcm_jax.errors import UserError, say
from lcm_jax.host import cache_entries, compile_cache, files, json_file, memory, private

CPU_INFO = pathlib.Path("/proc/cpuinfo")


_BEGIN = b"lcm_jax compiled step 2 "  # followed by the hex SHA-256 of all after this line
_KINDS = {
    "made_for": json_file.OBJECT,
    "program": json_file.TEXT,
    "executable": json_file.LIST,
    "step": json_file.WHOLE,
}


class _Damaged(UserError):
    """Raised for a file that is damaged, cannot be loaded, or could have been written by another user."""


def save(path: str | os.PathLike[str], mesh: Mesh, lowered: jax.stages.Lowered, compiled: jax.stages.Compiled) -> None:
    """Writes a step that was lowered and compiled for the mesh's devices.

    It must come from the compiler: a CPU executable read from a cache is serialized without its functions.

    Raises: UserError if the file cannot be written.
    """
    files.write(path, _content(mesh, lowered, compiled))


def _content(mesh: Mesh, lowered: jax.stages.Lowered, compiled: jax.stages.Compiled) -> bytes:
    step, in_tree, out_tree = serialize_executable.serialize(compiled)
    header = {
        "made_for": _environment(mesh),
        "program": _hash(lowered.as_text()),
        "executable": _executable_in(step),
        "step": len(step),
    }
    rest = json.dumps(header).encode() + b"\n" + step + pickle.dumps((in_tree, out_tree))
    return _BEGIN + hashlib.sha256(rest).hexdigest().encode() + b"\n" + rest


def _executable_in(step: bytes) -> tuple[int, int]:
    """Returns (start, end) of XLA's executable in a step's pickle: the largest bytes, found without unpickling."""
    _, start, end = max(
        (len(value), start := step.index(value, place), start + len(value))
        for _, value, place in pickletools.genops(step)
        if isinstance(value, bytes)
    )
    return start, end


def given(text: str) -> None:
    """Raises UserError if the file of --compiled does not exist."""
    if files.in_bucket(text):
        files.check_bucket("--compiled", text)  # a bucket without a name is searched for until the network gives up
    if not (epath.Path(text).is_file() if files.in_bucket(text) else os.path.isfile(text)):
        raise UserError(f"--compiled={text}: the file does not exist; plan --save={text} writes it")


class Ahead:
    """Loads the saved step of a run, if there is one, in a background thread."""

    def __init__(self, config: Config, mesh: Mesh, given: str | os.PathLike[str] | None = None) -> None:
        """Starts reading.

        Args:
          config, mesh: of the run.
          given: a file written by `save`. By default, a run with one process on CPU devices caches its step in the
            folder of the compile cache; others use no file.
        """
        self._mesh, self._given, self._own = mesh, given, ""
        folder = compile_cache.folder()
        if not given and folder and not files.in_bucket(folder) and _is_kept(mesh):
            options = {k: v for k, v in dataclasses.asdict(config).items() if k not in OUTSIDE_THE_STEP}
            self._own = f"{folder}/step-{_hash(json.dumps([options, dict(mesh.shape)]))[:32]}"
        path = given or (self._own if self._own and os.path.lexists(self._own) else "")
        thread = concurrent.futures.ThreadPoolExecutor(1)
        self._read = thread.submit(_read, epath.Path(path), mesh, kept=not given) if path else None
        thread.shutdown(wait=False)

    def step(self, lowered: jax.stages.Lowered) -> jax.stages.Compiled:
        """Returns the compiled step: from the file if it holds the same program, else compiled, and cached if enabled.

        If a file was passed or is damaged, and is not used, process 0 prints one line.
        """
        if self._read:
            try:
                saved = self._read.result()
                if saved.header["program"] != _hash(lowered.as_text()):
                    raise UserError(
                        "it is a different step: the options, the folder's configuration or the code changed"
                    )
                compiled = saved.load(list(self._mesh.devices.flat))
            except UserError as error:
                if (self._given or isinstance(error, _Damaged)) and jax.process_index() == 0:
                    which = f"--compiled={self._given}" if self._given else f"the cached step {self._own}"
                    say(f"{which} is not used: {error}", sys.stderr)
                if not self._given and isinstance(error, _Damaged):
                    with contextlib.suppress(OSError):  # another user's file
                        os.unlink(self._own)  # otherwise every start would report it
            else:
                compile_cache.note_hit()
                return compiled
        before = compile_cache.from_cache()
        compiled = lowered.compile()
        memory.release()
        if self._own and compile_cache.from_cache() == before:
            try:
                private.write(self._own, _content(self._mesh, lowered, compiled))
            except UserError as error:  # an unwritable cache only costs time
                cache_entries.warn(error)
        return compiled


def _is_kept(mesh: Mesh) -> bool:
    return jax.process_count() == 1 and mesh.devices.flat[0].platform == "cpu"


@dataclasses.dataclass
class _Saved:
    """The content of a file with a valid checksum, for these devices; nothing is unpickled yet."""

    header: dict[str, Any]
    step: bytes
    trees: bytes
    executable: Any = None  # XLA's executable, once loaded

    def load_executable(self, devices: Sequence[Any]) -> None:
        with _damage():
            start, end = self.header["executable"]
            self.executable = devices[0].client.deserialize_executable(
                self.step[start:end], executable_devices=xla_client.DeviceList(tuple(devices))
            )

    def load(self, devices: Sequence[Any]) -> jax.stages.Compiled:
        """Unpickles the step, and loads its executable unless it is loaded already."""
        if self.executable is None:
            self.load_executable(devices)
        with _damage():
            in_tree, out_tree = pickle.loads(self.trees)
            unloaded, arguments, no_kwargs = _Unpickler(self.step, devices, self.executable).load()
            return jax.stages.Compiled(unloaded.load(), [], in_tree.unflatten(arguments), out_tree, no_kwargs=no_kwargs)


class _Unpickler(serialize_executable._JaxPjrtUnpickler):
    """JAX's unpickler, for a step whose executable is already loaded."""

    def __init__(self, step: bytes, devices: Sequence[Any], executable: Any) -> None:
        super().__init__(io.BytesIO(step), devices[0].client, devices)
        self._loaded = executable

    def persistent_load(self, pid: tuple[Any, ...]) -> Any:
        return self._loaded if pid[0] == "exec" else super().persistent_load(pid)


def _read(path: epath.Path, mesh: Mesh, *, kept: bool) -> _Saved:
    if kept:
        try:
            data = private.read(path)
        except UserError as error:
            raise _Damaged(str(error)) from None
    else:
        with files.one_line(path, "read"):
            data = path.read_bytes()
    saved = _checked(data, _environment(mesh))
    if kept:
        saved.load_executable(list(mesh.devices.flat))
    return saved


def _checked(data: bytes, here: dict[str, Any]) -> _Saved:
    first, _, rest = data.partition(b"\n")
    if not first.startswith(_BEGIN):
        raise _Damaged("it holds no step, or was written by another version of lcm_jax")
    if first.removeprefix(_BEGIN) != hashlib.sha256(rest).hexdigest().encode():
        raise _Damaged("it is damaged: its content does not match its checksum")
    line, _, content = rest.partition(b"\n")
    header = json_file.parse(line, "its header", _KINDS)
    if missing := _KINDS.keys() - header.keys():
        raise _Damaged(f"its header has no {min(missing)!r}")
    made_for = header["made_for"]
    differing = [
        f"{name} {made_for.get(name)!r}, here {value!r}" for name, value in here.items() if made_for.get(name) != value
    ]
    if differing:
        raise UserError(f"it was compiled for another environment: {', '.join(differing)}")
    return _Saved(header, content[: header["step"]], content[header["step"] :])


@contextlib.contextmanager
def _damage() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # pickle and the runtimes raise many types
        reason = str(error).strip() or type(error).__name__
        raise _Damaged(f"this runtime can't load it: {reason.splitlines()[0][:200]}") from None


def _environment(mesh: Mesh) -> dict[str, Any]:
    """Returns what an executable depends on besides its program."""
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
