"""Opens a TFDS data set for random access, without TensorFlow: a registered builder or any ArrayRecord directory.

The layout (dataset_info.json, features.json, shards) is TFDS's. Only `array_record` files allow random access; for
other formats, the error names the command that converts them.
"""

import contextlib
import dataclasses
import fcntl
import importlib
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from tensorflow_datasets.proto import tf_example_pb2

from lcm_jax.data.config import DataConfig
from lcm_jax.data.images import BadImage
from lcm_jax.data.latents import CAPTIONS, MOMENTS
from lcm_jax.data.sources.base import caption_text
from lcm_jax.errors import UserError, nearest, plain, say

# builders of this package: importing a builder's module registers it with TFDS
PROVIDED = dict.fromkeys(("captioned_digits", "italic_digits"), "lcm_jax.digits.dataset")
GUIDE = "docs/own_data.md"


@dataclasses.dataclass(frozen=True)
class TfdsSource:
    """A `Source` that reads one split of a prepared data set."""

    where: str  # data set and split, for error messages
    records: Sequence[Any]  # TFDS data source; images undecoded
    image_key: str
    caption_key: str  # a path through nested features, "captions/text"
    metadata: dict[str, Any]  # TFDS's metadata.json

    def __len__(self) -> int:
        return len(self.records)

    def read(self, indices: Sequence[int]) -> list[tuple[Any, list[str]]]:
        """Returns the image file (PNG, JPEG, …) or moments of each record, and its captions (at least one).

        Raises UserError naming the record that cannot be read or has no caption.
        """
        try:
            records = self.records.__getitems__(indices)  # pyright: ignore[reportAttributeAccessIssue]
        except Exception:
            records = [self._read_one(i) for i in indices]  # finds the record that failed
        return [(record[self.image_key], self._captions(record, i)) for record, i in zip(records, indices, strict=True)]

    def stored(self, indices: Sequence[int]) -> list[bytes]:
        """Returns the stored records as serialized tf.Examples with sorted features.

        TFDS's order of features varies between processes, so files of the same records differ.

        Raises UserError naming the record that cannot be read.
        """
        try:
            found = self.records.data_source.__getitems__(indices)  # pyright: ignore[reportAttributeAccessIssue]
            parse = tf_example_pb2.Example.FromString  # pyright: ignore[reportAttributeAccessIssue]
            return [parse(record).SerializeToString(deterministic=True) for record in found]
        except Exception as error:
            for index in indices:  # finds the record that failed
                self._read_one(index)
            raise UserError(f"{self.where}: its records cannot be read ({_line(error)})") from None

    def bad_image(self, index: int, error: BadImage) -> UserError:
        """Returns the UserError for a record whose image can't be decoded."""
        return UserError(f"{self.where}: the image of record {index} cannot be decoded: {error}")

    def _read_one(self, index: int) -> dict:
        try:
            return self.records[index]
        except Exception as error:
            raise UserError(f"{self.where}: record {index} cannot be read ({_line(error)})") from None

    def _captions(self, record: dict, index: int) -> list[str]:
        value: Any = record
        for key in self.caption_key.split("/"):
            value = value[key]
        texts = [value] if isinstance(value, bytes | str) else list(value)
        if not texts:
            raise UserError(f"{self.where}: record {index} has no caption in {self.caption_key!r}")
        return [caption_text(text) for text in texts]


def recognises(directory: epath.Path) -> bool:
    """Returns whether this is the version directory of a prepared data set."""
    return (directory / "dataset_info.json").exists()


def mismatch(directory: epath.Path) -> str:
    """Returns why a directory is not recognised, and the version directory below it if there is one."""
    below = [*directory.glob("*/dataset_info.json"), *directory.glob("*/*/dataset_info.json")]
    inside = sorted(str(file.parent) for file in below)
    hint = f"; did you mean {inside[-1]}?" if inside else f"; {GUIDE} says how to prepare one"
    return f"it is not a prepared TFDS data set: it has no dataset_info.json{hint}"


