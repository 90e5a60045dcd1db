"""Token ids equal those of diffusers; what does not fit, or has no embedding, is reported."""

import concurrent.futures
import json
import shutil

import numpy as np
import pytest
import torch
from fixtures_folders import build_pipeline, write_tokenizer

from lcm_jax.errors import UserError
from lcm_jax.interop.folder import read_folder
from lcm_jax.interop.tokenizer import load_tokenizer

PROMPTS = [
    "",
    "a red seven",
    "  A  RED,  seven!? it's 42 ",
    "naïve Ünïcödé 七 🙂",
    "<|endoftext|> inside",
    "seven red seven red seven red seven red seven red seven red seven red seven red seven red",
]


@pytest.fixture(scope="module")
def tokenizer(teacher_folder):
    return load_tokenizer(read_folder(teacher_folder, only=()))


def test_ids_equal_the_peers(tokenizer, teacher_pipeline):
    theirs = teacher_pipeline.tokenizer(PROMPTS, padding="max_length", max_length=16, truncation=True)["input_ids"]
    ours = tokenizer(PROMPTS)
    assert ours.dtype == np.int32
    np.testing.assert_array_equal(ours, theirs)


def test_both_file_formats(teacher_folder, tokenizer, tmp_path):
    copy = shutil.copytree(teacher_folder, tmp_path / "model")
    shutil.rmtree(copy / "tokenizer")
    write_tokenizer(copy / "tokenizer")
    assert not (copy / "tokenizer/tokenizer.json").exists()
    np.testing.assert_array_equal(load_tokenizer(read_folder(copy, only=()))(PROMPTS), tokenizer(PROMPTS))


def test_what_is_cut_off_is_said(tokenizer):
    fits = " ".join(["red"] * 14)
    assert [tokenizer.cut(prompt) for prompt in PROMPTS[:4]] == [""] * 3 + [tokenizer.cut(PROMPTS[3])]
    assert tokenizer.cut(fits) == ""
    assert tokenizer.cut(f"{fits} and a Blue Zero.") == "and a Blue Zero."
    assert tokenizer.cut(PROMPTS[-1]) == "seven red seven red"


def test_no_prompts(tokenizer):
    assert tokenizer([]).shape == (0, 16)


def test_threads_share_it(tokenizer):
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for ids, prompt in zip(pool.map(lambda p: tokenizer([p]), PROMPTS * 20), PROMPTS * 20, strict=True):
            np.testing.assert_array_equal(ids, tokenizer([prompt]))


def test_missing_and_broken_files(teacher_folder, tmp_path):
    copy = shutil.copytree(teacher_folder, tmp_path / "model")
    (copy / "tokenizer/tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="tokenizer can't be read as a CLIP tokenizer"):
        load_tokenizer(read_folder(copy, only=()))
    (copy / "tokenizer/tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"neither tokenizer.json nor vocab.json"):
        load_tokenizer(read_folder(copy, only=()))


# ---- words that were added to the vocabulary

ADDED = {"<cat>": 3, "<dog>": 1, "style": 2, "Hat": 2}  # word -> vectors
WITH_ADDED = [
    "a <cat>",
    "<cat><cat> red",
    "<cat>, <dog> and <CAT>",
    "a<cat>b style styled restyle",
    "a <cat>_1 <cat> <cat>_2_1 style_1_2",
    "Hat hat hat_1",
    "red red red red red red red red red red red red <cat> seven",  # cut within the vectors
    "no word of them",
]


def test_without_a_padding_token(teacher_folder, tmp_path):
    copy = shutil.copytree(teacher_folder, tmp_path / "model")
    shutil.rmtree(copy / "tokenizer")
    write_tokenizer(copy / "tokenizer")
    (copy / "tokenizer/special_tokens_map.json").write_text('{"pad_token": null}')
    with pytest.raises(UserError, match="tokenizer names no pad_token"):
        load_tokenizer(read_folder(copy, only=()))


@pytest.fixture(scope="module")
def inverted(tmp_path_factory):
    """A pipeline of diffusers with textual inversions, and its folder."""
    folder = tmp_path_factory.mktemp("inverted")
    pipeline = build_pipeline(folder / "tokenizer")
    for word, vectors in ADDED.items():
        pipeline.load_textual_inversion({word: torch.randn(vectors, 16)})
    pipeline.save_pretrained(folder / "model")
    return pipeline, folder / "model"


def ids_in_diffusers(pipeline, prompts):
    """The ids that `encode_prompt` passes to the text encoder."""
    converted = pipeline.maybe_convert_prompt(prompts, pipeline.tokenizer)
    return pipeline.tokenizer(converted, padding="max_length", max_length=16, truncation=True)["input_ids"]


def test_a_word_of_several_vectors_stands_for_all(inverted):
    pipeline, folder = inverted
    expected = ids_in_diffusers(pipeline, WITH_ADDED)
    assert expected[0][2:6] == [*pipeline.tokenizer.convert_tokens_to_ids(["<cat>", "<cat>_1", "<cat>_2"]), 519]
    tokenizer = load_tokenizer(read_folder(folder, only=()))
    np.testing.assert_array_equal(tokenizer(WITH_ADDED), expected)
    assert [tokenizer.cut(prompt) for prompt in WITH_ADDED[-2:]] == ["<cat>_2 seven", ""]


def test_added_words_of_an_older_folder(inverted, tmp_path):
    """vocab.json, merges.txt and added_tokens.json, as transformers 4 wrote them."""
    pipeline, folder = inverted
    copy = shutil.copytree(folder, tmp_path / "model")
    shutil.rmtree(copy / "tokenizer")
    write_tokenizer(copy / "tokenizer")
    added = {word: i for word, i in pipeline.tokenizer.get_added_vocab().items() if i >= 520}
    (copy / "tokenizer/added_tokens.json").write_text(json.dumps(added))
    tokenizer = load_tokenizer(read_folder(copy, only=()))
    np.testing.assert_array_equal(tokenizer(WITH_ADDED), ids_in_diffusers(pipeline, WITH_ADDED))


def test_words_without_an_embedding(inverted, teacher_folder, tmp_path):
    copy = shutil.copytree(teacher_folder, tmp_path / "model")
    shutil.rmtree(copy / "tokenizer")
    shutil.copytree(inverted[1] / "tokenizer", copy / "tokenizer")
    known = r"text_encoder has no rows for some words .* \(vocab_size is 520\), .*: <cat>, <cat>_1, <cat>_2 and 5 more"
    with pytest.warns(UserWarning, match=known):
        tokenizer = load_tokenizer(read_folder(copy, only=()))
    assert tokenizer(["a red seven", f"{'red ' * 14}<cat>"]).max() < 520  # what is cut needs no row
    with pytest.raises(UserError, match=r"no row for the word '<dog>' of 'a <dog>': it is token 523 .* is 520"):
        tokenizer(["a red seven", "a <dog>"])


def test_a_text_encoder_without_rows_for_every_prompt(teacher_folder, tmp_path):
    copy = shutil.copytree(teacher_folder, tmp_path / "model")
    config = json.loads((copy / "text_encoder/config.json").read_text())
    (copy / "text_encoder/config.json").write_text(json.dumps({**config, "vocab_size": 519}))
    with pytest.raises(UserError, match=r"text_encoder has no row for the word '<\|endoftext\|>'"):
        load_tokenizer(read_folder(copy, only=()))


def test_what_is_no_text(tokenizer):
    with pytest.raises(UserError, match=r"the prompt is 'caf.udce9', which is not UTF-8"):
        tokenizer(["caf\udce9"])
