"""Evaluation rows of the teacher, shipped with the package and tied to the teacher's files by a hash."""

import hashlib
import os
import pathlib
import platform
from collections.abc import Callable
from typing import Any

import jax

from lcm_jax.digits.classifier import WEIGHTS, Classifier
from lcm_jax.digits.evaluation_set import real_images, test_prompts
from lcm_jax.digits.guidance import GUIDANCE, best_guidance, work
from lcm_jax.digits.measures import score
from lcm_jax.digits.report import Row
from lcm_jax.digits.report import said as line_of
from lcm_jax.digits.sampling import sample_all
from lcm_jax.errors import UserError
from lcm_jax.host import json_file
from lcm_jax.inference.pipeline import Pipeline
from lcm_jax.monitor.progress import Sampling

ASSETS = pathlib.Path(__file__).parent.parent / "assets"
TEACHER = ASSETS / "digits_teacher"
ROWS = ASSETS / "digits_teacher_rows.json"

SAMPLERS = {"ddim": "teacher, DDIM", "dpmpp": "teacher, DPM-Solver++"}
STEPS = (1, 2, 4, 8, 50)


def measure(pipe: Pipeline, classifier: Classifier, say: Callable[[str], None]) -> list[Row]:
    """Evaluates a diffusion model with each sampler and number of steps, at the best guidance; reports to `say`."""
    prompts = test_prompts()
    test_features, _ = classifier(real_images(prompts, "test"))
    rows = []
    with Sampling(work(STEPS, GUIDANCE, len(prompts)) * len(SAMPLERS)) as progress:
        for sampler, name in SAMPLERS.items():
            for steps in STEPS:
                guidance = best_guidance(pipe, classifier, steps, GUIDANCE, sampler, progress=progress)
                done = progress.series(f"{name}, {steps} steps", len(prompts), steps)
                images, rate = sample_all(pipe, prompts, steps, guidance, sampler, done=done)
                rows.append(Row(name, score(images, prompts, classifier, test_features), steps, guidance, rate))
                say(line_of(rows[-1]))
    return rows


def to_json(rows: list[Row], folder: pathlib.Path) -> dict[str, Any]:
    """Returns the contents of the file ROWS, for rows measured with the model in `folder`."""
    return {
        **hashes(folder),
        "machine": machine(),
        "rows": [row.to_dict() for row in rows],
    }


def shipped(folder: pathlib.Path = TEACHER, path: pathlib.Path = ROWS) -> tuple[list[Row], str]:
    """Returns the packaged rows, and the machine that they were measured on.

    Raises UserError if the file is missing or damaged, or if its hashes differ from the teacher's or classifier's.
    """
    if not path.exists():
        raise UserError(f"{path} is missing; measure the teacher's rows with --teacher")
    values = json_file.read(path)
    for key, value in hashes(folder).items():
        if values.get(key) != value:
            what = folder if key == "folder_sha256" else WEIGHTS
            raise UserError(f"{path} was not measured with the present files of {what}; measure again with --teacher")
    try:
        return [Row.from_dict(row) for row in values["rows"]], values["machine"]
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is not a table of rows ({type(error).__name__}: {error}); measure again with --teacher"
        ) from None


def hashes(folder: pathlib.Path, classifier: pathlib.Path | None = None) -> dict[str, str]:
    """Returns the SHA-256 of the model folder and of the classifier file, WEIGHTS by default."""
    of_classifier = hashlib.sha256((classifier or WEIGHTS).read_bytes()).hexdigest()
    return {"folder_sha256": folder_hash(folder), "classifier_sha256": of_classifier}


def folder_hash(folder: pathlib.Path) -> str:
    """Returns the SHA-256 over the paths and contents of a folder's files, without README.md and hidden files."""
    total = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != "README.md" and not path.name.startswith("."):
            total.update(f"{path.relative_to(folder).as_posix()}\0".encode())
            total.update(hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()


def machine() -> str:
    """Returns the number and name of the accelerators, or of the CPU cores."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return f"{jax.device_count()} × {device.device_kind}"
    names = [
        line.partition(":")[2].strip()
        for line in (
            pathlib.Path("/proc/cpuinfo").read_text().splitlines() if pathlib.Path("/proc/cpuinfo").exists() else []
        )
        if line.startswith("model name")
    ]
    return f"{os.cpu_count()} cores, {names[0] if names else platform.processor() or platform.machine()}"
