"""Common to all scripts of launch/: flags that the compilers know, and help that names every option."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

LAUNCH = pathlib.Path(__file__).resolve().parents[2] / "launch"
SCRIPTS = ("tpu.sh", "gke.sh", "slurm.sh", "gpus.sh")


def flags(call: str) -> str:
    """What a function of flags.sh prints."""
    clean = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")}
    command = ["bash", "-euc", f"source {LAUNCH}/flags.sh; {call}"]
    return subprocess.run(command, check=True, capture_output=True, text=True, env=clean).stdout.strip()


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "JAX_PLATFORMS": "cpu", **environment},
        capture_output=True,
        text=True,
    )


def test_jaxlib_knows_the_gpu_flags():
    code = "import jax; jax.devices(); print('ok')"  # an unknown flag ends the process
    assert python(code, XLA_FLAGS=flags("gpu_flags")).stdout == "ok\n"
    assert python(code, XLA_FLAGS=flags("gpu_flags") + " --xla_gpu_no_such_flag=true").returncode != 0


@pytest.mark.parametrize(("topology", "slices"), [("v4:2x2x1", 1), ("v5e:2x2", 2), ("v5p:2x2x1", 2), ("v6e:2x2", 1)])
def test_libtpu_compiles_a_collective_with_the_tpu_flags(topology, slices):
    code = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
name, slices = sys.argv[1], int(sys.argv[2])
options = {"chip_config_name": "megacore"} if name.startswith("v4") else {}
options |= {"num_slices": slices} if slices > 1 else {}
found = topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices
mesh = Mesh(np.array(found).reshape(slices, -1), ("data", "fsdp"))
w = jax.ShapeDtypeStruct((1024, 1024), jnp.bfloat16, sharding=NamedSharding(mesh, P("fsdp")))
x = jax.ShapeDtypeStruct((1024, 1024), jnp.bfloat16, sharding=NamedSharding(mesh, P(("data", "fsdp"))))
step = jax.jit(jax.grad(lambda w, x: jnp.square(x @ w).mean()), out_shardings=w.sharding)
print("collectives:", "all-" in step.lower(w, x).compile().as_text())
""".replace("sys.argv[1], int(sys.argv[2])", f"{topology!r}, {slices}")
    chosen = flags(f"libtpu_flags {topology.split(':')[0]} {slices}")
    result = python(code, LIBTPU_INIT_ARGS=chosen, TPU_SKIP_MDS_QUERY="1", XLA_FLAGS="")
    assert result.stdout == "collectives: True\n", result.stderr[-2000:]


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_names_every_option(script):
    text = (LAUNCH / script).read_text()
    labels = re.findall(r"^ +((?:--?[a-z-]+(?:=\*)?(?: \| )?)+)\)", text, re.M)  # of the case that reads the options
    options = set(re.findall(r"--[a-z-]+", " ".join(labels)))
    assert {"--help", "--dry-run"} < options
    result = subprocess.run([LAUNCH / script, "--help"], capture_output=True, text=True)
    assert result.returncode == 0
    assert not [option for option in options if option not in result.stdout]
    assert "python -m lcm_jax.train" in result.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_unknown_option_is_one_line(script):
    result = subprocess.run([LAUNCH / script, "create", "x", "--no-such-option"], capture_output=True, text=True)
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
