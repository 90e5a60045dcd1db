"""LoRA files without another library: every spelling, and errors."""

import json

import numpy as np
import pytest
from fixtures_loras import assert_same_differences, differences, kernels, random_lora
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from lcm_jax.adapters import lora
from lcm_jax.errors import UserError
from lcm_jax.interop.folder import read_folder
from lcm_jax.interop.lora.file import read_lora, write_lora

UNET_KEY = "unet.mid_block.resnets.0.conv1.lora_A.weight"
UNET_UP = "unet.mid_block.resnets.0.conv1.lora_B.weight"
KOHYA_KEY = "lora_unet_mid_block_resnets_0_conv1.lora_down.weight"


@pytest.fixture(scope="module")
def folder(teacher_folder):
    return read_folder(teacher_folder)


@pytest.fixture(scope="module")
def shapes(folder):
    return kernels(folder)


@pytest.fixture(scope="module")
def adapters(folder):
    return random_lora(folder)


@pytest.fixture
def tensors(adapters, tmp_path):
    """Of a file in diffusers' dialect, without its header: alpha is then the rank."""
    return load_file(write_lora(tmp_path / "written.safetensors", adapters))


def save(tmp_path, tensors, metadata=None):
    save_file(
        {key: np.ascontiguousarray(array) for key, array in tensors.items()}, tmp_path / "x.safetensors", metadata
    )
    return tmp_path / "x.safetensors"


def edited(tensors, change):
    return {change(key): array for key, array in tensors.items()}


@pytest.mark.parametrize("dialect", ["diffusers", "kohya"])
def test_there_and_back(adapters, shapes, tmp_path, dialect):
    found = read_lora(write_lora(tmp_path / "new/x.safetensors", adapters, dialect=dialect), shapes)
    assert found.keys() == adapters.keys()
    for component, adapter in adapters.items():
        assert found[component].params.keys() == adapter.params.keys()
        assert found[component].ranks == adapter.ranks
        if dialect == "diffusers":
            assert found[component].alphas == adapter.alphas
        else:  # one alpha, B in its scale
            assert len(set(found[component].alphas.values())) == 1
        for path, array in adapter.params.items():
            if dialect == "diffusers" or path.endswith(lora.A):
                np.testing.assert_array_equal(found[component].params[path], array)
    assert_same_differences(differences(found), differences(adapters))
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["x.safetensors"]


def test_keys_of_the_dialects(adapters, tmp_path):
    ours = load_file(write_lora(tmp_path / "a.safetensors", adapters))
    assert ours[UNET_KEY].shape == (2, 16, 3, 3)
    assert ours[UNET_UP].shape == (16, 2, 1, 1)
    assert ours["text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_B.weight"].shape == (32, 4)
    assert not any("alpha" in key for key in ours)  # an error in diffusers
    kohya = load_file(write_lora(tmp_path / "b.safetensors", adapters, dialect="kohya"))
    assert kohya[KOHYA_KEY].shape == (2, 16, 3, 3)
    assert kohya["lora_unet_mid_block_resnets_0_conv1.alpha"] == 6.0  # as all; its B is a sixth
    np.testing.assert_allclose(kohya[KOHYA_KEY.replace("down", "up")], ours[UNET_UP] / 6, rtol=1e-6)
    assert kohya["lora_te_text_model_encoder_layers_0_mlp_fc1.alpha"] == 2.0
    with safe_open(tmp_path / "a.safetensors", "np") as file:
        header = json.loads(file.metadata()["lora_adapter_metadata"])
    assert (header["unet.r"], header["unet.lora_alpha"], header["text_encoder.lora_alpha"]) == (4, 6, 2)
    assert header["unet.rank_pattern"]["mid_block.resnets.0.conv1"] == 2


