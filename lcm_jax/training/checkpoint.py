"""Saves and restores a run's complete state with Orbax, with a checksum per array.

    <workdir>/checkpoints/<step>/params ema opt_state counters     Orbax items
                                /meta                              JSON with a CRC: each leaf's shape, dtype and
                                                                   checksum, and the data position

Orbax does not detect flipped bits. A damaged checkpoint is skipped, and kept as `<step>.damaged`.
"""

import gc
import json
import sys
import zlib
from types import TracebackType
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from lcm_jax.errors import Unavailable, UserError, plain, say
from lcm_jax.host import files
from lcm_jax.parallel.processes import all_agree, is_first, meet
from lcm_jax.training import orbax_noise
from lcm_jax.training.hashing import mixed, places

FOLDER = "checkpoints"
COUNTERS = ("step", "skipped")
Leaves = dict[str, tuple[tuple[int, ...], str]]


class Damaged(Exception):
    """Raised when a checkpoint cannot be read or fails its checksum."""


def checksums(tree: Any) -> list[int]:
    """Returns a uint32 checksum per leaf: the sum of its words, each hashed with its index.

    Integer sums do not depend on order, so the sum is the same for every sharding and is computed on the devices. At
    a fixed index the hash is a bijection, so a change of a single word always changes the sum.
    """
    # One program per shape compiles faster than one for all leaves, since many share a shape. The leaves are summed
    # one at a time because virtual CPU devices deadlock when they reduce several arrays at once.
    return [int(jax.device_get(_checksum(leaf))) for leaf in jax.tree.leaves(tree)]


@jax.jit
def _checksum(x: jax.Array) -> jax.Array:
    bits = min(jnp.dtype(x.dtype).itemsize * 8, 32)  # a 64-bit value becomes two words on a new last axis
    words = x if x.dtype == jnp.bool_ else jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{bits}"))
    hashed = words.astype(jnp.uint32) ^ (places(words.shape) * jnp.uint32(0x9E3779B1))
    return jnp.sum(mixed(hashed), dtype=jnp.uint32)


def _items(state: dict[str, Any]) -> dict[str, Any]:
    """Returns the state as Orbax items, which can be restored separately, without the empty ones."""
    items = {name: state[name] for name in ("params", "ema", "opt_state") if jax.tree.leaves(state[name])}
    return {**items, "counters": {name: state[name] for name in COUNTERS}}


def _leaves(items: dict[str, Any]) -> Leaves:
    paths = jax.tree.leaves_with_path(items)
    return {jax.tree_util.keystr(path): (tuple(leaf.shape), str(leaf.dtype)) for path, leaf in paths}


def _crc(content: Any) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


