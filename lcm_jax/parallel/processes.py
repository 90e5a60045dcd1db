"""The processes of a run: finds this process's place among them, and starts, fails and ends them together."""

import argparse
import atexit
import contextlib
import os
import socket
import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import NamedTuple, Self

import jax
from jax._src.clusters import ClusterEnv  # used by jax.distributed.initialize; it has no public name
from jax.experimental import multihost_utils

from lcm_jax.errors import Unavailable, UserError, plain
from lcm_jax.host import interrupts
from lcm_jax.parallel.agreement import Disagreement, agree
from lcm_jax.parallel.roll_call import RollCall
from lcm_jax.parallel.roll_list import TOKEN

WAIT = 300.0  # seconds to wait for missing processes
TELL = 20.0  # seconds to wait for the other processes when reporting an error to them
LATER = 30  # seconds by which JAX's own timeout, which ends in a stack dump, exceeds the wait for its port
# Distance of the roll call's port below the coordinator's: among the hosts of a TPU pod, Google Cloud's firewall rule
# opens 8474 beside JAX's 8476.
ROLL_CALL = 2
# Under SLURM and mpirun JAX derives its port from the job's number, starting at JOBS. The roll call's is BELOW_JOBS
# lower, where it meets neither other jobs' ports nor Linux's ephemeral ports (32768 and up).
JOBS, BELOW_JOBS = 2**16 - 2**12, 2**15
CLUSTERS = ("GkeTpuCluster", "GceTpuCluster", "SlurmCluster", "OmpiCluster")  # in which JAX detects the processes


class Place(NamedTuple):
    """A process's place in the run: HOST:PORT of process 0, its number, the number of processes, its local GPUs."""

    coordinator: str
    process: int
    count: int
    local_devices: list[int] | None = None


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that give this process's place, for machines on which it can't be detected."""
    group = parser.add_argument_group("several processes (detected on TPU pods and under GKE, SLURM and mpirun)")
    group.add_argument(
        "--coordinator",
        metavar="HOST:PORT",
        help=f"address of process 0; PORT - {ROLL_CALL} must be free too (PORT - {BELOW_JOBS} if PORT is at "
        f"least {JOBS})",
    )
    group.add_argument("--num-processes", type=int, metavar="N", help="number of processes of the run")
    group.add_argument("--process-id", type=int, metavar="I", help="number of this process, from 0")
    group.add_argument(
        "--wait", type=float, default=WAIT, metavar="SECONDS", help=f"timeout for missing processes (default: {WAIT:g})"
    )


def find(coordinator: str | None, count: int | None, process: int | None, wait: float = WAIT) -> Place | None:
    """Returns this process's place, from the options or from the cluster it runs in; None for a single process.

    Raises: UserError if options are incomplete or out of range, or the cluster's environment can't be read.
    """
    if not 0 < wait < float("inf"):
        raise UserError(f"--wait={wait:g}; it must be a positive number of seconds")
    given = {"--coordinator": coordinator, "--num-processes": count, "--process-id": process}
    if coordinator is None and count is None and process is None:
        return _of_cluster(wait)
    if coordinator is None or count is None or process is None:
        missing = ", ".join(name for name, value in given.items() if value is None)
        raise UserError(f"{missing} is missing; give all or none of {', '.join(given)}")
    _check_address(coordinator, f"--coordinator={coordinator}")
    if count < 1:
        raise UserError(f"--num-processes={count}; it must be at least 1")
    if not 0 <= process < count:
        raise UserError(f"--process-id={process} must be in 0..{count - 1} for {count} processes")
    return Place(coordinator, process, count) if count > 1 else None


def _check_address(address: str, what: str) -> None:
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not ROLL_CALL < int(port) < 65536:
        raise UserError(f"{what} is not HOST:PORT, as in 10.0.0.1:8476")


def roll_call_port(port: int) -> int:
    """Returns the roll call's port for a coordinator's port."""
    return port - (BELOW_JOBS if port >= JOBS else ROLL_CALL)


def _of_cluster(wait: float) -> Place | None:
    kinds = [kind for kind in ClusterEnv._cluster_types if kind.__name__ in CLUSTERS and kind.is_env_present()]
    if not kinds:
        if os.environ.get("OMPI_COMM_WORLD_SIZE", "1") != "1":
            raise UserError(
                "mpirun started several processes, but this version does not tell JAX their addresses; give "
                "--coordinator, --num-processes and --process-id=$OMPI_COMM_WORLD_RANK"
            )
        return None
    try:
        if kinds[0].get_process_count() == 1:
            return None
        coordinator, count, process, local = ClusterEnv.auto_detect_unset_distributed_params(
            None, None, None, None, None, int(wait)
        )
    except (ValueError, KeyError, IndexError, AttributeError) as error:
        raise UserError(
            f"JAX can't read the environment of {kinds[0].__name__.removesuffix('Cluster')}: {error}; "
            "fix it, or give --coordinator, --num-processes and --process-id"
        ) from None
    if coordinator is None or count is None or process is None:
        raise UserError("JAX can't detect this process's number; give --coordinator, --num-processes and --process-id")
    _check_address(coordinator, f"{coordinator}, from this cluster's environment (JAX_COORDINATOR_PORT?),")
    return Place(coordinator, process, count, list(local) if local else None)


class Processes:
    """Connects the processes of a run; a context manager inside which JAX sees the devices of all processes."""

    def __init__(self, place: Place | None, wait: float = WAIT) -> None:
        """Waits for the other processes. Raises UserError if they can't be reached."""
        self._roll_call: RollCall | None = None
        self._acts = contextlib.ExitStack()
        if place is None:
            return
        host, _, port = place.coordinator.rpartition(":")
        how = "Start the same command for them"
        if place.local_devices is None:
            how += f", each with its own number if passed (--coordinator={place.coordinator} --process-id=…)"
        self._roll_call = RollCall(
            f"{host}:{roll_call_port(int(port))}",
            place.process,
            place.count,
            wait=wait,
            say=_say,
            how=how,
            on_loss=self._end,
            token=os.environ.get(TOKEN, "").strip(),
        )
        jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM from the training loop
        try:
            if place.process:
                _reach(host, int(port), wait)
            jax.distributed.initialize(
                place.coordinator,
                place.count,
                place.process,
                local_device_ids=place.local_devices,
                initialization_timeout=int(wait) + LATER,
                cluster_detection_method="deactivate",
                coordinator_bind_address=f"{at}:{port}" if (at := self._roll_call.interface) else None,
            )
        except (RuntimeError, OSError) as error:
            why = f"JAX can't connect to {place.coordinator}: {str(error).strip().splitlines()[-1]}"
            self._roll_call.leave(why)
            raise Unavailable(why) from None

    def __enter__(self) -> Self:
        if call := self._roll_call:
            self._acts.enter_context(interrupts.last_act(lambda error: call.leave(interrupts.word(error))))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._acts.close()
        if not self._roll_call:
            return
        if error is None or isinstance(error, Disagreement):  # the others raise it as well
            jax.distributed.shutdown()  # waits for the others
            self._roll_call.leave()
            return
        why = " ".join(f"{error}".split()) or type(error).__name__
        if isinstance(error, KeyboardInterrupt):
            why = interrupts.word(error)
        self._roll_call.leave(why)
        # at exit JAX would wait for the others, which are ending as well
        atexit.register(_exit, 2 if type(error) is UserError else interrupts.EXIT_CODES.get(why, 1))

    @staticmethod
    def _end(why: str) -> None:
        """Ends this process, whose main thread may wait forever inside JAX for a lost process.

        A signal to one process stops the run, so the others end with its code, which launchers read.
        """
        _say(f"error: {why}; all processes end. Restart them: the run resumes from its last checkpoint.")
        _exit(interrupts.EXIT_CODES.get(why.rpartition("has ended: ")[2], 1))


