"""The CLIP tokenizer of a folder: prompts to token ids, and what was cut off."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from lcm_jax import json_file
from lcm_jax.errors import UserError
from lcm_jax.interop.folder import Folder

if TYPE_CHECKING:
    import tokenizers


class Tokenizer:
    """Turns prompts into the ids that the text encoder takes. Safe to call from several threads at once."""

    def __init__(self, backend: tokenizers.Tokenizer, max_length: int, pad_id: int) -> None:
        """Args: a `tokenizers.Tokenizer`, whose settings are changed; the ids of a prompt; the id that fills up."""
        self.max_length = max_length
        # Set once: transformers' own call sets them anew each time, which isn't safe in threads.
        backend.enable_truncation(max_length)
        backend.enable_padding(length=max_length, pad_id=pad_id, pad_token=backend.id_to_token(pad_id))
        self._backend = backend

    def __call__(self, prompts: Sequence[str]) -> np.ndarray:
        """Returns int32 (len(prompts), max_length): start token, prompt, end token, padding; too long ones are cut."""
        ids = [encoding.ids for encoding in self._backend.encode_batch(list(prompts))]
        return np.asarray(ids, np.int32).reshape(len(ids), self.max_length)

    def cut(self, prompt: str) -> str:
        """Returns the end of the prompt that does not fit into `max_length` ids; "" if all of it fits."""
        overflowing = self._backend.encode(prompt).overflowing
        if not overflowing:
            return ""
        # the pieces' first and last tokens are the start and end token, which stand for no text: (0, 0)
        starts = [start for piece in overflowing for start, end in piece.offsets if end > start]
        return prompt[min(starts) :].strip() if starts else ""


def load_tokenizer(folder: Folder, name: str = "tokenizer", text_encoder: str = "text_encoder") -> Tokenizer:
    """Reads the CLIP tokenizer in the subfolder `name`, in either file format that transformers writes.

    Prompts are as long as both the tokenizer's `model_max_length` and the text encoder's position table allow.

    Raises:
      UserError: the files are missing or broken.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # else it says that PyTorch is missing, which is meant so
    from transformers import CLIPTokenizer  # imported late: it takes half a second

    directory = folder.path / name
    if not (directory / "tokenizer.json").is_file() and not (directory / "vocab.json").is_file():
        raise UserError(f"{directory} holds neither tokenizer.json nor vocab.json; a CLIPTokenizer has one of them")
    try:
        tokenizer = CLIPTokenizer.from_pretrained(str(directory), local_files_only=True)
    except Exception as error:  # tokenizers raises bare Exception for a broken file
        raise UserError(
            f"{directory} can't be read as a CLIP tokenizer: {' '.join(str(error).split())[:200]}"
        ) from None
    config = json_file.read(folder.path / text_encoder / "config.json", {"max_position_embeddings": json_file.WHOLE})
    positions = config.get("max_position_embeddings", 77)
    return Tokenizer(tokenizer.backend_tokenizer, min(tokenizer.model_max_length, positions), tokenizer.pad_token_id)
