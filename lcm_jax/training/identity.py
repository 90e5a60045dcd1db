"""Hashes a run's inputs, its model folder and data set, and records them in `<workdir>/inputs.json`.

A hash depends only on content, not on paths, on how weights are split into files, or on the process. Resuming and
exporting compare the inputs with the recorded ones; the processes of a run compare theirs with each other.
"""

import concurrent.futures
import dataclasses
import functools
import hashlib
import importlib.metadata
import itertools
import json
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from etils import epath

import lcm_jax
from lcm_jax.data.sources import Source
from lcm_jax.errors import few
from lcm_jax.host import files, json_file
from lcm_jax.interop import names, scheduler
from lcm_jax.interop.folder import Folder
from lcm_jax.interop.network_configs import MODEL_CLASSES
from lcm_jax.interop.tokenizer import read_tokenizer

RECORD = "inputs.json"
FORMAT = 2  # of the record; a record in another format is replaced, not compared
SAMPLE = 1024  # number of records that are hashed of a large data set
WHOLE = 64 * 2**20  # bytes; all records of a data set up to this size are hashed
PARTS = 16  # most hashes per data set, to locate a difference
PACKAGES = ("jax", "jaxlib", "flax", "optax", "grain", "numpy", "pillow", "tokenizers")  # affect a step's numbers

Facts = dict[str, str]  # name of a part → its hash or value, as text


@dataclasses.dataclass(frozen=True)
class Identity:
    """The content hashes of an input.

    Attributes:
      where: its location, for messages.
      facts: name of each part → hash of its content.
    """

    where: str
    facts: Facts


def of_folder(folder: Folder) -> Identity:
    """Returns the identity of a model folder: weights, configurations, scheduler and tokenizer.

    JSON files are hashed as parsed, with defaults for absent keys, since versions of diffusers and transformers write
    different keys with the same meaning.
    """
    facts = {"model_index.json": _of_values(folder.pipeline_class)}
    facts["scheduler/scheduler_config.json"] = _of_values(_scheduler(folder))
    weights = _weights({name: component.params for name, component in folder.components.items()})
    for name, component in folder.components.items():
        facts[f"{name} weights"] = weights[name]
        config = MODEL_CLASSES[component.library_class].read(component.config)
        facts[f"{name}/config.json"] = _of_values(dataclasses.asdict(config))
    for name in folder.layout.tokenizers:
        facts |= _tokenizer(folder.path / name)
    return Identity(str(folder.path), facts)


def _scheduler(folder: Folder) -> dict[str, Any]:
    """Returns the noise schedule, original_inference_steps and timestep_scaling."""
    values = scheduler.read_values({**folder.scheduler, "_class_name": folder.scheduler_class})
    grid = {"original_inference_steps": values["original_inference_steps"]}
    scaling = {"timestep_scaling": values.get("timestep_scaling", 10.0)}  # LCMScheduler's default
    return dataclasses.asdict(folder.schedule) | grid | scaling


def _tokenizer(directory: pathlib.Path) -> Facts:
    """Returns a hash per part of the loaded tokenizer, since different files can define the same tokenizer."""
    tokenizer = read_tokenizer(directory)
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    settings = [tokenizer.model_max_length, tokenizer.pad_token_id]
    rules = [content[name] for name in ("normalizer", "pre_tokenizer", "post_processor")]
    parts = {
        "vocabulary": content["model"]["vocab"],
        "merges": content["model"]["merges"],
        "added tokens": content["added_tokens"],
        "settings": settings + rules,
    }
    return {f"{directory.name} {name}": _of_values(part) for name, part in parts.items()}


def of_data(source: Source) -> Identity:
    """Returns the identity of a data set: its number of records, their content, and its metadata.

    Files are not hashed, since preparing the same data set twice gives different bytes. If the estimated size is above
    `WHOLE` bytes, only `SAMPLE` evenly spaced records are read, which takes seconds in a bucket.
    """
    count = len(source)
    sample = np.linspace(0, count - 1, min(count, SAMPLE)).round().astype(int)
    digests, size = _records(source, sample)
    if len(sample) < count and size / len(sample) * count <= WHOLE:
        digests, _ = _records(source, np.arange(count))
    facts = {"number of data records": str(count), "metadata of the data": _of_values(source.metadata)}
    return Identity(source.where, facts | digests)


def _records(source: Source, numbers: np.ndarray) -> tuple[Facts, int]:
    """Returns a hash of these records for each of up to `PARTS` ranges, and their total size in bytes."""
    facts, size = {}, 0
    bounds = np.linspace(0, len(source), min(PARTS, len(numbers)) + 1).astype(int)
    for first, end in itertools.pairwise(bounds.tolist()):
        records = source.stored(numbers[(first <= numbers) & (numbers < end)].tolist())
        facts[f"data records {first} to {end - 1}"] = _hash(records)
        size += sum(map(len, records))
    return facts, size


