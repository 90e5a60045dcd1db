"""Builds a small CLIP tokenizer in which each of a set of words is one token.

The files are in the format of OpenAI's CLIP (vocab.json, merges.txt), as transformers' CLIPTokenizer reads it. All 256
bytes are in the vocabulary, so other text is split into bytes, not lost.
"""

import json
import pathlib
from collections.abc import Iterable
from typing import Any

END_OF_WORD = "</w>"
START, END = "<|startoftext|>", "<|endoftext|>"


def write_tokenizer(folder: pathlib.Path, words: Iterable[str], max_length: int) -> dict[str, int]:
    """Writes a CLIPTokenizer folder for lower-case `words`.

    Args:
      folder: the folder to create; must not exist.
      words: words that become one token each.
      max_length: maximum prompt length in tokens, including start and end.

    Returns:
      The vocabulary, token → id. The end-of-text token has the highest id, which CLIP uses to find the end.
    """
    vocabulary, merges = _trained(words)
    vocabulary = {token: i for i, token in enumerate([*vocabulary, START, END])}
    special = {"bos_token": START, "eos_token": END, "pad_token": END, "unk_token": END}
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": max_length, "do_lower_case": True, **special}
    folder.mkdir(parents=True)
    _write(folder / "vocab.json", vocabulary)
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *(" ".join(pair) for pair in merges), ""]))
    _write(folder / "tokenizer_config.json", settings)
    _write(folder / "special_tokens_map.json", special)
    return vocabulary


def _trained(words: Iterable[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Trains byte-pair encoding until no pair is left; returns the tokens in the order of their ids, and the merges."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers  # slow to import, so not at the top

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    letters = [*letters, *(letter + END_OF_WORD for letter in letters)]
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix=END_OF_WORD))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=2**20,  # no limit: more than there are pairs
        min_frequency=1,
        show_progress=False,
        end_of_word_suffix=END_OF_WORD,
        # Ids of letters break ties between equally frequent pairs. Passing them in order makes training
        # deterministic; the trainer would number them in hash table order.
        special_tokens=letters,
    )
    tokenizer.train_from_iterator(sorted(set(words)), trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return sorted(model["vocab"], key=model["vocab"].get), [tuple(pair) for pair in model["merges"]]


def _write(path: pathlib.Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
