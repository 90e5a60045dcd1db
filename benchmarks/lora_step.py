"""python benchmarks/lora_step.py [--config=configs/digits_lora.py] [--rounds=20] [--config.<option>=<value> …]

Compares three training steps: all weights; LoRA as a side branch (`lcm_jax.adapters.side_branch`, as in `train`); and
LoRA merged into the weights, W + dW, before each forward pass. The three alternate in one process; time ratios are
taken per round. FLOPs are counted in the traced step; memory is the compiler's estimate.
"""

import argparse
import contextlib
import dataclasses
import statistics
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from lcm_jax import cli, config_file
from lcm_jax.adapters import lora, side_branch
from lcm_jax.adapters.lora import LoraConfig
from lcm_jax.config import Config
from lcm_jax.errors import UserError
from lcm_jax.host import compile_cache
from lcm_jax.interop.folder import Folder, read_folder
from lcm_jax.interop.tokenizer import load_tokenizer
from lcm_jax.parallel.mesh import make_mesh
from lcm_jax.parallel.partition import place
from lcm_jax.planning import flops
from lcm_jax.training.networks import frozen_params, initial_params, make_parts
from lcm_jax.training.program import make_program

FORMS = ("all weights", "side branch", "merged")


@contextlib.contextmanager
def merged(wanted: bool) -> Iterator[None]:
    """If `wanted`, merges adapters into the weights in calls of `side_branch.apply` inside the context."""
    usual = side_branch.apply

    def apply(network: Any, base: Any, params: Any, alphas: Any, *args: Any, **kwargs: Any) -> Any:
        return network.apply(lora.merge(base, params, alphas), *args, **kwargs)

    if wanted:
        side_branch.apply = apply
    try:
        yield
    finally:
        side_branch.apply = usual


class Form:
    """A compiled variant of the step, with its state on the devices."""

    def __init__(self, name: str, config: Config, folder: Folder) -> None:
        if name == "all weights":
            config = dataclasses.replace(config, lora=LoraConfig())
        tokenizer = load_tokenizer(folder)
        parts = make_parts(config, folder, tokenizer)
        with merged(name == "merged"):
            program = make_program(config, parts, make_mesh(config.mesh))
            self.flops = flops.count(program.trace().jaxpr)
            start = time.perf_counter()
            self._step = program.lower().compile()
            self.compile_seconds = time.perf_counter() - start
        analysis = self._step.memory_analysis()
        self.memory = analysis.argument_size_in_bytes + analysis.temp_size_in_bytes
        self._state = program.start(place(initial_params(config, parts, folder), program.state["params"]))
        frozen = place(frozen_params(config, parts, folder), program.frozen)
        random = np.random.default_rng(0)
        batch = {
            "image": lambda shape: random.integers(0, 256, shape, np.uint8),
            "moments": lambda shape: random.standard_normal(shape).astype(np.float16),
            "input_ids": lambda shape: np.broadcast_to(parts.null_ids, shape),
        }
        local = {key: batch[key](leaf.shape) for key, leaf in program.batch.items()}
        self._given = frozen, program.put(local), program.put_stop(0)

    def seconds(self) -> float:
        """Runs one step and returns its time in seconds."""
        start = time.perf_counter()
        self._state, values = self._step(self._state, *self._given)
        jax.block_until_ready((self._state, values))
        return time.perf_counter() - start


def main(argv: list[str]) -> int:
    """Measures the three steps and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/digits_lora.py")
    parser.add_argument("--rounds", type=int, default=20)
    args, overrides = parser.parse_known_args(argv)
    config = config_file.load(args.config, overrides)
    if not config.lora.rank or args.rounds < 1:
        raise UserError("give a config with lora.rank, and at least one of --rounds")
    config = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, cpu_devices=0))
    compile_cache.enable()
    folder = read_folder(config.model.folder)
    forms = {name: Form(name, config, folder) for name in FORMS}
    for form in forms.values():
        form.seconds()
    rounds = [{name: form.seconds() for name, form in forms.items()} for _ in range(args.rounds)]
    print("| step | GFLOP | share | ms | share of the time, median (range) | MB | compiled in, s |")
    print("|---|--:|--:|--:|--:|--:|--:|")
    whole = forms[FORMS[0]]
    for name, form in forms.items():
        shares = sorted(each[name] / each[FORMS[0]] for each in rounds)
        print(
            f"| {name} | {form.flops / 1e9:.1f} | {form.flops / whole.flops:.3f} "
            f"| {1e3 * statistics.median(each[name] for each in rounds):.0f} "
            f"| {statistics.median(shares):.3f} ({shares[0]:.3f} to {shares[-1]:.3f}) "
            f"| {form.memory / 1e6:.0f} | {form.compile_seconds:.0f} |"
        )
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main, command="lora_step"))