class Checkpoints:
    """Saves and restores a run's state in `<workdir>/checkpoints`."""

    def __init__(self, workdir: epath.PathLike, *, keep_last: int = 3, keep_every: int = 0) -> None:
        """Args: the run's folder; how many of the newest are kept; which multiples are kept too (0: none)."""
        self.folder = files.absolute(workdir) / FOLDER
        self._options = ocp.CheckpointManagerOptions(
            max_to_keep=keep_last, keep_period=keep_every or None, create=True, cleanup_tmp_directories=True
        )
        self._open: ocp.CheckpointManager | None = None
        self._started: int | None = None  # step being written
        self._written: int | None = None  # newest step that this run wrote or restored
        orbax_noise.silence()

    @property
    def _manager(self) -> ocp.CheckpointManager:
        if self._open is None:
            with files.one_line(self.folder):
                self._open = ocp.CheckpointManager(self.folder, options=self._options)
        return self._open

    def newest_step(self) -> int | None:
        """Returns the newest step on disk, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: dict[str, Any], data_state: dict[str, Any]) -> None:
        """Copies the state to the host and writes it in the background; does nothing if the step is already saved.

        Raises: UserError if this save cannot start, or the previous one failed or was deleted.
        """
        if step in self._manager.all_steps():
            return
        self.wait()
        if self._written is not None:
            self.check_there(self._written)
        items = _items(state)
        sums = zip(_leaves(items).items(), checksums(items), strict=True)
        content = {"leaves": {name: [*leaf, value] for (name, leaf), value in sums}, "data": data_state}
        content = json.loads(json.dumps(content))  # a JSON round trip, so that the CRC matches on reading
        arguments = {name: ocp.args.StandardSave(item) for name, item in items.items()}
        meta = ocp.args.JsonSave({"content": content, "crc": _crc(content)})
        try:
            self._manager.save(step, args=ocp.args.Composite(**arguments, meta=meta), force=True)
        except Exception as error:
            raise self._failed(error) from None
        self._started = step

    def check_there(self, step: int) -> None:
        """Raises UserError, in the first process, unless the checkpoint of this step is on disk and finalized."""
        if is_first() and step not in finalized_steps(self.folder):
            raise UserError(
                f"the checkpoint of step {step} was deleted from {self.folder} during the run; put it back, or run "
                "the same command again: it resumes from the last remaining checkpoint"
            )

    def wait(self) -> None:
        """Waits until the pending checkpoint is on disk. Raises UserError if writing failed."""
        if self._open is None:
            return
        started, self._started = self._started, None
        try:
            self._open.wait_until_finished()
        except Exception as error:
            raise self._failed(error) from None
        self._written = started or self._written

    def close(self) -> None:
        """Waits for the pending checkpoint and stops the writer threads."""
        self.wait()
        if self._open is not None:
            self._open.close()
            self._open = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes; an error from the body takes precedence over an error from closing, which it may have caused."""
        failed = None
        try:
            self.close()
        except UserError as another:
            failed = another
        if error or failed:
            self._open = None
            with orbax_noise.while_reading():
                gc.collect()  # see `_restore`
        if failed and error is None:
            raise failed

    def _failed(self, error: Exception) -> UserError:
        steps = finalized_steps(self.folder)
        rest = f"the newest complete one is of step {steps[0]}" if steps else "there is no earlier one"
        kind = Unavailable if files.in_bucket(self.folder) else UserError  # a restart may succeed with a bucket
        return kind(f"a checkpoint could not be written to {self.folder}: {_line(error)}; {rest}")

    def restore_newest(self, like: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], int] | None:
        """Returns (state, data_state, step) of the newest undamaged checkpoint, or None if there are no checkpoints.

        Damaged newer ones are renamed to `<step>.damaged`, with a warning.

        Args:
          like: the state as jax.ShapeDtypeStruct, with the target shardings.

        Raises:
          UserError: the checkpoint is of another model, or all checkpoints are damaged.
        """
        damaged: dict[int, str] = {}
        for step in finalized_steps(self.folder):
            try:
                state, data_state = _read(self.folder / str(step), like)
            except Damaged as error:
                damaged[step] = str(error)
                continue
            if is_first():
                for bad, why in damaged.items():
                    say(
                        f"warning: the checkpoint of step {bad} is damaged ({why}); resuming from step {step}; the "
                        f"damaged one is kept as {self._set_aside(bad)}",
                        file=sys.stderr,
                    )
            meet("damaged checkpoints set aside")
            self._written = step
            return state, data_state, step
        if damaged:
            tried = "; ".join(f"step {step}: {why}" for step, why in damaged.items())
            raise UserError(
                f"{self.folder}: all checkpoints are damaged ({tried}); start in a new workdir, or move the folder away"
            )
        return None

    def _set_aside(self, step: int) -> epath.Path:
        target = self.folder / f"{step}.damaged"
        with files.one_line(target):
            if target.exists():
                target.rmtree()
            return (self.folder / str(step)).rename(target)


def finalized_steps(folder: epath.PathLike) -> list[int]:
    """Returns the steps of the finalized checkpoints, newest first.

    An interrupted save leaves a temporary name or, in a bucket, a folder without the object that Orbax writes last.
    """
    folder = epath.Path(folder)
    files.forget_listings(folder)
    with files.one_line(folder, "read"):  # an unreachable bucket must not look empty
        try:
            steps = [path for path in folder.iterdir() if path.name.isdigit()]
        except (FileNotFoundError, NotADirectoryError):
            return []
        if not files.in_bucket(folder):
            steps = [path for path in steps if path.is_dir()]
        return sorted((int(path.name) for path in steps if ocp.utils.is_checkpoint_finalized(path)), reverse=True)


