"""The sizes of a mesh, the places of devices in it, and error messages."""

import dataclasses
from types import SimpleNamespace

import jax
import pytest

from lcm_jax.errors import Unavailable, UserError
from lcm_jax.parallel.mesh import MeshConfig, check_batch, make_mesh


@pytest.mark.parametrize(
    ("given", "sizes"),
    [((-1, 1), (8, 1)), ((4, 2), (4, 2)), ((2, -1), (2, 4)), ((-1, 8), (1, 8)), ((1, -1), (1, 8))],
)
def test_minus_one_is_what_is_left(given, sizes):
    mesh = make_mesh(MeshConfig(*given))
    assert tuple(mesh.shape.items()) == (("data", sizes[0]), ("fsdp", sizes[1]))
    assert list(mesh.devices.flat) == jax.devices()  # neighbours share weights


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (MeshConfig(3, 2), "config.mesh.data=3, config.mesh.fsdp=2 do not multiply to the 8 devices"),
        (MeshConfig(-1, 3), "config.mesh.data=-1, config.mesh.fsdp=3 do not multiply to the 8 devices"),
        (MeshConfig(2, 2), "config.mesh.data=2, config.mesh.fsdp=2 do not multiply to the 8 devices"),
    ],
)
def test_sizes_that_do_not_multiply_to_the_devices_are_one_line(config, said):
    with pytest.raises(UserError) as error:
        make_mesh(config)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"data": 0}, "data is 0"),
        ({"fsdp": -2}, "fsdp is -2"),
        ({"data": -1, "fsdp": -1}, "both -1"),
        ({"gather": "blocks"}, "did you mean 'block'"),
        ({"frozen": "shard"}, "did you mean 'sharded'"),
        ({"grad_dtype": "float16"}, "grad_dtype is 'float16'"),
    ],
)
def test_a_wrong_value_is_named(values, said):
    with pytest.raises(UserError, match=said):
        MeshConfig(**values)


@pytest.fixture
def asking():
    """asking(platforms): as JAX_PLATFORMS of a process that starts."""
    before = jax.config.jax_platforms
    yield lambda platforms: jax.config.update("jax_platforms", platforms)
    jax.config.update("jax_platforms", before)


def test_an_accelerator_that_is_asked_for_and_not_found_is_one_line(asking, monkeypatch):
    asking("cuda,cpu")
    with pytest.raises(Unavailable, match="requests cuda, but JAX finds only a CPU; .* with the extra 'cuda'"):
        make_mesh(MeshConfig())
    asking("tpu,cpu")
    monkeypatch.setattr("jax.devices", lambda: (_ for _ in ()).throw(RuntimeError("no TPU\nat length")))
    with pytest.raises(Unavailable, match="JAX finds no tpu: no TPU; does its driver run, .* with the extra 'tpu'"):
        make_mesh(MeshConfig())
    asking("cuda")
    monkeypatch.setattr("jax.devices", lambda: (_ for _ in ()).throw(AssertionError))  # as JAX does beside libtpu
    with pytest.raises(Unavailable, match="JAX finds no cuda: no such platform; does its driver run"):
        make_mesh(MeshConfig())


def test_a_batch_divides_by_devices_and_micro_batches():
    mesh = make_mesh(MeshConfig())
    check_batch(16, 2, mesh)
    with pytest.raises(UserError, match="config.batch_size=12 is not divisible by the 8 devices; try 8 or 16$"):
        check_batch(12, 1, mesh)
    with pytest.raises(
        UserError, match="=24 is not divisible by the 8 devices times config.accumulate=2; try 16 or 32$"
    ):
        check_batch(24, 2, mesh)
    with pytest.raises(UserError, match="the 8 devices; try 16$"):
        check_batch(7, 2, mesh)


@dataclasses.dataclass(frozen=True)
class Device:
    """What mesh_utils asks of a device that is no TPU."""

    id: int
    slice_index: int
    process_index: int = 0
    device_kind: str = "none"
    platform: str = "none"
    client: SimpleNamespace = dataclasses.field(default_factory=SimpleNamespace, compare=False)


def test_weights_stay_inside_a_slice(monkeypatch):
    monkeypatch.setattr("lcm_jax.parallel.mesh.Mesh", lambda grid, axes, axis_types: grid)
    devices = [Device(id=i, slice_index=i % 2) for i in range(8)]  # as unsorted as they may be
    grid = make_mesh(MeshConfig(data=-1, fsdp=2), devices)
    assert grid.shape == (4, 2)
    assert [{device.slice_index for device in row} for row in grid] == [{0}, {0}, {1}, {1}]
    with pytest.raises(UserError, match="config.mesh.data=1 is not a multiple of the 2 slices"):
        make_mesh(MeshConfig(data=1, fsdp=8), devices)
