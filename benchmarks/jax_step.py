"""The training step of latent consistency distillation, as `train` runs it."""

import dataclasses
import pathlib
import time

import jax
import numpy as np

from lcm_jax.config import Config
from lcm_jax.interop.folder import read_folder
from lcm_jax.interop.tokenizer import load_tokenizer
from lcm_jax.parallel.mesh import make_mesh, split_cpu
from lcm_jax.parallel.partition import place
from lcm_jax.planning import flops
from lcm_jax.training.networks import frozen_params, initial_params, make_parts
from lcm_jax.training.program import make_program


class JaxStep:
    """A compiled training step with its state on the devices; each `run` is one step on a fixed batch."""

    def __init__(self, config: Config, inputs: pathlib.Path, cpu_devices: int) -> None:
        """Compiles and runs a step; `config` must use latents, `inputs` is a file of `step_vs_torch.draw_inputs`."""
        split_cpu(cpu_devices)
        config = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, cpu_devices=cpu_devices))
        folder = read_folder(config.model.folder)
        parts = make_parts(config, folder, load_tokenizer(folder))
        program = make_program(config, parts, make_mesh(config.mesh))
        lowered = program.lower()
        start = time.perf_counter()
        self._step = lowered.compile()
        compile_seconds = time.perf_counter() - start
        self._state = program.start(place(initial_params(config, parts, folder), program.state["params"]))
        frozen = place(frozen_params(config, parts, folder), program.frozen)
        given = np.load(inputs)
        mean = given["z_0"].transpose(0, 2, 3, 1)
        moments = np.concatenate([mean, np.full_like(mean, -30.0)], axis=-1).astype(np.float16)  # no variance
        batch = program.put({"moments": moments, "input_ids": given["input_ids"].astype(np.int32)})
        self._given = frozen, batch, program.put_stop(0)
        values = self.run()
        self.facts = {
            "loss": float(values["loss"]),
            "grad_norm": float(values["grad_norm"]),
            "first_seconds": compile_seconds,
            "flops": program.mesh.size * flops.count(program.trace().jaxpr),
            "device": jax.devices()[0].device_kind,
        }

    def run(self) -> dict[str, jax.Array]:
        """Runs one step, waits for it, and returns its logged values."""
        self._state, values = self._step(self._state, *self._given)
        return jax.block_until_ready((self._state, values))[1]

    def memory(self) -> int:
        """Returns the accelerator's peak memory in bytes, 0 without one."""
        return (jax.local_devices()[0].memory_stats() or {"peak_bytes_in_use": 0})["peak_bytes_in_use"]