SPELLINGS = {
    "no component": lambda key: key.removeprefix("unet.").removeprefix("text_encoder."),
    "no text_model": lambda key: key.replace("text_model.", ""),
    "wrapped": lambda key: key.replace("unet.", "unet.base_model.model."),
    "wrapped outside": lambda key: "base_model.model." + key,
    "named adapter": lambda key: key.replace("lora_A.", "lora_A.default.").replace("lora_B.", "lora_B.default_0."),
    "down and up": lambda key: key.replace("lora_A.", "lora.down.").replace("lora_B.", "lora.up."),
    "linear layer": lambda key: key.replace("lora_A", "lora_linear_layer.down").replace(
        "lora_B", "lora_linear_layer.up"
    ),
    "processors": lambda key: (
        key.replace("to_q.lora_A", "processor.to_q_lora.down")
        .replace("to_q.lora_B", "processor.to_q_lora.up")
        .replace("to_out.0.lora_A", "processor.to_out_lora.down")
        .replace("to_out.0.lora_B", "processor.to_out_lora.up")
        .replace("out_proj.lora_A", "to_out_lora.down")
        .replace("out_proj.lora_B", "to_out_lora.up")
    ),
    "one of each": lambda key: (
        key.replace("lora_A", "lora.down").replace("lora_B", "lora.up").removeprefix("unet.") if "to_k" in key else key
    ),
}


@pytest.mark.filterwarnings("ignore:.*doesn't store its alpha")
@pytest.mark.parametrize("change", SPELLINGS.values(), ids=SPELLINGS)
def test_spellings(tensors, shapes, adapters, tmp_path, change):
    changed = edited(tensors, change)
    assert changed.keys() != tensors.keys()
    found = read_lora(save(tmp_path, changed), shapes)
    for component, adapter in adapters.items():
        for path, array in adapter.params.items():
            np.testing.assert_array_equal(found[component].params[path], array)
        assert found[component].alphas == found[component].ranks == adapter.ranks


@pytest.mark.parametrize("prefix", ["lora_te_", "lora_te1_", "text_encoder.lora_te_"])
def test_kohya_of_a_text_encoder(adapters, shapes, tmp_path, prefix):
    tensors = load_file(write_lora(tmp_path / "a.safetensors", adapters, dialect="kohya"))
    found = read_lora(save(tmp_path, edited(tensors, lambda key: key.replace("lora_te_", prefix))), shapes)
    assert_same_differences(differences(found), differences(adapters))


def test_kohya_alphas_that_differ(adapters, shapes, tmp_path):
    tensors = load_file(write_lora(tmp_path / "a.safetensors", adapters, dialect="kohya"))
    tensors["lora_unet_mid_block_resnets_0_conv1.alpha"] = np.float32(1.5)
    alphas = read_lora(save(tmp_path, tensors), shapes)["unet"].alphas
    assert {module for module, alpha in alphas.items() if alpha == 1.5} == {"mid_block.resnets.0.conv1"}
    assert set(alphas.values()) == {1.5, 6.0}


def test_kohya_alpha_left_out_is_the_rank(adapters, shapes, tmp_path):
    tensors = load_file(write_lora(tmp_path / "a.safetensors", adapters, dialect="kohya"))
    found = read_lora(save(tmp_path, {k: a for k, a in tensors.items() if "alpha" not in k}), shapes)
    assert found["unet"].alphas == found["unet"].ranks


def test_alpha_beside_diffusers_keys(tensors, shapes, tmp_path):
    """diffusers rejects such a file, but its meaning is clear."""
    tensors["unet.mid_block.resnets.0.conv1.alpha"] = np.float32([7.0])
    alphas = read_lora(save(tmp_path, tensors), shapes)["unet"].alphas
    assert alphas["mid_block.resnets.0.conv1"] == 7.0
    assert alphas["mid_block.resnets.1.conv1"] == 2.0


def test_one_by_one_convolutions_may_be_flat(tensors, shapes, adapters, tmp_path):
    key = "unet.mid_block.attentions.0.proj_in.lora_A.weight"
    tensors[key] = tensors[key][:, :, 0, 0]
    tensors[UNET_UP] = tensors[UNET_UP][:, :, 0, 0]
    to_q = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_B.weight"
    assert tensors[to_q].ndim == 2
    tensors[to_q] = tensors[to_q][:, :, None, None]
    found = read_lora(save(tmp_path, tensors), shapes)["unet"].params
    for path, array in adapters["unet"].params.items():
        np.testing.assert_array_equal(found[path], array)


