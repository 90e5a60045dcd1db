"""The state that a run left in its workdir, as comparable values."""

import jax
import numpy as np
import orbax.checkpoint as ocp

from lcm_jax.training import checkpoint

ITEMS = ("params", "ema", "opt_state", "counters")


def everything(workdir):
    """Parameters, EMA, optimizer, counters and data position of the newest checkpoint, as comparable values."""
    folder = workdir / "checkpoints"
    step = checkpoint.finalized_steps(folder)[0]
    with ocp.CheckpointManager(folder, options=ocp.CheckpointManagerOptions(read_only=True)) as manager:
        items = {name: ocp.args.StandardRestore() for name in ITEMS if (folder / str(step) / name).exists()}
        meta = ocp.args.JsonRestore()
        arrays = dict(manager.restore(step, args=ocp.args.Composite(**items, meta=meta)).items())
    data = arrays.pop("meta")["content"]["data"]
    leaves = jax.tree.leaves_with_path(arrays)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}, data, step


def assert_same_bits(a, b):
    (arrays_a, data_a, step_a), (arrays_b, data_b, step_b) = everything(a), everything(b)
    assert step_a == step_b
    assert data_a == data_b
    assert arrays_a.keys() == arrays_b.keys()
    for name, array in arrays_a.items():
        assert array.tobytes() == arrays_b[name].tobytes(), name
