"""Random damage for files of all kinds, structured if possible. Each function makes one change to its input, chosen by
`rng`, and returns a description."""

import copy
import json
import os
import pathlib
import shutil
import struct
from typing import Any

import numpy as np

Rng = np.random.Generator

EVIL = r"([a-z0-9_.]+)+!"  # as a regular expression it takes for ever
NUMBERS = [0, -1, 1, 2, 3, 7, 0.5, -0.0, 1e-320, 1e308, 2**31, 2**63, 10**7, 10**11, 10**30, np.nan, np.inf]
TEXTS = ["", " ", "4", "null", "epsilon", "../evil", "/etc/passwd", "\x1b[31mred", "a\nb", "\ud800", "é" * 999, EVIL]
VALUES = [None, True, False, *NUMBERS, *TEXTS, [], {}, [[]], [1, "2", None], {"a": {"b": []}}, ["x"] * 5]
WHOLE = ["null", "[]", "3", '"text"', "{}", "{", "", "NaN", "\ufeff{}", '{"a": 1' + "0" * 5000 + "}"]
RECIPE = {
    **{"teacher": "t", "method": "m", "weights": "ema", "guidance_min": 3.0, "guidance_max": 13.0},
    **{"original_inference_steps": 50, "timestep_scaling": 10.0, "w_embedding_dim": 0},
    **{"options": {"solver": "ddim", "skip": 20, "distance": "huber"}},
    **{"steps": 100, "batch_size": 8, "learning_rate": 1e-4, "ema_decay": 0.95},
}


def pick(rng: Rng, choices: Any) -> Any:
    """Returns one of them; the same for the same `rng` whatever they are (numpy would convert them)."""
    choices = list(choices)
    return choices[int(rng.integers(len(choices)))]


def damage_bytes(rng: Rng, data: bytes) -> tuple[bytes, str]:
    """Flips, cuts, doubles, replaces or adds bytes."""
    at, length = int(rng.integers(len(data) + 1)), int(2 ** rng.uniform(0, 10))
    noise = rng.bytes(length)
    changes = {
        f"cut at byte {at}": data[:at],
        f"{length} bytes at {at} removed": data[:at] + data[at + length :],
        f"{length} bytes at {at} doubled": data[: at + length] + data[at:],
        f"{length} random bytes put in at {at}": data[:at] + noise + data[at:],
        f"{length} random bytes over those at {at}": data[:at] + noise + data[at + length :],
        f"{length} zeros over those at {at}": data[:at] + bytes(length) + data[at + length :],
        "empty": b"",
        "an HTML page": b"<!DOCTYPE html><html><body>Not found</body></html>",
        "a pointer of git-lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 123456789\n",
    }
    if data and rng.random() < 0.4:
        at, bit = int(rng.integers(len(data))), int(rng.integers(8))
        return data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :], f"bit {bit} of byte {at} flipped"
    what = pick(rng, changes)
    return changes[what], what


def damage_json(rng: Rng, value: Any) -> tuple[str, str]:
    """Changes one value, key or type of a JSON object, or its brackets. Returns the new text."""
    kind = rng.random()
    if kind < 0.06:
        deep = int(rng.integers(60, 200_000))
        return pick(rng, ["[" * deep + "]" * deep, '{"a":' * deep + "1" + "}" * deep, "[" * deep]), f"{deep} brackets"
    if kind < 0.1:
        text = pick(rng, WHOLE)
        return text, f"the whole is {text[:20]!r}"
    value = copy.deepcopy(value)
    if not value:
        return json.dumps({"x": 1}), "a key more"
    holder, key, where = _place(rng, value)
    old = holder[key]
    if isinstance(old, str) and old.startswith("{") and kind < 0.9:  # JSON in JSON
        holder[key], what = damage_json(rng, json.loads(old))
        what = f"JSON in which {what}"
    elif kind < 0.2:
        del holder[key]
        what = "removed"
    elif kind < 0.3 and isinstance(holder, dict):
        new = EVIL if "pattern" in where else pick(rng, [*TEXTS, f"{key}2", key.upper()])
        holder[new] = holder.pop(key)
        what = f"renamed to {new!r}"
    elif kind < 0.4 and isinstance(old, (list, str)) and old:
        holder[key] = pick(rng, [old * 2, old[:-1], [old], old[::-1], old * 1000])
        what = f"{json.dumps(holder[key])[:60]} now"
    else:
        holder[key] = new = pick(rng, [*VALUES, str(old), [old], {"a": old}])
        what = f"{new!r:.60} now"
    return json.dumps(value), f"{where} is {what}"