def open_tfds(config: DataConfig) -> TfdsSource:
    """Opens one split of a data set: the version directory `config.directory`, or the registered `config.dataset`.

    A registered data set is prepared in `config.data_dir` if it is missing there. With `config.latents`, the data set
    is one of `lcm_jax.data.latents`.

    Raises: UserError for a missing data set, split, key or file, an empty split, a feature of another type, and files
      of another format.
    """
    split, image_key, caption_key = config.split, config.image_key, config.caption_key
    directory = config.directory
    builder = _from_directory(directory) if directory else _from_name(config.dataset, config.data_dir)
    info, place = builder.info, builder.data_path
    if tfds.core.FileFormat.ARRAY_RECORD not in info.available_file_formats():
        found = info.file_format.value if info.file_format else "unknown"
        raise UserError(
            f"{place} holds {found} files, not array_record: convert it where TensorFlow is installed, with"
            f" tfds convert_format --dataset_version_dir={place} --out_file_format=array_record"
        )
    _check_split(info, split, place)
    if config.latents:
        if MOMENTS not in info.features:
            raise UserError(
                f"{place} holds no encoded images (config.data.latents); lcm_jax.encode writes such data sets"
            )
        image_key, caption_key = MOMENTS, CAPTIONS
    elif MOMENTS in info.features and image_key not in info.features:
        raise UserError(f"{place} holds encoded images; read them with --config.data.latents=true")
    else:
        _check_keys(info.features, image_key, caption_key, place)
    # Images stay encoded: Pillow decodes the requested one later.
    undecoded = {k: tfds.decode.SkipDecoding() for k, f in info.features.items() if isinstance(f, tfds.features.Image)}
    try:
        records = builder.as_data_source(split, decoders=undecoded, file_format="array_record")
    except Exception as error:
        raise UserError(f"{place}: split {split!r} cannot be opened ({_line(error)})") from None
    metadata = dict(info.metadata or {})
    source = TfdsSource(f"{place} split {split!r}", records, image_key, caption_key, metadata)
    if not len(source):
        raise UserError(f"{source.where} is empty; a data set needs at least one example")
    source.read([0])
    return source


def _from_directory(directory: str) -> Any:
    try:
        builder = tfds.builder_from_directory(epath.Path(directory).expanduser())
        builder.info.metadata  # noqa: B018 (read at its first use)
        return builder
    except Exception as error:
        raise UserError(f"{directory}: the data set's description cannot be read ({_line(error)})") from None


def _from_name(name: str, data_dir: str) -> Any:
    builder = _builder(name, data_dir)
    if not builder.data_path.exists():
        prepare(builder)
        builder = _builder(name, data_dir)  # a builder reads the prepared files only when it is created
    return builder


def _builder(name: str, data_dir: str) -> tfds.core.DatasetBuilder:
    base = re.split("[/:]", name)[0]
    if base in PROVIDED:
        importlib.import_module(PROVIDED[base])
    try:
        return tfds.builder(name, data_dir=str(epath.Path(data_dir).expanduser()) if data_dir else None)
    except tfds.core.DatasetNotFoundError:
        hint = nearest(base, {*tfds.list_builders(with_community_datasets=False), *PROVIDED})
        if not hint.startswith("; did"):  # the full list has hundreds of names
            hint = "; give 'captioned_digits', a registered TFDS name, or config.data.directory"
        raise UserError(f"data set {name!r} is not registered in TFDS{hint}") from None
    except Exception as error:
        raise UserError(f"data set {name!r} cannot be opened ({_line(error)})") from None


