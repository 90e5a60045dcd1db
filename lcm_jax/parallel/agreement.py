"""Checks that all processes of a run were started with the same settings, and ends them together if not.

The comparison uses the key-value store of JAX's coordinator, which needs no device. So it can run before any collective
operation in which processes with different settings would deadlock. Each process writes one short text and reads two.
Settings are compared by hash; only a process whose hash differs reads them in full.
"""

import hashlib
import itertools
import json
import os
import re
import socket
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax._src import distributed  # the store has no public name; Orbax imports it the same way

from lcm_jax.errors import Unavailable, UserError, plain

PATIENCE = 60_000  # milliseconds per request, which is then repeated; the roll call detects lost processes
# flags that are not compared: those that hold paths, and the number of CPU devices, which `of_devices` compares
_OWN = re.compile(
    r"(^|[-_])(dump|cache|dirs?|directory|files?|path|autotune_results)([-_]|$)|_host_platform_device_count$"
)
_call = itertools.count()  # all processes call `agree` in the same order


class Disagreement(UserError):
    """An error that every process of the run raises at the same place and with the same message."""


class Postponed(Disagreement, Unavailable):
    """A Disagreement about something temporary; a retry may succeed."""


def agree(facts: Mapping[str, str], problem: str | UserError = "") -> None:
    """Waits for all processes and checks that they have the same facts and no problem. All processes must call it.

    Args:
      facts: {name: value} of what must be the same in all processes.
      problem: why this process can't continue; a problem in one process ends all of them.

    Raises:
      Disagreement: in all processes (Postponed if the problem is Unavailable). A single process raises its own problem.
    """
    run = distributed.global_state
    if run.client is None or (run.num_processes or 1) == 1:
        if problem:
            raise problem if isinstance(problem, UserError) else UserError(problem)
        return
    key, me = f"lcm_jax/agree/{next(_call)}", run.process_id
    here = json.dumps(dict(facts), sort_keys=True)
    host = socket.gethostname()
    if me == 0:
        run.client.key_value_set(f"{key}/facts", json.dumps({"host": host, "facts": here}))
        run.client.key_value_set(f"{key}/hash", _hash(here))
    report = {
        "process": f"process {me} on {host}",
        "problem": str(problem),
        "later": isinstance(problem, Unavailable),
        "difference": "",
    }
    if me and not problem and _get(run.client, f"{key}/hash") != _hash(here):
        first = json.loads(_get(run.client, f"{key}/facts"))
        report["difference"] = _difference(
            facts, json.loads(first["facts"]), f"{me} on {host}", f"0 on {first['host']}"
        )
    if me:
        run.client.key_value_set(f"{key}/{me}", json.dumps(report))
    else:
        others = [json.loads(_get(run.client, f"{key}/{i}")) for i in range(1, run.num_processes)]
        run.client.key_value_set(f"{key}/verdict", json.dumps(_verdict([report, *others])))
    why, later = json.loads(_get(run.client, f"{key}/verdict"))
    if why:
        raise (Postponed if later else Disagreement)(why)


def settings() -> dict[str, str]:
    """Returns the JAX options and compiler flags that must match in all processes, without host-specific flags."""
    names = ("enable_x64", "default_matmul_precision", "default_prng_impl", "threefry_partitionable")
    return {f"jax_{name}": str(getattr(jax.config, f"jax_{name}")) for name in names} | {
        name: _flags(os.environ.get(name, "")) for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
    }


def of_devices(devices: Sequence[Any]) -> dict[str, str]:
    """Returns the number, kind and runtime version of this process's devices among `devices`.

    JAX waits for all processes when it initializes its devices, so compare the settings first.
    """
    local = [device for device in devices if device.process_index == jax.process_index()]
    kinds = sorted({f"{device.device_kind} ({device.platform})" for device in local})
    return {
        "devices per process": f"{len(local)} {', '.join(kinds)}",
        "runtime version of the devices": local[0].client.platform_version if local else "none",
    }


def _flags(given: str) -> str:
    """Returns flags sorted by name, the last value of each, without the host-specific ones."""
    flags = {flag.partition("=")[0]: flag for flag in given.split() if flag.startswith("-")}
    return " ".join(flags[name] for name in sorted(flags) if not _OWN.search(name))


def _difference(mine: Mapping[str, str], theirs: Mapping[str, str], me: str, first: str) -> str:
    """Describes the first fact that differs, with both values, and counts the others."""
    names = [name for name in {**theirs, **mine} if mine.get(name) != theirs.get(name)]
    name, more = names[0], f" (and {len(names) - 1} more)" if len(names) > 1 else ""
    here, there = (plain(of.get(name, "nothing"), 80) for of in (mine, theirs))
    return f"{plain(name, 100)} differs{more}: process {me} has {here}, process {first} has {there}"


def _verdict(reports: list[dict[str, Any]]) -> tuple[str, bool]:
    """Returns (the message that all processes raise, or "", and whether a retry may succeed).

    Problems take precedence over differences, and lower process numbers over higher ones.
    """
    if problems := [report for report in reports if report["problem"]]:
        why = problems[0]["problem"]
        of_all = all(report["problem"] == why for report in reports)
        return why if of_all else f"{problems[0]['process']}: {why}", problems[0]["later"]
    if differences := [report["difference"] for report in reports if report["difference"]]:
        more = f"; {len(differences) - 1} more processes differ" if len(differences) > 1 else ""
        return f"{differences[0]}{more}; start all processes with the same options, code, model and data", False
    return "", False


def _get(client: Any, key: str) -> str:
    while True:
        try:
            return client.blocking_key_value_get(key, PATIENCE)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
