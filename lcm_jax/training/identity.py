"""What a run reads, by content: hashes of its model folder and its data set, recorded in `<workdir>/inputs.json`.

A hash depends on content alone: not on paths, on how weights are divided into files, or on who reads them. A run that
is resumed or exported compares what it finds with what it began with; processes of a run compare with each other.
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
from lcm_jax.data.sources.tfds import Source
from lcm_jax.errors import few
from lcm_jax.host import files, json_file
from lcm_jax.interop import names, scheduler
from lcm_jax.interop.folder import Folder
from lcm_jax.interop.tokenizer import read_tokenizer
from lcm_jax.models import MODEL_CLASSES

RECORD = "inputs.json"
FORMAT = 2  # of the record; one of another format is replaced, not compared
SAMPLE = 1024  # records of a data set that are always compared
WHOLE = 64 * 2**20  # bytes of a data set of which all records are
PARTS = 16  # of a data set's records: each has a hash, so that a difference is found in one
PACKAGES = ("jax", "jaxlib", "flax", "optax", "grain", "numpy", "pillow", "tokenizers")  # that compute a step's numbers

Facts = dict[str, str]  # name of a part → what it is, as text


@dataclasses.dataclass(frozen=True)
class Identity:
    """What is at a place.

    Attributes:
      where: the place, for messages.
      facts: name of each part → hash of its content.
    """

    where: str
    facts: Facts


def of_folder(folder: Folder) -> Identity:
    """Returns the identity of a model folder: weights, configurations, scheduler and tokenizer.

    JSON files count as they are read, with defaults for keys that are absent: another version of diffusers or
    transformers writes other keys of the same meaning.
    """
    facts = {"model_index.json": _of_values(folder.pipeline_class)}
    facts["scheduler/scheduler_config.json"] = _of_values(_scheduler(folder))
    weights = _weights({name: component.params for name, component in folder.components.items()})
    for name, component in folder.components.items():
        facts[f"{name} weights"] = weights[name]
        config_class, _ = MODEL_CLASSES[component.library_class]
        facts[f"{name}/config.json"] = _of_values(dataclasses.asdict(config_class.from_dict(component.config)))
    return Identity(str(folder.path), facts | _tokenizer(folder.path / "tokenizer"))


def _scheduler(folder: Folder) -> dict[str, Any]:
    """Returns the schedule, and the trained grid and scaling of a consistency model's scheduler."""
    values = scheduler.read_values({**folder.scheduler, "_class_name": folder.scheduler_class})
    grid = {"original_inference_steps": values["original_inference_steps"]}
    scaling = {"timestep_scaling": values.get("timestep_scaling", 10.0)}  # LCMScheduler's default
    return dataclasses.asdict(folder.schedule) | grid | scaling


def _tokenizer(directory: pathlib.Path) -> Facts:
    """Returns a hash of each part of the tokenizer, as it is loaded: several forms of files mean the same."""
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
    return {f"tokenizer {name}": _of_values(part) for name, part in parts.items()}


def of_data(source: Source) -> Identity:
    """Returns the identity of a data set: its records by their content, and what it says of itself.

    Files are not compared, since their bytes differ where the same data set is prepared twice. Of a set of more than
    some `WHOLE` bytes, only `SAMPLE` records that are spread over all of it are read, which takes seconds in a bucket.
    """
    count = len(source)
    sample = np.linspace(0, count - 1, min(count, SAMPLE)).round().astype(int)
    digests, size = _records(source, sample)
    if len(sample) < count and size / len(sample) * count <= WHOLE:
        digests, _ = _records(source, np.arange(count))
    facts = {"number of data records": str(count), "metadata of the data": _of_values(source.metadata)}
    return Identity(source.where, facts | digests)


def _records(source: Source, numbers: np.ndarray) -> tuple[Facts, int]:
    """Returns a hash for each part of the data set, of those of its records that are given, and their bytes."""
    facts, size = {}, 0
    bounds = np.linspace(0, len(source), min(PARTS, len(numbers)) + 1).astype(int)
    for first, end in itertools.pairwise(bounds.tolist()):
        records = source.stored(numbers[(first <= numbers) & (numbers < end)].tolist())
        facts[f"data records {first} to {end - 1}"] = _hash(records)
        size += sum(map(len, records))
    return facts, size


@functools.cache
def of_code() -> Facts:
    """Returns a hash of this package's sources, and the versions of `PACKAGES`."""
    root = pathlib.Path(lcm_jax.__file__).parent
    sources = [(path.relative_to(root).as_posix(), path.read_bytes()) for path in sorted(root.rglob("*.py"))]
    return {"code of lcm_jax": _hash(part for name, content in sources for part in (name.encode(), content))} | {
        f"version of {name}": importlib.metadata.version(name) for name in PACKAGES
    }


def _of_values(value: Any) -> str:
    """Returns a hash of a value of JSON's types, where 1 is 1.0, a tuple is a list, and keys have no order."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {str(key): plain(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        return int(value) if isinstance(value, float) and value.is_integer() else value

    return _hash([json.dumps(plain(value), sort_keys=True).encode()])


def of_config(workdir: epath.PathLike) -> str:
    """Returns a hash of `<workdir>/config.json`; "nothing" where there is none: another disk than process 0's."""
    path = epath.Path(workdir) / "config.json"
    with files.one_line(path, "read"):
        try:
            return _hash([path.read_bytes()])
        except FileNotFoundError:
            return "nothing"


def recorded(workdir: epath.PathLike) -> bool:
    """Returns whether the run in `workdir` has recorded its inputs; one of an older version has not."""
    return _read(workdir) is not None


def changed(workdir: epath.PathLike, now: Mapping[str, Identity]) -> str:
    """Compares inputs with those that the run in `workdir` began with.

    Args: now: "model", "data" → identity; of an input that is left out nothing is compared.
    Returns: one line that names what differs; "" if nothing does, or nothing is recorded.
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
        f"{' and '.join(found)} changed since the run in {workdir} began; put back what was there, or choose another "
        f"--workdir (to accept the change, delete {epath.Path(workdir) / RECORD})"
    )


def record(workdir: epath.PathLike, now: Mapping[str, Identity]) -> None:
    """Writes `<workdir>/inputs.json`, unless it says so already; raises UserError where that can't be done."""
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
    """Hashes each array by itself, in threads: hashlib lets others run meanwhile."""
    arrays = [(name, path, array) for name, flat in components.items() for path, array in flat.items()]

    def of_array(item: tuple[str, str, np.ndarray]) -> bytes:
        _, path, array = item
        stored = np.ascontiguousarray(names.to_file(path, array))  # no copy: files hold it in this order
        head = f"{path} {array.dtype} {array.shape}"
        return hashlib.sha256(head.encode() + b"\n").digest() + hashlib.sha256(_bytes(stored)).digest()

    with _threads(os.cpu_count() or 1) as pool:
        digests = list(pool.map(of_array, arrays))
    parts: dict[str, list[bytes]] = {name: [] for name in components}
    for (name, _, _), digest in zip(arrays, digests, strict=True):
        parts[name].append(digest)
    return {name: _hash(sorted(of)) for name, of in parts.items()}


def _bytes(array: np.ndarray) -> memoryview:
    return array.reshape(-1).view(np.uint8).data  # bfloat16 has no buffer of its own


def _threads(most: int) -> concurrent.futures.ThreadPoolExecutor:
    return concurrent.futures.ThreadPoolExecutor(min(most, 32))


def _hash(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "big"))
        digest.update(part)
    return digest.hexdigest()[:32]
