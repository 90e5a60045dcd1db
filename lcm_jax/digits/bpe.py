"""Makes a small CLIP tokenizer: byte-pair merges under which every word of a given text is one token.

The files are those of OpenAI's CLIP as transformers' CLIPTokenizer reads them (vocab.json, merges.txt). All 256 bytes
are in the vocabulary, so that any other text is spelled out rather than lost.
"""

import itertools
import json
import pathlib
from collections import Counter
from collections.abc import Iterable

END_OF_WORD = "</w>"
START, END = "<|startoftext|>", "<|endoftext|>"


def byte_alphabet() -> list[str]:
    """The character that stands for each byte 0..255: itself if it prints, else one from U+0100 on (as in GPT-2)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def train_merges(words: Iterable[str]) -> list[tuple[str, str]]:
    """Byte-pair encoding of `words`, continued until each of them is one token.

    The pair found in most words is merged first, ties in alphabetical order; applying the merges in this order, as any
    BPE tokenizer does, repeats the training and so ends in one token a word as well.
    """
    alphabet = byte_alphabet()
    spelled = []
    for word in sorted(set(words)):
        symbols = [alphabet[byte] for byte in word.encode()]
        spelled.append([*symbols[:-1], symbols[-1] + END_OF_WORD])
    merges = []
    while any(len(symbols) > 1 for symbols in spelled):
        pairs = Counter(pair for symbols in spelled for pair in itertools.pairwise(symbols))
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        spelled = [_merge(symbols, best) for symbols in spelled]
    return merges


def _merge(symbols: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    i = 0
    while i < len(symbols):
        if tuple(symbols[i : i + 2]) == pair:
            merged.append(pair[0] + pair[1])
            i += 2
        else:
            merged.append(symbols[i])
            i += 1
    return merged


def write_tokenizer(folder: pathlib.Path, words: Iterable[str], max_length: int) -> dict[str, int]:
    """Writes a CLIPTokenizer folder for lower-case `words`.

    Args: the words that become one token each; the longest text in tokens, start and end included.
    Returns its vocabulary, token -> id. The end-of-text token has the highest id: CLIP finds the end by that.
    """
    merges = train_merges(words)
    alphabet = byte_alphabet()
    tokens = [*alphabet, *(c + END_OF_WORD for c in alphabet), *("".join(pair) for pair in merges), START, END]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}  # two merges may spell the same token
    special = {"bos_token": START, "eos_token": END, "pad_token": END, "unk_token": END}
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": max_length, "do_lower_case": True, **special}
    folder.mkdir(parents=True)
    _write_json(folder / "vocab.json", vocabulary)
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *(" ".join(pair) for pair in merges), ""]))
    _write_json(folder / "tokenizer_config.json", settings)
    _write_json(folder / "special_tokens_map.json", special)
    return vocabulary


def _write_json(path: pathlib.Path, value: dict) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
