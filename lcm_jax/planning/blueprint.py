"""Builds the networks of a run without weights, from a local folder or the bundled configs of published models."""

import json
import pathlib
from importlib import resources

import numpy as np

from lcm_jax.config import Config
from lcm_jax.families.base import Tokens
from lcm_jax.interop.folder import Component, Folder, read_folder
from lcm_jax.interop.tokenizer import load_tokenizer
from lcm_jax.training.networks import Parts, make_parts


def blueprint(config: Config) -> Parts:
    """Returns the parts of a run.

    Reads `config.model.folder` if it exists on this machine. For the hub id of a published model it uses the
    configurations in the package; nothing is downloaded.

    Raises: UserError if it is neither.
    """
    if not pathlib.Path(config.model.folder).is_dir() and (known := published().get(config.model.folder)):
        folder, empty_prompt = known
        return make_parts(config, folder, lambda _: empty_prompt)  # the step contains no other prompt's tokens
    folder = read_folder(config.model.folder)
    return make_parts(config, folder, load_tokenizer(folder))


def published() -> dict[str, tuple[Folder, Tokens]]:
    """Returns {hub id: (folder without weights, tokens of "")} for the published models in the package."""
    found = {}
    for file in sorted(resources.files("lcm_jax").joinpath("assets", "published").iterdir(), key=lambda f: f.name):
        content = json.loads(file.read_text())
        components = {name: Component(name, content["classes"][name], content[name], {}) for name in content["classes"]}
        index = {"_class_name": content["pipeline_class"], "scheduler": ["diffusers", content["scheduler_class"]]}
        tokens = {name: _empty_prompt(**of) for name, of in content["prompt_tokens"].items()}
        empty_prompt = tokens if len(tokens) > 1 else next(iter(tokens.values()))
        for hub_id in content["hub_ids"]:
            found[hub_id] = Folder(pathlib.Path(hub_id), index, content["scheduler"], components), empty_prompt
    return found


def _empty_prompt(*, start: int, end: int, padding: int, length: int) -> np.ndarray:
    tokens = np.full((1, length), padding, np.int32)
    tokens[0, :2] = start, end
    return tokens
