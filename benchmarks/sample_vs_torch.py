"""python benchmarks/sample_vs_torch.py [--size=small] [--rounds=20] [--batch=N] [--steps=4] [--dtype=float32]

Compares consistency-model sampling, from prompts to decoded images, with diffusers' LatentConsistencyModelPipeline on
the same folder, prompts and noise. Each runs in its own process, in alternation; ratios are taken per round. Fails if
float32 images differ by more than 1 of 255.
"""

import argparse
import pathlib
import sys
import tempfile

import jax
import networks
import numpy as np
import turns
from samplers import JaxSampler, TorchSampler, Work, write_student

from lcm_jax import cli
from lcm_jax.errors import UserError
from lcm_jax.host import compile_cache


def main(argv: list[str]) -> int:
    """Measures all contestants and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=networks.SIZES, default="small")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--compiled", action="store_true", help="torch.compile its UNet and VAE as well")
    args = parser.parse_args(argv)
    if min(args.rounds, args.batch, args.steps) < 1:
        raise UserError("--rounds, --batch and --steps must be at least 1")
    jax.config.update("jax_platforms", "cpu")  # this process leaves the accelerator to the contestants
    with tempfile.TemporaryDirectory() as temporary:
        teacher = networks.write(networks.SIZES[args.size], pathlib.Path(temporary) / "teacher")
        folder = write_student(teacher, pathlib.Path(temporary) / "student")
        work = Work(folder, args.batch, args.steps, args.dtype)
        env = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        ours = turns.Contestant("lcm_jax", JaxSampler, work, env=env)
        peers = [
            turns.Contestant("diffusers", TorchSampler, work, False, False),
            turns.Contestant("diffusers, channels_last", TorchSampler, work, True, False),
        ]
        if args.compiled:
            peers.append(turns.Contestant("diffusers, channels_last, compiled", TorchSampler, work, True, True))
        for peer in peers:
            difference = np.abs(ours.facts["images"].astype(int) - peer.facts["images"]).max()
            if args.dtype == "float32" and difference > 1:
                raise UserError(f"{peer.name} samples other images: they differ by {difference} of 255")
        rounds = turns.take_turns([ours, *peers], args.rounds)
        print(turns.table([ours, *peers], args.batch, rounds))
        for contestant in (ours, *peers):
            contestant.close()
    return 0


if __name__ == "__main__":
    compile_cache.enable()
    sys.exit(cli.run(main, command="sample_vs_torch"))