def test_part_of_the_networks(tensors, shapes, tmp_path):
    found = read_lora(save(tmp_path, {UNET_KEY: tensors[UNET_KEY], UNET_UP: tensors[UNET_UP]}), shapes)
    assert list(found) == ["unet"]
    assert list(found["unet"].alphas) == ["mid_block.resnets.0.conv1"]


def test_header_of_one_model_names_no_component(tensors, shapes, tmp_path):
    """As a model's own `save_lora_adapter` writes it."""
    unet = {key: array for key, array in tensors.items() if key.startswith("unet.")}
    header = {"lora_adapter_metadata": json.dumps({"r": 4, "lora_alpha": 9, "alpha_pattern": {"to_q": 5}})}
    alphas = read_lora(save(tmp_path, unet, header), shapes)["unet"].alphas
    assert {alpha for module, alpha in alphas.items() if module.endswith(".to_q")} == {5.0}
    assert {alpha for module, alpha in alphas.items() if not module.endswith(".to_q")} == {9.0}


def test_alpha_pattern_in_the_old_spelling_of_a_text_encoder(tensors, shapes, tmp_path):
    pattern = {"text_model.encoder.layers.0.mlp.fc1": 7}
    header = {"lora_adapter_metadata": json.dumps({"text_encoder.alpha_pattern": pattern})}
    alphas = read_lora(save(tmp_path, tensors, header), shapes)["text_encoder"].alphas
    assert [module for module, alpha in alphas.items() if alpha == 7] == ["encoder.layers.0.mlp.fc1"]


def test_others_may_read_what_is_written(adapters, tmp_path):
    plain = tmp_path / "plain"
    plain.write_text("")
    assert write_lora(tmp_path / "x.safetensors", adapters).stat().st_mode == plain.stat().st_mode


# ---- what may be wrong


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a, b: (np.full_like(a, np.inf), b), f"{UNET_KEY} has values that are not finite"),
        (lambda a, b: (a, np.full_like(b, np.nan)), f"{UNET_UP} has values that are not finite"),
        (lambda a, b: (a.astype(np.int8), b), f"{UNET_KEY} is int8; only real weights are supported"),
        (lambda a, b: (a.astype(bool), b), f"{UNET_KEY} is bool; only real weights are supported"),
        (lambda a, b: (a, b.astype(np.complex64)), f"{UNET_UP} is complex64; only real weights are supported"),
        (lambda a, b: (a[:0], b[:, :0]), f"{UNET_KEY} is empty"),
        (lambda a, b: (np.full(a.shape, np.nan, "bfloat16"), b), f"{UNET_KEY} has values that are not finite"),
        (lambda a, b: (np.full(a.shape, np.nan, "float8_e4m3fn"), b), f"{UNET_KEY} has values that are not finite"),
        (lambda a, b: (a, np.full(b.shape, np.inf, "float8_e5m2")), f"{UNET_UP} has values that are not finite"),
        (lambda a, b: (a, np.full(b.shape, 1e300)), f"{UNET_UP} has values that are not finite in float32"),
        (lambda a, b: (a[0, 0, 0, 0][...], b), rf"{UNET_KEY} is \(1,\) .* should be \(rank, in"),
        (lambda a, b: (a, b[0]), rf"ranks .* {UNET_UP} is \(2, 1, 1\)"),
        (lambda a, b: (a[..., None], b), rf"{UNET_KEY} is \(2, 16, 3, 3, 1\) and should be \(2, 16, 3, 3\)"),
    ],
    ids=[
        *("inf", "nan", "int8", "bool", "complex", "rank 0", "bfloat16", "float8", "float8 inf", "float64"),
        *("scalar", "flat", "five axes"),
    ],
)
def test_values_that_can_not_be_used(tensors, shapes, tmp_path, change, message):
    tensors[UNET_KEY], tensors[UNET_UP] = change(tensors[UNET_KEY], tensors[UNET_UP])
    fails(save(tmp_path, tensors), shapes, message)


