"""Reading a model folder and writing it keeps it equal."""

import numpy as np
import pytest
from fixtures_folders import build_pipeline
from folder_files import TEXT_FILE, UNET_FILE, VAE_FILE, assert_same_folder, raw, rewrite

from lcm_jax.interop.folder import read_folder
from lcm_jax.interop.folder_writing import write_folder


@pytest.mark.parametrize(
    "options",
    [{}, {"variant": "fp16"}, {"max_shard_size": "60KB"}, {"variant": "fp16", "max_shard_size": "60KB"}],
    ids=str,
)
def test_read_then_written_is_the_same(teacher_pipeline, tmp_path, options):
    teacher_pipeline.save_pretrained(tmp_path / "theirs", **options)
    (tmp_path / "theirs/unet/notes.txt").write_text("mine")
    if "max_shard_size" in options:
        assert len(list((tmp_path / "theirs/unet").glob("*-of-*.safetensors"))) > 1
    write_folder(read_folder(tmp_path / "theirs"), tmp_path / "ours")
    assert_same_folder(tmp_path / "ours", tmp_path / "theirs")


def test_lcm_folder_read_then_written_is_the_same(lcm_folder, tmp_path):
    write_folder(read_folder(lcm_folder), tmp_path / "ours")
    assert_same_folder(tmp_path / "ours", lcm_folder)


def test_half_precision_stays(tmp_path, copy):
    import ml_dtypes

    rewrite(copy / UNET_FILE, lambda t: {key: array.astype(ml_dtypes.bfloat16) for key, array in t.items()})
    folder = read_folder(copy)
    assert folder.components["unet"].params["conv_in.kernel"].dtype == ml_dtypes.bfloat16
    write_folder(folder, tmp_path / "ours")
    assert_same_folder(tmp_path / "ours", copy)


def test_parameters_are_in_our_layout(teacher_folder, teacher_pipeline):
    theirs = {name: p.detach().numpy() for name, p in teacher_pipeline.unet.named_parameters()}
    ours = read_folder(teacher_folder).components["unet"].params
    assert len(ours) == len(theirs)
    np.testing.assert_array_equal(ours["conv_in.kernel"][1, 2, 3, 4], theirs["conv_in.weight"][4, 3, 1, 2])
    np.testing.assert_array_equal(ours["time_embedding.linear_1.kernel"], theirs["time_embedding.linear_1.weight"].T)
    np.testing.assert_array_equal(ours["conv_norm_out.scale"], theirs["conv_norm_out.weight"])


def test_old_vae_names_are_read_and_new_ones_written(copy, tmp_path):
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def to_old(tensors):
        renamed = {}
        for key, array in tensors.items():
            for new, name in old.items():
                if f".{new}." in key:
                    key = key.replace(f".{new}.", f".{name}.")
                    array = array[:, :, None, None] if array.ndim == 2 and name != "value" else array
            renamed[key] = array
        return renamed

    present = raw(copy / VAE_FILE)
    rewrite(copy / VAE_FILE, to_old)
    assert raw(copy / VAE_FILE).keys() != present.keys()
    write_folder(read_folder(copy), tmp_path / "ours")
    assert raw(tmp_path / "ours" / VAE_FILE) == present
    assert_same_folder(tmp_path / "ours", copy, but=(VAE_FILE,))


def test_clip_prefix_and_buffers_are_written_as_read(copy, tmp_path):
    def older(tensors):
        assert not any(key.startswith("text_model.") for key in tensors)
        prefixed = {f"text_model.{key}": array for key, array in tensors.items()}
        return {**prefixed, "text_model.embeddings.position_ids": np.arange(16)[None]}

    plain = read_folder(copy).components["text_encoder"].params
    rewrite(copy / TEXT_FILE, older)
    folder = read_folder(copy)
    assert folder.components["text_encoder"].params.keys() == plain.keys()
    for path, array in plain.items():
        np.testing.assert_array_equal(folder.components["text_encoder"].params[path], array)
    write_folder(folder, tmp_path / "ours")
    assert_same_folder(tmp_path / "ours", copy)


def test_the_other_parts_of_a_clip_model_are_written_as_read(copy, tmp_path):
    """transformers reads a text encoder from such a file too."""
    import transformers

    others = {
        "logit_scale": np.float32(4.6)[...],
        "text_projection.weight": np.ones((16, 16), np.float32),
        "visual_projection.weight": np.full((16, 16), np.nan, np.float32),  # not used, so not looked at
        "vision_model.embeddings.class_embedding": np.zeros(8, np.float16),
        "vision_model.embeddings.position_ids": np.arange(5)[None],
    }
    rewrite(copy / TEXT_FILE, lambda t: {**{f"text_model.{key}": array for key, array in t.items()}, **others})
    folder = read_folder(copy)
    assert folder.components["text_encoder"].source.buffers.keys() == others.keys()
    write_folder(folder, tmp_path / "ours")
    assert_same_folder(tmp_path / "ours", copy)
    loaded = transformers.CLIPTextModel.from_pretrained(tmp_path / "ours/text_encoder").state_dict()
    np.testing.assert_array_equal(
        loaded["final_layer_norm.bias"], folder.components["text_encoder"].params["final_layer_norm.bias"]
    )


def test_only_reads_what_is_asked_and_copies_the_rest(copy, tmp_path):
    folder = read_folder(copy, only=("vae",))
    assert list(folder.components) == ["vae"]
    write_folder(folder, tmp_path / "ours")
    assert_same_folder(tmp_path / "ours", copy)


def test_v_prediction_is_read_from_the_folder(tmp_path):
    pipeline = build_pipeline(tmp_path / "tokenizer", prediction_type="v_prediction")
    pipeline.save_pretrained(tmp_path / "model")
    assert read_folder(tmp_path / "model", only=()).schedule.prediction_type == "v_prediction"