def prepare(builder: tfds.core.DatasetBuilder) -> None:
    """Writes the data set unless it exists; safe against concurrent and killed processes.

    TFDS writes next to the target and renames at the end. A file lock makes other processes wait; its holder removes
    the incomplete folders of killed processes. Raises UserError if the data set cannot be prepared.
    """
    parent = Path(builder.data_path).parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        lock = (parent / ".lock").open("w")
    except OSError as error:
        raise UserError(f"config.data.data_dir: {parent} is not writable ({error.strerror})") from None
    with lock:
        with contextlib.suppress(OSError):  # a file system without locks: TFDS's rename still lets only one succeed
            fcntl.flock(lock, fcntl.LOCK_EX)
        if builder.data_path.exists():
            return
        for left in parent.glob(f"incomplete.*_{builder.data_path.name}"):
            epath.Path(left).rmtree()
        say(f"preparing {builder.name} in {builder.data_path}", sys.stderr)
        try:
            with _quiet():
                builder.download_and_prepare(
                    file_format="array_record", download_config=tfds.download.DownloadConfig(try_download_gcs=False)
                )
        except UserError:
            raise
        except ImportError as error:
            raise UserError(
                f"data set {builder.name!r} cannot be prepared here ({_line(error)}): prepare it where its packages"
                f" are installed ({GUIDE} says how), and give --config.data.directory"
            ) from None
        except Exception as error:
            if not builder.data_path.exists():  # otherwise another machine on the same disk was first
                raise UserError(f"data set {builder.name!r} cannot be prepared ({_line(error)})") from None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppresses TFDS's progress bars and the banners that it prints to standard output."""
    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(None):
            yield
    finally:
        tfds.enable_progress_bar()


def _check_keys(features: Any, image_key: str, caption_key: str, place: epath.Path) -> None:
    if image_key not in features:
        raise UserError(f"config.data.image_key {image_key!r} is not in {place}{_among(image_key, features)}")
    image = features[image_key]
    if not isinstance(image, tfds.features.Image) or not _holds(image, np.uint8):
        raise UserError(f"config.data.image_key {image_key!r} of {place} is {_line(image)}, not an 8-bit Image feature")
    feature = features
    for key in caption_key.split("/"):
        inner = getattr(feature, "feature", feature)  # a Sequence of a dict is read as a dict of lists
        if not hasattr(inner, "keys") or key not in inner:
            raise UserError(f"config.data.caption_key {caption_key!r} is not in {place}{_among(caption_key, features)}")
        feature = inner[key]
    if not _holds(getattr(feature, "feature", feature), np.object_):
        raise UserError(f"config.data.caption_key {caption_key!r} of {place} is {_line(feature)}, not text")


def _holds(feature: Any, dtype: Any) -> bool:
    kind = getattr(feature, "np_dtype", None)  # a dict for nested features
    return kind is not None and not isinstance(kind, dict) and np.dtype(kind) == dtype


def _among(key: str, features: Any) -> str:
    hint = nearest(key, features.keys())
    return f"{hint} (it has {', '.join(sorted(features.keys()))})" if hint.startswith("; did") else hint


def _check_split(info: tfds.core.DatasetInfo, split: str, place: epath.Path) -> None:
    for name in re.findall(r"(?:^|\+)\s*(\w+)", split):
        if name not in info.splits and name != "all":
            raise UserError(f"config.data.split {split!r}: {place} has no split {name!r}{nearest(name, info.splits)}")
    try:
        count, files = info.splits[split].num_examples, info.splits[split].filenames
    except Exception as error:
        raise UserError(f"config.data.split {split!r} cannot be read ({_line(error)})") from None
    if not count:
        raise UserError(f"{place} split {split!r} is empty; a data set needs at least one example")
    missing = [name for name in files if not (place / name).exists()]
    if missing:
        raise UserError(f"{place} misses {missing[0]}" + (f" and {len(missing) - 1} more" if missing[1:] else ""))


def _line(error: object) -> str:
    """Returns a message as one line of at most 200 characters."""
    return plain(str(error) or type(error).__name__, 200)
