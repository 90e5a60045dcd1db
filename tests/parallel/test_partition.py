"""Which axis of which weight is divided, in the models as published."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from lcm_jax.config import OptimizerConfig
from lcm_jax.interop.network_configs import MODEL_CLASSES
from lcm_jax.models import Network
from lcm_jax.parallel.mesh import MeshConfig, make_mesh
from lcm_jax.parallel.partition import divided_axes, divided_axis, place, shardings, spec
from lcm_jax.training.optimizer import make_optimizer

SD15_UNET = {
    "block_out_channels": [320, 640, 1280, 1280],
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "time_cond_proj_dim": 256,
}
VAE = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
}
COMPONENTS = {"UNet2DConditionModel": SD15_UNET, "AutoencoderKL": VAE, "CLIPTextModelWithProjection": {}}


@pytest.fixture(scope="module")
def shapes():
    return {
        name: Network(MODEL_CLASSES[name].model, MODEL_CLASSES[name].read(c)).shapes for name, c in COMPONENTS.items()
    }


@pytest.mark.parametrize("fsdp", [2, 8, 64])
def test_nearly_everything_of_a_published_model_is_divided(shapes, fsdp):
    for name, axes in divided_axes(shapes, fsdp).items():
        sizes = {path: int(np.prod(leaf.shape)) for path, leaf in shapes[name].items()}
        whole = [path for path, axis in axes.items() if axis is None]
        assert sum(sizes[path] for path in whole) < 0.01 * sum(sizes.values()), name
        for path, axis in axes.items():
            assert axis is None or shapes[name][path].shape[axis] % fsdp == 0
        if fsdp == 8:
            assert all(path.endswith((".bias", ".scale")) for path in whole if "quant_conv" not in path), name


def test_the_first_axis_that_divides_is_taken():
    assert divided_axis("conv_in.kernel", (3, 3, 4, 320), 8) == 3  # four input channels can't be divided by eight
    assert divided_axis("conv_out.kernel", (3, 3, 320, 4), 8) == 2
    assert divided_axis("a.to_q.kernel", (320, 320), 8) == 0
    assert divided_axis("a.to_q.kernel", (320, 320), 1) is None
    assert divided_axis("a.to_q.kernel", (12, 20), 8) is None
    assert divided_axis("a.to_q.bias", (320,), 8) is None
    assert (spec(2), spec(None)) == (P(None, None, "fsdp"), P())


def test_a_path_without_a_rule_is_an_error():
    with pytest.raises(ValueError, match=r"no rule .* matches the parameter mid_block\.0\.lora"):
        divided_axis("mid_block.0.lora", (8, 8), 1)


def test_the_state_lies_as_its_weights_do():
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    params = {"unet": {"conv_in.kernel": jnp.ones((3, 3, 4, 8)), "conv_in.bias": jnp.ones(8)}}
    state = {"step": jnp.int32(0), "params": params, "opt_state": optax.adamw(1e-3).init(params)}
    found = shardings(state, mesh)
    of_kernels = [s.spec for s, x in zip(jax.tree.leaves(found), jax.tree.leaves(state), strict=True) if x.ndim == 4]
    assert of_kernels == [P(None, None, "fsdp")] * 3  # the weight and both of its moments
    assert {s.spec for s, x in zip(jax.tree.leaves(found), jax.tree.leaves(state), strict=True) if x.ndim < 4} == {P()}


@pytest.mark.parametrize(
    "options", [{"name": "adafactor"}, {"moments_dtype": "bfloat16"}], ids=["adafactor", "bfloat16"]
)
def test_the_small_optimizers_states_are_divided(options):
    """Adafactor's means along their own axes; an update over eight devices is that of one."""
    config = OptimizerConfig(clip_norm=0.0, **options)  # the norm's sum would depend on the devices
    optimizer = make_optimizer(config, 10)
    random = np.random.default_rng(0)
    shapes = {"a.kernel": (256, 384), "conv.kernel": (3, 3, 128, 136), "conv.bias": (136,)}
    weights, grads = (
        {"unet": {k: jnp.asarray(random.standard_normal(s), jnp.float32) for k, s in shapes.items()}} for _ in range(2)
    )
    key = jax.random.key(0)

    def two_updates(weights, state, grads):
        for _ in range(2):
            changes, state = optimizer.update(grads, state, weights, key=key)
        return changes, state

    expected = jax.jit(two_updates)(weights, optimizer.init(weights), grads)
    mesh = make_mesh(MeshConfig(fsdp=8, data=1))
    places = shardings((weights, optimizer.init(weights), grads), mesh)
    found = jax.jit(two_updates, in_shardings=places, out_shardings=places[:2])(weights, optimizer.init(weights), grads)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=1e-5, atol=0)
    divided = [leaf.size for leaf in jax.tree.leaves(found[1]) if leaf.sharding.spec != P()]
    matrices = [256, 384, 9 * 128, 9 * 136] if config.name == "adafactor" else [256 * 384, 9 * 128 * 136] * 2
    assert sorted(divided) == sorted(matrices)


def test_each_device_gets_its_part():
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    array = np.arange(8 * 5, dtype=np.float32).reshape(8, 5)
    like = jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=jax.NamedSharding(mesh, P("fsdp")))
    placed = place({"a": {"kernel": array}}, {"a": {"kernel": like}})["a"]["kernel"]
    assert placed.addressable_shards[0].data.shape == (2, 5)
    np.testing.assert_array_equal(placed, array)


def test_a_replicated_array_is_one_buffer_for_all_devices_of_a_cpu():
    mesh = make_mesh(MeshConfig())
    x = np.arange(15, dtype=np.float32).reshape(3, 5)
    like = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.NamedSharding(mesh, P()))
    placed = place({"unet": {"kernel": x}}, {"unet": {"kernel": like}})["unet"]["kernel"]
    shards = placed.addressable_shards
    assert len(shards) == 8
    assert len({shard.data.unsafe_buffer_pointer() for shard in shards}) == 1
    x += 1  # the buffer is not the caller's
    np.testing.assert_array_equal(placed, x - 1)
