"""The training loop: one for all objectives, families and numbers of processes."""

import dataclasses
import math
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh
from rich.console import Console

from lcm_jax import config as config_lib
from lcm_jax.config import Config
from lcm_jax.data.batches import batches
from lcm_jax.data.sources import Source, open_data
from lcm_jax.errors import UserError, is_out_of_memory, plain, say
from lcm_jax.host import compile_cache, files, interrupts
from lcm_jax.host.images import write_png
from lcm_jax.interop.folder import Folder
from lcm_jax.interop.tokenizer import load_tokenizer
from lcm_jax.monitor.profiler import ProfileConfig, Profiler
from lcm_jax.monitor.progress import Progress
from lcm_jax.monitor.tensorboard import Metrics
from lcm_jax.parallel import agreement
from lcm_jax.parallel.mesh import check_batch, found_devices, make_mesh
from lcm_jax.parallel.partition import place
from lcm_jax.parallel.processes import is_first, meet
from lcm_jax.training import identity
from lcm_jax.training.checkpoint import FOLDER, Checkpoints, finalized_steps
from lcm_jax.training.losses import make_losses
from lcm_jax.training.metrics import computed, losses_in
from lcm_jax.training.networks import frozen_params, initial_params, make_parts, read_model
from lcm_jax.training.previews import make_preview, sheet
from lcm_jax.training.program import make_program
from lcm_jax.training.saved_step import Ahead
from lcm_jax.training.workdir import Held, hold


@dataclasses.dataclass(frozen=True)
class Result:
    """How a run ended: at which step, and the signal that stopped it early (0: none)."""

    step: int
    signal: int


def train(
    config: Config,
    workdir: epath.PathLike,
    compiled: str | None = None,
    devices: Sequence[Any] | None = None,
) -> Result:
    """Trains until `config.steps`, or until SIGINT or SIGTERM, and leaves a checkpoint of the last step in `workdir`.

    Args:
      config, workdir: of the run.
      compiled: a file of `plan --save`, from which the step is taken if it fits.
      devices: that train; by default all that there are, of all processes.

    Raises:
      UserError: a mistake in the configuration, the folder, the data or the workdir; processes that differ in these; a
        folder or data that changed since the run began; a workdir that another run holds, or that is deleted, moved or
        taken in mid-run; a loss that stays non-finite.
    """
    workdir = epath.Path(workdir)
    # ---- the machine
    # before anything in which processes that differ would wait for each other
    agreement.agree(config_lib.facts(config) | identity.of_code() | agreement.settings())
    agreement.agree(agreement.of_devices(found_devices()))
    mesh = make_mesh(config.mesh, devices)
    check_batch(config.batch_size, config.accumulate, mesh)
    if config.profile.steps and config.profile.steps[1] > config.steps:
        raise UserError(f"config.profile.steps={config.profile.steps} goes beyond the last step, {config.steps}")
    with hold(workdir) as held, _out_of_memory_in_one_line(config, mesh):
        return _train(config, workdir, compiled, mesh, held)