def fails(path, shapes, message):
    with pytest.raises(UserError, match=message) as error:
        read_lora(path, shapes)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("unet.mid_block.resnets.0.conv1.lora_magnitude_vector", "a DoRA"),
        ("lora_unet_mid_block_resnets_0_conv1.dora_scale", "a DoRA"),
        ("lora_unet_mid_block_resnets_0_conv1.hada_w1_a", "a LoHa"),
        ("lora_unet_mid_block_resnets_0_conv1.lokr_w1", "a LoKr"),
        ("lora_unet_mid_block_resnets_0_conv1.lora_mid.weight", "a LoCon with a Tucker core"),
        ("unet.mid_block.resnets.0.conv1.lora_B.bias", "a LoRA with biases"),
        ("lora_unet_mid_block_resnets_0_conv1.a1.weight", "a GLoRA"),
    ],
)
def test_other_adapters_are_refused_by_name(tensors, shapes, tmp_path, key, kind):
    fails(save(tmp_path, {**tensors, key: np.zeros(2, np.float32)}), shapes, f"it holds {kind} .*only plain LoRA")


def test_dora_of_the_header(tensors, shapes, tmp_path):
    header = {"lora_adapter_metadata": json.dumps({"unet.use_dora": True, "unet.lora_alpha": 4})}
    fails(save(tmp_path, tensors, header), shapes, "it holds a DoRA")


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("{", "in its header can't be read as JSON"),
        ('{"unet.lora_alpha": "x"}', "the alpha of .* is 'x'"),
        ('{"unet.alpha_pattern": {"[": 3}}', r"alpha_pattern has '\['"),
        ('{"unet.alpha_pattern": {"(a+)+$": 3}}', r"alpha_pattern has '\(a\+\)\+\$', a group that repeats"),
        ('{"unet.lora_alpha": 1e39}', "the alpha of .* is 1e\\+39"),
        ('{"unet.alpha_pattern": [3]}', "alpha_pattern should be a JSON object, found list"),
        ('{"lora_alpha": 3}', "doesn't name its component, one of text_encoder, unet"),
    ],
)
def test_broken_header(tensors, shapes, tmp_path, header, message):
    fails(save(tmp_path, tensors, {"lora_adapter_metadata": header}), shapes, message)


def test_unknown_module(tensors, shapes, tmp_path):
    path = save(
        tmp_path, edited(tensors, lambda key: key.replace("mid_block.resnets.0.conv1", "mid_block.resnets.9.conv1"))
    )
    fails(path, shapes, r"unet has no module mid_block.resnets.9.conv1; did you mean 'mid_block.resnets.\d.conv\d'")


def test_unknown_module_of_kohya(adapters, shapes, tmp_path):
    tensors = load_file(write_lora(tmp_path / "a.safetensors", adapters, dialect="kohya"))
    path = save(tmp_path, edited(tensors, lambda key: key.replace("down_blocks_0_", "down_blocks_7_")))
    fails(
        path,
        shapes,
        r"no module down_blocks_7_.*\(16 of its 91 modules are not in this model: .* and 13 more\); .* another base",
    )


def test_unknown_component(tensors, shapes, tmp_path):
    path = save(tmp_path, edited(tensors, lambda key: key.replace("text_encoder.", "text_encoder_2.")))
    fails(
        path, shapes, "it was trained on SDXL; this model has text width 16: 12 of its 91 modules are not in this model"
    )
    path = save(tmp_path, {key.replace("text_encoder.", "lora_te2_"): array for key, array in tensors.items()})


def test_unknown_tensor(tensors, shapes, tmp_path):
    fails(
        save(tmp_path, {**tensors, "conv_in.weight": np.zeros(3, np.float32)}),
        shapes,
        "conv_in.weight is not a tensor of",
    )


def test_wrong_base(tensors, shapes, tmp_path):
    wider = {key: np.repeat(a, 2, axis=1) if ".lora_A." in key else a for key, a in tensors.items()}
    message = (
        r"it was trained on a model \(text width 32\); this model has text width 16: 12 of its 12 modules don't fit "
        r"this model's text_encoder; text_encoder.*lora_A.weight is .* and should be "
    )
    fails(save(tmp_path, wider), shapes, message)


def test_rank_mismatch(tensors, shapes, tmp_path):
    tensors[UNET_UP] = tensors[UNET_UP][:, :1]
    fails(
        save(tmp_path, tensors),
        shapes,
        r"the ranks of mid_block.resnets.0.conv1 differ: .*\(2, 16, 3, 3\).*\(16, 1, 1, 1\)",
    )


