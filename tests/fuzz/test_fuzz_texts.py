"""Odd prompts: ids of the vocabulary, or a UserError."""

from mutations import TEXTS, damage_bytes, pick

WORDS = [
    "a red seven",
    "on a",
    "<|endoftext|>",
    "<|startoftext|>",
    "\x00",
    "🦄",
    "夕焼け",
    "e\u0301",
    "\u202e",
    "x" * 5000,
]


def test_prompts(fuzz, pipe):
    known = pipe.networks["text_encoder"].network.config.vocab_size

    def case(rng, place):
        text = " ".join(pick(rng, [*WORDS, *TEXTS]) for _ in range(int(rng.integers(6))))
        if rng.random() < 0.5:
            damaged, _ = damage_bytes(rng, text.encode("utf-8", "surrogatepass"))
            text = damaged.decode("utf-8", pick(rng, ["replace", "surrogateescape", "ignore"]))
        yield repr(text)
        ids = pipe.tokenizer([text])
        assert ids.min() >= 0
        assert ids.max() < known
        assert isinstance(pipe.tokenizer.cut(text), str)
        pipe(text, steps=1, negative_prompt=pick(rng, [None, text]))

    fuzz(case, share=0.1)
