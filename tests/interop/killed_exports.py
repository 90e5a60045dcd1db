"""Kills exports, in separate processes, at each of their file system events; run by test_killed_exports.

python killed_exports.py MODEL FOLDER MOMENTS: prints the number of moments it tried, then the failures, or "ok".
"""

import os
import pathlib
import shutil
import signal
import sys

import numpy as np
from safetensors.numpy import load_file

from lcm_jax.adapters.lora import A, Adapter, B
from lcm_jax.interop import replace
from lcm_jax.interop.folder import Folder, read_folder
from lcm_jax.interop.lora.file import write_lora
from lcm_jax.interop.trained_folder import write_trained_folder

EVENTS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.chmod", "shutil.rmtree", "fcntl.flock"}
OLD, NEW = 1.0, 2.0
Content = dict[str, bytes]


def content(out: pathlib.Path) -> Content:
    """Returns all files of a folder, or the tensors of a file; {} if it does not exist."""
    if out.is_file():  # the order in a header varies, so its bytes do
        return {key: array.tobytes() for key, array in load_file(out).items()}
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def write_model(source: Folder, out: pathlib.Path, value: float) -> None:
    params = {path: np.full_like(array, value) for path, array in source.components["vae"].params.items()}
    write_trained_folder(source, {"vae": params}, out)


def write_adapter(source: Folder, out: pathlib.Path, value: float) -> None:
    params = {"mid_block.resnets.0.conv1" + A: np.full((3, 3, 16, 2), value, np.float32)}
    params["mid_block.resnets.0.conv1" + B] = np.full((1, 1, 2, 16), value, np.float32)
    write_lora(out, {"unet": Adapter(params, {"mid_block.resnets.0.conv1": 2.0})})


def in_process(write, *arguments, at: int = -1, kill: signal.Signals = signal.SIGKILL) -> int:
    """Runs `write` in a process that is killed at its file system event number `at`; returns the number of events."""
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        count = 0

        def hook(event: str, _) -> None:
            nonlocal count
            if event in EVENTS:
                if count == at:
                    os.kill(os.getpid(), kill)
                count += 1

        sys.addaudithook(hook)
        try:
            write(*arguments)
            os.write(send, str(count).encode())
        finally:
            os._exit(0)
    os.close(send)
    with os.fdopen(receive) as pipe:
        counted = pipe.read()
    _, status = os.waitpid(child, 0)
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == kill
    assert killed if at >= 0 else counted, f"the export at {at} ended with {status}"
    return int(counted or 0)


def faults(write, read, source: Folder, out: pathlib.Path, moments: int, replaces: bool) -> list[str]:
    """Kills the export of the new model at about `moments` places, over the old one or over nothing."""
    complete = {}
    for value in (NEW, OLD):
        write(source, out, value)
        complete[value] = content(out)
    neighbours = sorted(os.listdir(out.parent))
    old = out.parent.parent / f"old-{len(os.listdir(out.parent.parent))}"
    out.rename(old)
    if replaces:
        put(old, out)
    events = in_process(write, source, out, NEW)
    places = sorted({*range(0, events, max(1, events // moments)), *range(max(0, events - 12), events)})
    found = []
    for place in places:
        shutil.rmtree(out) if out.is_dir() else out.unlink(missing_ok=True)
        if replaces:
            put(old, out)
        in_process(write, source, out, NEW, at=place, kill=(signal.SIGKILL, signal.SIGTERM)[place % 2])
        where = f"{out.name}, event {place} of {events}{', replaced' * replaces}"
        read(out)
        if content(out) not in ([complete[OLD], complete[NEW]] if replaces else [{}, complete[NEW]]):
            found.append(f"{where}: {sorted(content(out))} is left of it")
        write(source, out, NEW)
        if content(out) != complete[NEW] or sorted(os.listdir(out.parent)) != neighbours:
            found.append(f"{where}: the next export leaves {sorted(os.listdir(out.parent))}")
    print(out.name, len(places), "moments")
    return found


def put(old: pathlib.Path, out: pathlib.Path) -> None:
    shutil.copytree(old, out) if old.is_dir() else shutil.copyfile(old, out)


def main() -> None:
    source, folder, moments = read_folder(sys.argv[1]), pathlib.Path(sys.argv[2]), int(sys.argv[3])
    (folder / "outs").mkdir()
    os.fsync = lambda descriptor: None  # takes time, and matters only when the power fails
    found: list[str] = []
    for replaces in (False, True):
        found += faults(write_model, lambda out: None, source, folder / "outs/model", moments, replaces)
    found += faults(write_adapter, lambda out: None, source, folder / "outs/x.safetensors", moments, True)
    replace.exchange = lambda first, second: False  # as on a system that can't: then a reader puts the old one back
    found += faults(write_model, read_folder, source, folder / "outs/model", moments, True)
    print("\n".join(found) or "ok")


if __name__ == "__main__":
    main()