@pytest.mark.parametrize(("lost", "what"), [(UNET_UP, "up"), (UNET_KEY, "down")])
def test_half_of_a_module(tensors, shapes, tmp_path, lost, what):
    del tensors[lost]
    fails(save(tmp_path, tensors), shapes, f"conv1.lora_.* has no counterpart: the {what} weights are missing")


def test_alpha_alone(tensors, shapes, tmp_path):
    tensors["unet.conv_in.alpha"] = np.float32(1.0)
    fails(save(tmp_path, tensors), shapes, "unet.conv_in.alpha has no counterpart")


@pytest.mark.parametrize(
    "alpha", [np.float32(np.nan), np.float64(1e39), np.complex64(1), np.bool_(True), np.ones(2, np.float32)]
)
def test_alpha_is_no_number(tensors, shapes, tmp_path, alpha):
    tensors["unet.mid_block.resnets.0.conv1.alpha"] = alpha
    fails(save(tmp_path, tensors), shapes, r"conv1\.alpha should be one finite number, found")


@pytest.mark.parametrize("dtype", ["int64", "int8", "float8_e4m3fn", "bfloat16", "float64"])
def test_alpha_of_any_dtype(tensors, shapes, tmp_path, dtype):
    tensors["unet.mid_block.resnets.0.conv1.alpha"] = np.array(8, dtype)
    assert read_lora(save(tmp_path, tensors), shapes)["unet"].alphas["mid_block.resnets.0.conv1"] == 8.0


def test_same_tensor_in_two_spellings(tensors, shapes, tmp_path):
    tensors[KOHYA_KEY] = tensors[UNET_KEY]
    fails(save(tmp_path, tensors), shapes, "are the same tensor in two spellings")


def test_truncated(tensors, shapes, tmp_path):
    path = save(tmp_path, tensors)
    path.write_bytes(path.read_bytes()[:-100])
    fails(path, shapes, "can't be read as safetensors")


def test_empty(shapes, tmp_path):
    fails(save(tmp_path, {}), shapes, "holds no tensor")


def test_no_such_file(shapes, tmp_path):
    fails(tmp_path / "x.safetensors", shapes, "there is no LoRA file")
    fails(tmp_path, shapes, "holds no LoRA: no pytorch_lora_weights.safetensors, adapter_model.safetensors or")
    (tmp_path / "x.bin").write_bytes(b"")
    fails(tmp_path / "x.bin", shapes, "is a pickle")
    fails(tmp_path, shapes, "or other .safetensors file; x.bin can't be read: loading a pickle can run any code")
    fails(tmp_path / ("x" * 300), shapes, "can't be read: File name too long")


def test_file_of_a_folder(tensors, shapes, adapters, tmp_path):
    """As in diffusers: the file with its own default name, else the only one."""
    (tmp_path / "written.safetensors").rename(tmp_path / "my style.safetensors")
    assert read_lora(tmp_path, shapes)["unet"].ranks == adapters["unet"].ranks
    save(tmp_path, tensors)
    fails(tmp_path, shapes, r"holds 2 .safetensors files, .* the path of one \(my style.safetensors, x.safetensors")
    save(tmp_path, {"x": np.ones(1)}).rename(tmp_path / "pytorch_lora_weights.safetensors")
    fails(tmp_path, shapes, "pytorch_lora_weights.safetensors: x is not a tensor of a LoRA")


def test_where_it_can_not_be_written(adapters, tmp_path):
    with pytest.raises(UserError, match=r"should end in .safetensors"):
        write_lora(tmp_path / "x.bin", adapters)
    with pytest.raises(UserError, match="dialect is 'a1111'"):
        write_lora(tmp_path / "x.safetensors", adapters, dialect="a1111")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="can't be written"):
        write_lora(tmp_path / "file/x.safetensors", adapters)


def test_full_disk(adapters, tmp_path, monkeypatch):
    def full(*_, **__):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("lcm_jax.interop.weights.save_file", full)
    with pytest.raises(UserError, match=r"x.safetensors can't be written: .*No space left"):
        write_lora(tmp_path / "x.safetensors", adapters)
    assert not list(tmp_path.iterdir())
