"""Odd prompts and captions: ids within the vocabulary, or a UserError."""

import pytest
from mutations import TEXTS, damage_bytes, pick

from lcm_jax.interop.folder import read_folder
from lcm_jax.interop.tokenizer import load_tokenizer

WORDS = [
    "a red seven",
    "on a",
    "<|endoftext|>",
    "<|startoftext|>",
    "\x00",
    "🦄",
    "夕焼け",
    "é",
    "e\u0301",
    "\u202e",
    "\n",
    "x" * 5000,
    *TEXTS,
]


@pytest.fixture(scope="module")
def tokenizer(micro):
    return load_tokenizer(read_folder(micro))


def test_prompts(fuzz, tokenizer):
    known = tokenizer._backend.get_vocab_size()

    def case(rng, place):
        text = " ".join(pick(rng, WORDS) for _ in range(int(rng.integers(6))))
        if rng.random() < 0.5:
            damaged, _ = damage_bytes(rng, text.encode("utf-8", "surrogatepass"))
            text = damaged.decode("utf-8", pick(rng, ["replace", "surrogateescape", "ignore"]))
        yield repr(text)[:200]
        ids = tokenizer([text])
        assert ids.min() >= 0
        assert ids.max() < known
        assert isinstance(tokenizer.cut(text), str)

    fuzz(case, share=0.15)
