"""CLIP tokenizer of a model folder: converts prompts to token ids and reports truncated text."""

from __future__ import annotations

import os
import pathlib
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lcm_jax.errors import UserError, few, plain
from lcm_jax.host import arguments, json_file
from lcm_jax.interop.folder import Folder
from lcm_jax.interop.network_configs import read_clip_text

if TYPE_CHECKING:
    import tokenizers


class Tokenizer:
    """Converts prompts to token ids for the text encoder. Thread-safe."""

    def __init__(self, backend: tokenizers.Tokenizer, max_length: int, pad_id: int, rows: int, where: str) -> None:
        """Initializes the tokenizer.

        Args:
          backend: a `tokenizers.Tokenizer`; its truncation and padding settings are changed.
          max_length: number of ids per prompt.
          pad_id: the padding id.
          rows: number of rows in the text encoder's embedding table; ids must be below.
          where: the text encoder's folder, for error messages.
        """
        self.max_length = max_length
        # Set once: transformers sets them in each call, which isn't thread-safe.
        backend.enable_truncation(max_length)
        backend.enable_padding(length=max_length, pad_id=pad_id, pad_token=backend.id_to_token(pad_id))
        self._backend, self._rows, self._where = backend, rows, where
        self._vectors = _multi_vector_words({token.content for token in backend.get_added_tokens_decoder().values()})

    def __call__(self, prompts: Sequence[str]) -> np.ndarray:
        """Returns int32 (len(prompts), max_length): start token, prompt (truncated if too long), end token, padding.

        Raises:
          UserError: a prompt is not Unicode text, or has a token without a row in the text encoder's embedding table.
        """
        prompts = [self._expanded(prompt) for prompt in prompts]
        ids = np.asarray([encoding.ids for encoding in self._backend.encode_batch(prompts)], np.int64)
        ids = ids.reshape(len(prompts), self.max_length)
        if (beyond := np.argwhere(ids >= self._rows)).size:
            row, column = beyond[0]
            token = int(ids[row, column])
            word = str(self._backend.id_to_token(token)).removesuffix("</w>")
            raise UserError(
                f"{self._where} has no row for the word {plain(repr(word), 60)} of {plain(repr(prompts[row]), 60)}: "
                f"it is token {token} of the tokenizer, and vocab_size is {self._rows}"
            )
        return ids.astype(np.int32)

    def cut(self, prompt: str) -> str:
        """Returns the truncated end of a prompt that exceeds `max_length` ids; "" if it fits.

        Words of multi-vector textual inversions are expanded.
        """
        prompt = self._expanded(prompt)
        overflowing = self._backend.encode(prompt).overflowing
        if not overflowing:
            return ""
        # each piece begins and ends with the start and end token, whose offsets are (0, 0)
        starts = [start for piece in overflowing for start, end in piece.offsets if end > start]
        return prompt[min(starts) :].strip() if starts else ""

    def _expanded(self, prompt: str) -> str:
        """Returns the prompt with words of multi-vector textual inversions expanded, "x" to "x x_1 x_2 …".

        As in diffusers' `TextualInversionLoaderMixin.maybe_convert_prompt`, a word that the tokenizer finds as a token
        is replaced at every occurrence of its letters.
        """
        prompt = arguments.text("the prompt", prompt)
        if any(word in prompt for word in self._vectors):
            encoding = self._backend.encode(prompt, add_special_tokens=False)
            tokens = [token for piece in (encoding, *encoding.overflowing) for token in piece.tokens]
            for word in dict.fromkeys(token for token in tokens if token in self._vectors):
                prompt = prompt.replace(word, self._vectors[word])
        return prompt


class Tokenizers:
    """Converts prompts to the token ids of several text encoders. Thread-safe."""

    def __init__(self, tokenizers: Mapping[str, Tokenizer]) -> None:
        """Takes name → tokenizer."""
        self._tokenizers = tokenizers
        self.max_length = min(tokenizer.max_length for tokenizer in tokenizers.values())

    def __call__(self, prompts: Sequence[str]) -> dict[str, np.ndarray]:
        """Returns name → int32 (len(prompts), its max_length); raises UserError like `Tokenizer`."""
        return {name: tokenizer(prompts) for name, tokenizer in self._tokenizers.items()}

    def cut(self, prompt: str) -> str:
        """Returns the longest truncated end of a prompt; "" if it fits."""
        return max((tokenizer.cut(prompt) for tokenizer in self._tokenizers.values()), key=len)


def _multi_vector_words(added: set[str]) -> dict[str, str]:
    """Returns word → "word word_1 word_2 …" for the added tokens with more than one vector."""
    found = {}
    for word in added:
        words = [word]
        while (following := f"{word}_{len(words)}") in added:
            words.append(following)
        if len(words) > 1:
            found[word] = " ".join(words)
    return found


def load_tokenizer(folder: Folder) -> Tokenizer | Tokenizers:
    """Reads the folder's CLIP tokenizers, from tokenizer.json or vocab.json: one, or as `Tokenizers`.

    The prompt length is the smaller of the tokenizer's `model_max_length` and the text encoder's
    `max_position_embeddings`. Tokens without a row in the text encoder's embedding table cause a warning here, since
    diffusers loads such folders, and an error when a prompt contains one.

    Raises:
      UserError: the files are missing or broken; there is no pad token; the start, end or pad token has no row.
    """
    loaded = {name: _load(folder, name, encoder) for name, encoder in folder.layout.tokenizers.items()}
    return Tokenizers(loaded) if len(loaded) > 1 else next(iter(loaded.values()))


def _load(folder: Folder, name: str, text_encoder: str) -> Tokenizer:
    directory = folder.path / name
    tokenizer = read_tokenizer(directory)
    if tokenizer.pad_token_id is None:
        raise UserError(f"{directory} names no pad_token in its vocabulary; it is needed to pad short prompts")
    where = folder.path / text_encoder
    try:
        config = read_clip_text(json_file.read(where / "config.json"))
    except UserError as error:
        raise UserError(f"{where}/config.json: {error}") from None
    backend = tokenizer.backend_tokenizer
    length = min(tokenizer.model_max_length, config.max_position_embeddings)
    loaded = Tokenizer(backend, length, tokenizer.pad_token_id, config.vocab_size, str(where))
    loaded([""])  # raises if the start, end or pad token has no row
    if beyond := sorted((i, word) for word, i in backend.get_vocab().items() if i >= config.vocab_size):
        warnings.warn(
            f"{where} has no rows for some words of the tokenizer (vocab_size is {config.vocab_size}), so prompts "
            f"can't use them: {few(word for _, word in beyond)}",
            UserWarning,
            stacklevel=4,
        )
    return loaded


def read_tokenizer(directory: pathlib.Path) -> Any:
    """Returns the folder's transformers CLIPTokenizer; raises UserError if its files are missing or broken."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # no warning that PyTorch is missing
    from transformers import CLIPTokenizer  # lazy: the import takes half a second

    if not (directory / "tokenizer.json").is_file() and not (directory / "vocab.json").is_file():
        raise UserError(f"{directory} holds neither tokenizer.json nor vocab.json; a CLIPTokenizer has one of them")
    try:
        return CLIPTokenizer.from_pretrained(str(directory), local_files_only=True)
    except Exception as error:  # tokenizers raises plain Exception for broken files
        raise UserError(
            f"{directory} can't be read as a CLIP tokenizer: {' '.join(str(error).split())[:200]}"
        ) from None
