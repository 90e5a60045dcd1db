"""Token ids equal those of the peer's tokenizer; what does not fit is said."""

import concurrent.futures
import shutil

import numpy as np
import pytest

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
    from fixtures_folders import write_tokenizer

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