def _place(rng: Rng, value: Any, where: str = "$") -> tuple[Any, Any, str]:
    """Returns (holder, key, path) of a random place in a JSON value that is not empty: outer ones more often."""
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    inside = [key for key in keys if value[key] and (isinstance(value[key], (dict, list)) or str(value[key])[0] == "{")]
    key = pick(rng, inside if inside and rng.random() < 0.4 else keys)
    inner = value[key]
    if isinstance(inner, (dict, list)) and inner and rng.random() < 0.6:
        return _place(rng, inner, f"{where}.{key}")
    return value, key, f"{where}.{key}"


def damage_tensors(rng: Rng, data: bytes) -> tuple[bytes, str]:
    """Changes the header or the values of a safetensors file; numbers that are not finite are put in too."""
    (size,) = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8 : 8 + size]), bytearray(data[8 + size :])
    kind = rng.random()
    if kind < 0.1:
        size = pick(rng, [0, 1, size - 1, size + 1, 2**20, 2**40, 2**63, 2**64 - 1])
        return struct.pack("<Q", size) + data[8:], f"a header of {size} bytes"
    if kind < 0.35 and (metadata := header.pop("__metadata__", None)):
        text, what = damage_json(rng, metadata)
        data = f'{{"__metadata__": {text}, {json.dumps(header)[1:]}'.encode("utf-8", "surrogatepass")
        return _joined(data, body), f"metadata: {what}"
    key = pick(rng, [key for key in header if key != "__metadata__"])
    tensor = header[key]
    if kind < 0.4:
        begin, end = tensor["data_offsets"]
        new = pick(rng, [np.nan, np.inf, -np.inf])
        width = {"F64": "<f8", "F16": "<f2"}.get(tensor["dtype"], "<f4")
        count = (end - begin) // np.dtype(width).itemsize
        if count:
            values = np.frombuffer(body[begin:end], width).copy()
            values[int(rng.integers(count))] = new
            body[begin:end] = values.tobytes()
        what = f"{key} has {'a value ' if count else 'no '}{new}"
    elif kind < 0.6:
        dtype = pick(
            rng, ["I32", "U32", "I64", "U8", "BOOL", "F64", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F4", "x", ""]
        )
        bits = {"F64": 2, "I64": 2, "F16": 0.5, "BF16": 0.5, "U8": 0.25, "BOOL": 0.25}.get(dtype, 1)
        tensor["dtype"] = dtype
        if tensor["shape"] and rng.random() < 0.7:  # so that the sizes fit and the dtype alone is strange
            tensor["shape"][-1] = int(tensor["shape"][-1] / bits)
        what = f"{key} is {dtype} {tensor['shape']}"
    else:
        text, what = damage_json(rng, header)
        return _joined(text.encode("utf-8", "surrogatepass"), body), f"header: {what}"
    return _joined(json.dumps(header).encode(), body), what


def _joined(header: bytes, body: bytes | bytearray) -> bytes:
    return struct.pack("<Q", len(header)) + header + bytes(body)


def damage_file(rng: Rng, path: pathlib.Path) -> str:
    """Damages a file in the way of its kind, or as plain bytes."""
    data = path.read_bytes()
    structured = rng.random() < 0.75
    if structured and path.suffix == ".json":
        text, what = damage_json(rng, json.loads(data))
        data = text.encode("utf-8", "surrogatepass")
    elif structured and path.suffix == ".safetensors":
        data, what = damage_tensors(rng, data)
    else:
        data, what = damage_bytes(rng, data)
    path.unlink()  # a link to a file that others use
    path.write_bytes(data)
    return f"{path.name}: {what}"


def damage_folder(rng: Rng, folder: pathlib.Path) -> str:
    """Damages one file of a folder, each as likely as the others, or which files are there."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    path = pick(rng, files)
    name = path.relative_to(folder)
    if rng.random() < 0.8:
        return f"{name.parent}/{damage_file(rng, path)}"
    other = pick(rng, files)
    what = pick(
        rng, ["removed", "a folder", "a link to itself", "a broken link", "a link out", "another", "its parent"]
    )
    path.unlink()
    if what == "a folder":
        path.mkdir()
    elif what == "a link to itself":
        path.symlink_to(path.name)
    elif what == "a broken link":
        path.symlink_to("nowhere")
    elif what == "a link out":
        path.symlink_to("/etc/hostname")
    elif what == "another" and other != path:
        os.link(other, path)
        what = f"{other.relative_to(folder)}"
    elif what == "its parent":
        shutil.rmtree(path.parent)
        what = "gone, with all beside it"
    return f"{name} is {what}"