@contextmanager
def _out_of_memory_in_one_line(config: Config, mesh: Mesh) -> Iterator[None]:
    """Raises UserError with what may help, where XLA has no memory for the step or its arguments."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not is_out_of_memory(error):
            raise
        why = plain(str(error).splitlines()[0], 200)
        options = [f"--config.batch_size={config.batch_size // 2}"] if config.batch_size > mesh.size else []
        if config.batch_size % (2 * config.accumulate * mesh.size) == 0:
            options = [f"--config.accumulate={2 * config.accumulate}"]
        options += ["--config.model.remat=block"] if config.model.remat == "none" else []
        options += ["--config.mesh.fsdp=-1"] if mesh.size > config.mesh.fsdp > 0 else []
        raise UserError(
            f"out of memory on {mesh.devices.flat[0].device_kind}: {why}; try {' or '.join([*options, 'a LoRA'])}; "
            "python -m lcm_jax.plan --topology=local, with the same options, shows what takes it"
        ) from None


def _train(config: Config, workdir: epath.Path, compiled: str | None, mesh: Mesh, held: Held) -> Result:
    """Trains in a workdir that this run holds."""
    begun = _claim(workdir, config)
    ahead = Ahead(config, mesh, compiled)

    # ---- models and state
    folder, source = read_model(config), open_data(config.data)
    inputs = _check_inputs(workdir, config, folder, source, begun)
    tokenizer = load_tokenizer(folder)
    parts = make_parts(config, folder, tokenizer)
    program = make_program(config, parts, mesh)
    checkpoints = Checkpoints(workdir, keep_last=config.checkpoint.keep_last, keep_every=config.checkpoint.keep_every)
    restored = checkpoints.restore_newest(program.state)
    if restored:
        state, data_state, start = restored
        if is_first() and start < config.steps:
            say(f"Resuming after step {start}")
    else:
        params = place(initial_params(config, parts, folder), program.state["params"])
        state, data_state, start = program.start(params), None, 0
    if start >= config.steps:
        checkpoints.close()
        return Result(start, 0)
    profiled = config.profile
    if profiled.steps and profiled.steps[1] <= start:
        if is_first():
            warnings.warn(
                f"config.profile.steps={profiled.steps} has no effect: the run resumes after step {start}", stacklevel=2
            )
        profiled = ProfileConfig()
    frozen_on_host = frozen_params(parts, folder)
    for name, component in folder.components.items():
        if name != "vae":  # the data's reader compares it
            component.params.clear()  # each array is freed once it is on the devices
    frozen = place(frozen_on_host, program.frozen)

    data = batches(
        config.data,
        tokenize=tokenizer,
        batch_size=config.batch_size,
        seed=config.seed,
        rows=program.rows,
        vae=folder.components["vae"].params,
        vae_config=folder.components["vae"].config,
        source=source,
        sizes=parts.family.uses_sizes,
    )
    if data_state is not None:
        data.set_state(data_state)
    preview = make_preview(config, parts, tokenizer)
    metrics = Metrics(workdir, start_step=start) if is_first() else None
    console = Console(quiet=not is_first())
    console.print(f"Training on {mesh.size} × {mesh.devices.flat[0].device_kind}", highlight=False, markup=False)
    progress = Progress(config.steps, start, config.batch_size, console, compiled=compile_cache.summary)
    losses, unwritten = make_losses(parts), {}

    def read(done: int, values: dict[str, jax.Array], waited: float) -> int:
        """Waits for that step's metrics and passes them on; returns the signal that any process has received, or 0.

        Raises: UserError if the loss stays non-finite.
        """
        scalars = {name: float(value) for name, value in jax.device_get(values).items()}
        received, skipped = int(scalars.pop("stop")), scalars.pop("skipped")
        scalars = computed(scalars, losses, done - 1)
        rate = progress.update(done, losses_in(scalars, losses))
        unwritten.update(scalars, skipped=skipped)  # so that a rare update has a point too, that of its last time
        if metrics and (done % config.log.every == 0 or done == config.steps):
            held.check()
            speed = {"images_per_second": rate} if math.isfinite(rate) else {}  # the first step has none
            metrics.scalars(done, {**unwritten, **speed, "data_wait_seconds": waited})
            unwritten.clear()
        if skipped >= config.max_skipped:
            checkpoints.wait()
            raise UserError(_diverged(workdir, config, done, checkpoints.newest_step()))
        return received

    # ---- the loop: dispatch step n, then read what step n-1 said
    with (
        checkpoints,
        closing(data),
        progress,
        Profiler(profiled, workdir) as profiler,
        closing(metrics) if metrics else nullcontext(),
        ExitStack() as steps_run,
    ):
        step = ahead.step(program.lower())
        meet("step compiled")  # it may take one longer than the devices wait for each other
        # until here there was nothing to save, and a signal ended the run at once
        stop = steps_run.enter_context(interrupts.as_flag())
        pending, received, last, done, shown_before = None, 0, False, start, False
        while not last:
            before = time.perf_counter()
            batch = program.put(next(data))
            waited = time.perf_counter() - before
            with profiler.step(done + 1):
                state, values = step(state, frozen, batch, program.put_stop(stop.signal))
            if pending:
                received = read(*pending)
            done += 1
            pending = (done, values, waited)

            last = done == config.steps or received != 0
            save = last or done % config.checkpoint.every == 0
            show = config.log.samples_every and (done % config.log.samples_every == 0 or done == config.steps)
            if save or show or profiler.is_last(done):
                received = read(*pending) or received  # so that no state is saved whose loss has not been seen
                pending, last = None, last or received != 0
            if profiler.is_last(done):
                held.check()
                profiler.stop()
            if save or last:
                held.check()
                _put_back(workdir, config, inputs)
                if metrics:
                    metrics.flush()
                checkpoints.save(done, state, data.get_state())
            if show:
                if not shown_before:
                    progress.say("Compiling the samples ...")
                shown_before = True
                images = preview(*program.whole((state["ema"] or state["params"], frozen)))
                held.check()
                if metrics:
                    shown, path = sheet(config, parts, images, done), workdir / "samples" / f"step_{done:06d}.png"
                    metrics.images(done, "samples", shown[None])
                    write_png(path, shown)
                    progress.say(f"Samples of step {done}: {path}")
        checkpoints.wait()  # here, where a second SIGTERM does not cut the last one short
    held.check()
    _put_back(workdir, config, inputs)
    checkpoints.check_there(done)
    return Result(done, received if done < config.steps else 0)


def _claim(workdir: epath.Path, config: Config) -> bool:
    """Makes the workdir this run's own, or checks that it is; one without a checkpoint has nothing to lose.

    Returns: whether the run has begun already. Then config.json is not written before its inputs are checked.
    """
    for name in () if files.in_bucket(workdir) else (FOLDER, "samples", "tensorboard"):
        if (workdir / name).exists() and not (workdir / name).is_dir():
            raise UserError(f"--workdir={workdir}: {workdir / name} is a file; move it away, or choose another folder")
    begun = bool(finalized_steps(workdir / FOLDER))
    if begun:
        config_path = workdir / "config.json"
        with files.one_line(config_path, "read"):
            there = config_path.exists()
        if not there:
            raise UserError(
                f"--workdir={workdir} has checkpoints, but no config.json; put it back (the run's original command "
                "writes the same file to a new --workdir), or choose another --workdir"
            )
        stored = config_lib.load_resolved(workdir)
        config_lib.check_same_run(config, stored, workdir, places=not identity.recorded(workdir))
    meet("config.json read")
    if not begun:
        _write_config(workdir, config)
    return begun


def _write_config(workdir: epath.Path, config: Config) -> None:
    if not is_first():
        return
    try:
        files.write(workdir / "config.json", config_lib.resolved(config))
    except UserError as error:
        raise type(error)(f"--workdir={workdir}: {error}") from None


Inputs = dict[str, identity.Identity]


def _check_inputs(workdir: epath.Path, config: Config, folder: Folder, source: Source, begun: bool) -> Inputs:
    """Returns what the run reads, recorded in the workdir.

    Raises: UserError unless folder, data and workdir are the same on all processes, and as when the run began.
    """
    now = {"model": identity.of_folder(folder), "data": identity.of_data(source)}
    problem = identity.changed(workdir, now) if begun else ""
    agreement.agree(now["model"].facts | now["data"].facts, problem)
    if is_first():
        identity.record(workdir, now)
    if begun:
        _write_config(workdir, config)
    meet("config.json written")
    agreement.agree({"content of config.json in --workdir": identity.of_config(workdir)})
    return now


def _put_back(workdir: epath.Path, config: Config, inputs: Inputs) -> None:
    """Writes config.json and the record of the inputs again where they were deleted in mid-run.

    Without them the run could be neither exported nor resumed.
    """
    if not is_first():
        return
    files.forget_listings(workdir)
    for name, write in (
        ("config.json", lambda: _write_config(workdir, config)),
        (identity.RECORD, lambda: identity.record(workdir, inputs)),
    ):
        with files.one_line(workdir / name, "read"):
            there = (workdir / name).exists()
        if not there:
            warnings.warn(f"{workdir / name} was deleted during the run; writing it again", stacklevel=2)
            write()


def _diverged(workdir: epath.Path, config: Config, step: int, newest: int | None) -> str:
    kept = f"the newest checkpoint in {workdir}/checkpoints is of step {newest}" if newest else "there is no checkpoint"
    return (
        f"loss or gradient was not finite in {config.max_skipped} steps in a row, up to step {step}; {kept}; "
        f"try a smaller config.optimizer.learning_rate (now {config.optimizer.learning_rate:g}) in a new workdir"
    )
