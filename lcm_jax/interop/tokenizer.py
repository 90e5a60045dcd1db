"""The CLIP tokenizer of a folder: prompts to token ids, and what was cut off."""

from __future__ import annotations

import os
import pathlib
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lcm_jax.errors import UserError, few, plain
from lcm_jax.host import arguments, json_file
from lcm_jax.interop.folder import Folder
from lcm_jax.models import CLIPTextConfig

if TYPE_CHECKING:
    import tokenizers


class Tokenizer:
    """Turns prompts into the ids that the text encoder takes. Safe to call from several threads at once."""

    def __init__(self, backend: tokenizers.Tokenizer, max_length: int, pad_id: int, rows: int, where: str) -> None:
        """Initializes the tokenizer.

        Args:
          backend: a `tokenizers.Tokenizer`, whose settings are changed.
          max_length: the ids of a prompt.
          pad_id: the id that fills up.
          rows: of the text encoder's table of embeddings; ids are below.
          where: the text encoder's folder, for messages.
        """
        self.max_length = max_length
        # Set once: transformers' own call sets them anew each time, which isn't safe in threads.
        backend.enable_truncation(max_length)
        backend.enable_padding(length=max_length, pad_id=pad_id, pad_token=backend.id_to_token(pad_id))
        self._backend, self._rows, self._where = backend, rows, where
        self._vectors = _multi_vector_words({token.content for token in backend.get_added_tokens_decoder().values()})

    def __call__(self, prompts: Sequence[str]) -> np.ndarray:
        """Returns int32 (len(prompts), max_length): start token, prompt, end token, padding; too long ones are cut.

        Raises:
          UserError: a prompt that is no Unicode text, or has a word that the text encoder has no row for.
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
        """Returns the end of the prompt that does not fit into `max_length` ids; "" if all of it fits.

        A multi-vector word stands there as the words of its vectors.
        """
        prompt = self._expanded(prompt)
        overflowing = self._backend.encode(prompt).overflowing
        if not overflowing:
            return ""
        # the pieces' first and last tokens are the start and end token, which stand for no text: (0, 0)
        starts = [start for piece in overflowing for start, end in piece.offsets if end > start]
        return prompt[min(starts) :].strip() if starts else ""

    def _expanded(self, prompt: str) -> str:
        """Returns the prompt with each word of a multi-vector textual inversion followed by its other vectors' words.

        As in diffusers (`TextualInversionLoaderMixin.maybe_convert_prompt`), a word counts where the tokenizer finds it
        as a token, and is then replaced wherever its letters stand.
        """
        prompt = arguments.text("the prompt", prompt)
        if any(word in prompt for word in self._vectors):
            encoding = self._backend.encode(prompt, add_special_tokens=False)
            tokens = [token for piece in (encoding, *encoding.overflowing) for token in piece.tokens]
            for word in dict.fromkeys(token for token in tokens if token in self._vectors):
                prompt = prompt.replace(word, self._vectors[word])
        return prompt


def _multi_vector_words(added: set[str]) -> dict[str, str]:
    """Returns word → "word word_1 word_2 …" of the added tokens that have more than one vector."""
    found = {}
    for word in added:
        words = [word]
        while (following := f"{word}_{len(words)}") in added:
            words.append(following)
        if len(words) > 1:
            found[word] = " ".join(words)
    return found


def load_tokenizer(folder: Folder, name: str = "tokenizer", text_encoder: str = "text_encoder") -> Tokenizer:
    """Reads the CLIP tokenizer in the subfolder `name`, in either file format that transformers writes.

    Prompts are as long as both the tokenizer's `model_max_length` and the text encoder's position table allow. Words
    that the text encoder has no row for are a warning here, as diffusers reads such folders, and an error in a prompt.

    Raises:
      UserError: the files are missing or broken; the text encoder has no row for the tokens of every prompt.
    """
    directory = folder.path / name
    tokenizer = read_tokenizer(directory)
    if tokenizer.pad_token_id is None:
        raise UserError(f"{directory} names no pad_token that its vocabulary has, which fills short prompts up")
    where = folder.path / text_encoder
    try:
        config = CLIPTextConfig.from_dict(json_file.read(where / "config.json"))
    except UserError as error:
        raise UserError(f"{where}/config.json: {error}") from None
    backend = tokenizer.backend_tokenizer
    length = min(tokenizer.model_max_length, config.max_position_embeddings)
    loaded = Tokenizer(backend, length, tokenizer.pad_token_id, config.vocab_size, str(where))
    loaded([""])  # without rows for the start and end token no prompt can be encoded
    if beyond := sorted((i, word) for word, i in backend.get_vocab().items() if i >= config.vocab_size):
        warnings.warn(
            f"{where} has no rows for words of the tokenizer (vocab_size is {config.vocab_size}), so prompts can't "
            f"have them: {few(word for _, word in beyond)}",
            UserWarning,
            stacklevel=2,
        )
    return loaded


def read_tokenizer(directory: pathlib.Path) -> Any:
    """Returns transformers' CLIPTokenizer of a folder; raises UserError if its files are missing or broken."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # else it says that PyTorch is missing, which is meant so
    from transformers import CLIPTokenizer  # imported late: it takes half a second

    if not (directory / "tokenizer.json").is_file() and not (directory / "vocab.json").is_file():
        raise UserError(f"{directory} holds neither tokenizer.json nor vocab.json; a CLIPTokenizer has one of them")
    try:
        return CLIPTokenizer.from_pretrained(str(directory), local_files_only=True)
    except Exception as error:  # tokenizers raises bare Exception for a broken file
        raise UserError(
            f"{directory} can't be read as a CLIP tokenizer: {' '.join(str(error).split())[:200]}"
        ) from None