def tell(place: Place | None, problem: UserError) -> None:
    """Reports to the other processes why this one can't start, then raises Disagreement.

    The others receive the problem in their first `agree`, and all end with the same message. Returns if there are no
    other processes or they do not connect within `TELL` seconds.
    """
    if place is None:
        return
    try:
        with Processes(place, TELL):
            agree({}, problem)
    except Disagreement:
        raise
    except Unavailable:  # they did not connect
        return


def find_leniently(argv: Sequence[str]) -> Place | None:
    """Returns this process's place like `find`, ignoring errors in other arguments; None if it can't be found."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    add_options(parser)
    own = ("--coordinator", "--num-processes", "--process-id")
    # keeps only these options; a value in an argument of its own does not begin with --
    chosen = [
        text
        for before, text in zip(["", *argv], argv, strict=False)
        if not text.endswith("=--") and (text.split("=")[0] in own or (before in own and not text.startswith("--")))
    ]
    try:
        args, _ = parser.parse_known_args(chosen)
        return find(args.coordinator, args.num_processes, args.process_id)
    except (UserError, argparse.ArgumentError):
        return None


def _reach(host: str, port: int, wait: float) -> None:
    """Waits until JAX's coordinator accepts connections, else raises OSError; JAX would end with a stack dump."""
    deadline = time.monotonic() + wait
    while True:
        try:
            socket.create_connection((host, port), timeout=max(0.1, deadline - time.monotonic())).close()
            return
        except OSError as error:
            if time.monotonic() >= deadline:
                why = error.strerror or error
                raise OSError(f"{why}; process 0 is running, so is its port {port} closed to this host?") from None
        time.sleep(0.2)


def _say(line: str) -> None:
    print(f"lcm-jax: {plain(line)}", file=sys.stderr, flush=True)  # it may contain text from another process


def _exit(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def is_first() -> bool:
    """Returns whether this is process 0, which writes files and prints for all."""
    return jax.process_index() == 0


def meet(name: str) -> None:
    """Waits, without a time limit, until all processes reach this place in the program.

    The barrier uses the coordinator: a collective operation on CPUs (Gloo) would time out after 30 seconds.
    """
    agree({"place in the program": name})


def all_agree(flag: bool) -> bool:
    """Returns whether `flag` is true in all processes; all of them must call it."""
    if jax.process_count() == 1:
        return flag
    meet("all_agree")  # a process may have read data for longer than the collective's timeout
    return bool(multihost_utils.process_allgather(jax.numpy.asarray(flag)).all())
