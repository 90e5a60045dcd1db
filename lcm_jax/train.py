"""python -m lcm_jax.train --config=configs/digits.py --workdir=runs/digits [--config.<option>=<value> …]

Trains the model of the config (a consistency model from a teacher, a diffusion model, an autoencoder) and writes
config.json, checkpoints/, tensorboard/ and samples/ to the workdir. Restarted with the same command, it resumes from
its last checkpoint, and its weights end up bit-identical to those of a run that was never stopped.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from lcm_jax import cli, config_file, config_options
from lcm_jax.errors import UserError, say
from lcm_jax.host import compile_cache, files
from lcm_jax.objectives import OBJECTIVES
from lcm_jax.parallel import processes
from lcm_jax.parallel.mesh import split_cpu
from lcm_jax.training import saved_step
from lcm_jax.training.loop import train


def main(argv: Sequence[str], devices: Sequence[Any] | None = None) -> int:
    """Runs the command; `argv` without the program's name. Returns the exit code. `devices`: as `train` takes them."""
    parser = cli.parser("train", __doc__)
    parser.add_argument(
        "--config",
        required=True,
        help="a config file, or the name of one of lcm_jax's own, optionally with a variant: my.py, digits:smoke",
    )
    parser.add_argument("--workdir", required=True, type=cli.workdir, help="the run's folder, or gs://BUCKET/PATH")
    parser.add_argument(
        "--compiled",
        metavar="FILE",
        help="compiled step from plan --save=FILE; loading it runs code, so use only files that you trust",
    )
    parser.add_argument("--options", action=_ListOptions, nargs=0, help="list every --config.… option, and exit")
    processes.add_options(parser)
    try:
        args, overrides = parser.parse_with_config(argv)
        where = processes.find(args.coordinator, args.num_processes, args.process_id, args.wait)
        if args.compiled is not None:
            saved_step.given(args.compiled)
        config = config_file.load(args.config, overrides)
    except UserError as error:  # of this process alone, perhaps
        processes.tell(processes.find_leniently(argv), error)
        raise
    split_cpu(config.mesh.cpu_devices)
    compile_cache.enable()
    with processes.Processes(where, args.wait):
        result = train(config, args.workdir, args.compiled, devices)
        speaks = processes.is_first()
    if not speaks:
        return 128 + result.signal if result.signal else 0
    if result.signal:
        say(f"Stopped and saved at step {result.step} of {config.steps}. The same command resumes there.")
        return 128 + result.signal
    what = "LoRA" if config.lora.rank else "model"
    say(f"Done: {result.step} steps. {args.workdir} holds checkpoints, samples and curves. To write the {what}:")
    beside = f"runs/{args.workdir.name}" if files.in_bucket(args.workdir) else args.workdir  # an export is local
    out = "lora.safetensors" if config.lora.rank else OBJECTIVES[config.objective].result
    say(f"  {cli.to_type('export', f'--workdir={args.workdir}', f'--out={beside}/{out}')}")
    return 0


class _ListOptions(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        sys.stdout.write(config_options.text())
        parser.exit()


if __name__ == "__main__":
    sys.exit(cli.run(main))