def restore_params(
    workdir: epath.PathLike, which: str, step: int | None = None
) -> tuple[dict[str, dict[str, np.ndarray]], int]:
    """Reads only the weights of a run, as host arrays.

    Args:
      which: "student" (trained weights) or "ema" (their moving average).
      step: step of the checkpoint; by default the newest, which must not be damaged.

    Returns: {component: {path: float32 array}}, and the step.
    Raises: UserError if there is no such checkpoint, it is damaged, or it has no EMA.
    """
    orbax_noise.silence()
    folder = files.absolute(workdir) / FOLDER
    steps = finalized_steps(folder)
    if not steps:
        raise UserError(f"{workdir} holds no checkpoint yet; train first")
    if step is not None and step not in steps:
        raise UserError(f"{workdir} holds no checkpoint of step {step}; it has {', '.join(map(str, steps[::-1]))}")
    step = steps[0] if step is None else step
    item = {"student": "params", "ema": "ema"}[which]
    path = folder / str(step)
    try:
        content = _read_meta(path)
        prefix = f"['{item}']"
        like: dict[str, dict[str, jax.ShapeDtypeStruct]] = {}
        for name, (shape, dtype, _) in content["leaves"].items():
            if name.startswith(prefix):
                component, leaf = name.removeprefix(prefix)[2:-2].split("']['")
                sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
                like.setdefault(component, {})[leaf] = jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
        if not like:
            raise UserError(f"{workdir} has no EMA (config.ema.decay is 0); export --which=student")
        params = _read_items(path, {item: like}, content)[item]
    except Damaged as error:
        older = f"; --step={steps[1]} is an older one" if len(steps) > 1 and step == steps[0] else ""
        raise UserError(f"the checkpoint of step {step} in {workdir} is damaged ({error}){older}") from None
    return jax.device_get(params), step


def _read(path: epath.Path, like: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    content = _read_meta(path)
    wanted = _items(like)
    _check_same_model(path, {name: (tuple(s), d) for name, (s, d, _) in content["leaves"].items()}, _leaves(wanted))
    items = _read_items(path, wanted, content)
    state = {name: items.get(name, like[name]) for name in ("params", "ema", "opt_state")}  # absent: has no leaves
    return {**state, **items["counters"]}, content["data"]


def _read_meta(path: epath.Path) -> dict[str, Any]:
    meta = _restore(path, {"meta": ocp.args.JsonRestore()})["meta"]
    if not isinstance(meta, dict) or _crc(meta.get("content")) != meta.get("crc"):
        raise Damaged("its metadata does not match its checksum")
    return meta["content"]


def _read_items(path: epath.Path, like: dict[str, Any], content: dict[str, Any]) -> dict[str, Any]:
    items = _restore(path, {name: ocp.args.StandardRestore(item) for name, item in like.items()})
    for leaf, found in zip(_leaves(items), checksums(items), strict=True):
        if content["leaves"][leaf][2] != found:
            raise Damaged(f"{leaf} does not match its checksum")
    return items


def _restore(path: epath.Path, arguments: dict[str, ocp.args.CheckpointArgs]) -> dict[str, Any]:
    """Restores these items of a checkpoint.

    Raises Damaged, in all processes, if Orbax fails in any. A JaxRuntimeError (device out of memory) passes through.
    """
    restored, reason = {}, ""
    with orbax_noise.while_reading():
        try:
            with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
                restored = dict(checkpointer.restore(path, ocp.args.Composite(**arguments)).items())
        except jax.errors.JaxRuntimeError:
            raise
        except Exception as error:  # Orbax raises many types, including bare Exception
            reason = _line(error)
        if reason:
            gc.collect()  # collects Orbax's abandoned tasks where their warnings are suppressed
    if not all_agree(not reason):
        raise Damaged(reason or "another process can't read it")
    return restored


def _check_same_model(path: epath.Path, stored: Leaves, wanted: Leaves) -> None:
    for name in sorted(stored.keys() | wanted.keys()):
        found, expected = stored.get(name), wanted.get(name)
        if found != expected:
            raise UserError(
                f"{path} is a checkpoint of another model: {name} is {_describe(found)} in the checkpoint, "
                f"{_describe(expected)} in this run"
            )


def _describe(leaf: tuple[tuple[int, ...], str] | None) -> str:
    return f"{leaf[1]} {leaf[0]}" if leaf else "absent"


def _line(error: Exception) -> str:
    """Formats an error as one line, without TensorStore's array spec; cuts the middle of a long message."""
    text = plain(f"{type(error).__name__}: {error}", 10_000).partition(" [tensorstore_spec")[0]
    return text if len(text) <= 240 else f"{text[:50]} ... {text[-180:]}"