@functools.cache
def of_code() -> Facts:
    """Returns a hash of this package's source files, and the versions of `PACKAGES`."""
    root = pathlib.Path(lcm_jax.__file__).parent
    sources = [(path.relative_to(root).as_posix(), path.read_bytes()) for path in sorted(root.rglob("*.py"))]
    return {"code of lcm_jax": _hash(part for name, content in sources for part in (name.encode(), content))} | {
        f"version of {name}": importlib.metadata.version(name) for name in PACKAGES
    }


def _of_values(value: Any) -> str:
    """Hashes a JSON-like value; 1 equals 1.0, a tuple equals a list, and the order of keys is ignored."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {str(key): plain(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        return int(value) if isinstance(value, float) and value.is_integer() else value

    return _hash([json.dumps(plain(value), sort_keys=True).encode()])


def of_config(workdir: epath.PathLike) -> str:
    """Returns a hash of `<workdir>/config.json`; "nothing" if absent, as on another disk than process 0's."""
    path = epath.Path(workdir) / "config.json"
    with files.one_line(path, "read"):
        try:
            return _hash([path.read_bytes()])
        except FileNotFoundError:
            return "nothing"


def recorded(workdir: epath.PathLike) -> bool:
    """Returns whether `workdir` has a record of the inputs in the present format."""
    return _read(workdir) is not None


def changed(workdir: epath.PathLike, now: Mapping[str, Identity]) -> str:
    """Compares inputs with those recorded when the run in `workdir` began.

    Args: now: "model", "data" → identity; absent inputs are not compared.
    Returns: one line that names the differences; "" if there are none, or nothing is recorded.
    """
    then = _read(workdir)
    if then is None:
        return ""
    found = []
    for name, identity in now.items():
        old = then.get(name, {})
        if parts := [part for part in {**old, **identity.facts} if old.get(part) != identity.facts.get(part)]:
            found.append(f"{few(parts)} in {identity.where}")
    if not found:
        return ""
    return (
        f"{' and '.join(found)} changed since the run in {workdir} began; restore the original, or choose another "
        f"--workdir (to accept the change, delete {epath.Path(workdir) / RECORD})"
    )


def record(workdir: epath.PathLike, now: Mapping[str, Identity]) -> None:
    """Writes `<workdir>/inputs.json` if its content differs. Raises UserError if that fails."""
    content = {name: identity.facts for name, identity in now.items()}
    if _read(workdir) != content:
        files.write_json(epath.Path(workdir) / RECORD, {"format": FORMAT, **content})


def _read(workdir: epath.PathLike) -> dict[str, Facts] | None:
    path = epath.Path(workdir) / RECORD
    with files.one_line(path, "read"):
        if not path.exists():
            return None
        kinds = {"model": json_file.TEXTS, "data": json_file.TEXTS}
        content = json_file.parse(path.read_bytes(), str(path), kinds)
    return content if content.pop("format", None) == FORMAT else None


def _weights(components: Mapping[str, Mapping[str, np.ndarray]]) -> Facts:
    """Returns a hash per component. Arrays are hashed in parallel threads, since hashlib releases the GIL."""
    arrays = [(name, path, array) for name, flat in components.items() for path, array in flat.items()]

    def of_array(item: tuple[str, str, np.ndarray]) -> bytes:
        _, path, array = item
        stored = np.ascontiguousarray(names.to_file(path, array))  # no copy if it is a view of a file
        head = f"{path} {array.dtype} {array.shape}"
        return hashlib.sha256(head.encode() + b"\n").digest() + hashlib.sha256(_bytes(stored)).digest()

    with _threads(os.cpu_count() or 1) as pool:
        digests = list(pool.map(of_array, arrays))
    parts: dict[str, list[bytes]] = {name: [] for name in components}
    for (name, _, _), digest in zip(arrays, digests, strict=True):
        parts[name].append(digest)
    return {name: _hash(sorted(of)) for name, of in parts.items()}


def _bytes(array: np.ndarray) -> memoryview:
    return array.reshape(-1).view(np.uint8).data  # bfloat16 arrays do not export a buffer


def _threads(most: int) -> concurrent.futures.ThreadPoolExecutor:
    return concurrent.futures.ThreadPoolExecutor(min(most, 32))


def _hash(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "big"))
        digest.update(part)
    return digest.hexdigest()[:32]
