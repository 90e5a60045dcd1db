"""What a run reads, by content: hashes of its model folder and its data set, recorded in `<workdir>/inputs.json`.

A hash depends on content alone: not on paths, on how weights are divided into files, or on who reads them. A run that
is resumed or exported compares what it finds with what it began with; processes of a run compare with each other.
"""

import concurrent.futures
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

import lcm_jax
from lcm_jax import files, json_file
from lcm_jax.data.sources import Source
from lcm_jax.errors import few
from lcm_jax.interop import names
from lcm_jax.interop.folder import Folder

RECORD = "inputs.json"
FORMAT = 1  # of the record; one of another format is replaced, not compared
WHOLE = 64 * 2**20  # bytes of a data set that is hashed completely
FILES, BLOCKS, BLOCK = 128, 8, 256 * 1024  # of a larger one: so many files, blocks of each, bytes of a block
PACKAGES = (
    *("jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "numpy", "grain", "array-record", "pillow"),
    *("tensorflow-datasets", "tokenizers", "transformers", "safetensors"),
)

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
    """Returns the identity of a model folder: weights, configurations, scheduler and tokenizer."""
    facts = {"model_index.json": of_json(folder.model_index)}
    facts["scheduler/scheduler_config.json"] = of_json(folder.scheduler)
    weights = _weights({name: component.params for name, component in folder.components.items()})
    for name, component in folder.components.items():
        facts[f"{name} weights"] = weights[name]
        facts[f"{name}/config.json"] = of_json(component.config)
    for path in sorted((folder.path / "tokenizer").glob("*")):
        if path.suffix in (".json", ".txt") and path.is_file():
            with files.one_line(path, "read"):
                facts[f"tokenizer/{path.name}"] = _hash([path.read_bytes()])
    return Identity(str(folder.path), facts)


def of_data(source: Source) -> Identity:
    """Returns the identity of a data set: names and sizes of its files, and their content.

    Up to `WHOLE` bytes all of the content is hashed. Of a larger data set these are the first, the last and some blocks
    between in `FILES` of the files, so that a set of terabytes, or one in a bucket, takes seconds.
    """
    with files.one_line(source.where, "read"):
        sizes = _sizes(source.files)
    paths = sorted(sizes, key=lambda path: path.name)
    whole = sum(sizes.values()) <= WHOLE
    facts = {"number of data records": str(len(source))}
    if len(paths) > FILES:
        listed = [f"{path.name} {sizes[path]}".encode() for path in paths]
        facts["names or sizes of the data files"] = f"{_hash(listed)} ({len(paths)} files)"
        paths = [paths[i] for i in np.linspace(0, len(paths) - 1, FILES).round().astype(int)]

    def content(path: epath.Path) -> str:
        with files.one_line(path, "read"):
            return _hash(_blocks(path, sizes[path], whole))

    with _threads(32) as pool:
        for path, found in zip(paths, pool.map(content, paths), strict=True):
            facts[f"data file {path.name}"] = f"{found} ({sizes[path]} bytes)"
    return Identity(source.where, facts)


@functools.cache
def of_code() -> Facts:
    """Returns a hash of this package's sources, and the versions of the packages that decide over a result."""
    root = pathlib.Path(lcm_jax.__file__).parent
    sources = [(path.relative_to(root).as_posix(), path.read_bytes()) for path in sorted(root.rglob("*.py"))]
    return {"code of lcm_jax": _hash(part for name, content in sources for part in (name.encode(), content))} | {
        f"version of {name}": _version(name) for name in PACKAGES
    }


def of_json(value: Mapping[str, Any], beside: Sequence[str] = ()) -> str:
    """Returns a hash of a configuration; without the keys `beside`, and those that say which program wrote it."""
    meant = {
        key: item
        for key, item in value.items()
        if key == "_class_name" or not (key.startswith("_") or key == "transformers_version" or key in beside)
    }
    return _hash([json.dumps(meant, sort_keys=True).encode()])


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


def _sizes(paths: Sequence[epath.Path]) -> dict[epath.Path, int]:
    """Sizes in bytes; in a bucket by one listing per folder instead of a request per file."""
    if not paths or not files.in_bucket(paths[0]):
        return {path: path.stat().length for path in paths}
    listed = {}
    for folder in {path.parent for path in paths}:
        for entry in _bucket().ls(os.fspath(folder), detail=True):
            listed[entry["name"]] = int(entry["size"])
    return {path: listed[os.fspath(path).removeprefix("gs://")] for path in paths}


def _blocks(path: epath.Path, size: int, whole: bool) -> Iterable[bytes]:
    if whole or size <= BLOCKS * BLOCK:
        yield path.read_bytes()
        return
    starts = [int(start) for start in np.linspace(0, size - BLOCK, BLOCKS).round()]
    if files.in_bucket(path):
        for start in starts:  # an open file would fetch megabytes ahead
            yield _bucket().cat_file(os.fspath(path), start=start, end=start + BLOCK)
        return
    with path.open("rb") as file:
        for start in starts:
            file.seek(start)
            yield file.read(BLOCK)


def _bucket() -> Any:
    import fsspec  # comes with gcsfs, which buckets need

    return fsspec.filesystem("gs")


def _hash(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "big"))
        digest.update(part)
    return digest.hexdigest()[:32]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"
