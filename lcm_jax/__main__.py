"""Entry point of `lcm-jax <command> …`, which is the same as `python -m lcm_jax.<command> …`."""

import importlib
import sys
from collections.abc import Sequence

from lcm_jax import cli
from lcm_jax.errors import UserError, nearest

COMMANDS = {
    "train": "train the model of a config file: a consistency model, a teacher, an autoencoder",
    "export": "write a trained model as a folder that diffusers loads",
    "sample": "sample images for prompts",
    "evaluate": "evaluate a model of the captioned digits: a table, curves, a sheet of images",
    "encode": "encode a data set's images once, so that training steps need no VAE encoder",
    "plan": "estimate a run's memory and speed on a TPU pod, before you rent one",
    "blank": "write a model folder with random weights, to train from scratch",
}


def main() -> int:
    """Runs the command named by the first argument and returns its exit code."""
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print("usage: lcm-jax <command> …; details: lcm-jax <command> --help\n")
        for name, what in COMMANDS.items():
            print(f"  {name:9} {what}")
        return 0 if len(sys.argv) > 1 else 2
    if sys.argv[1] == "--version":
        print(cli.version())
        return 0
    command, argv = sys.argv[1], sys.argv[2:]
    if command not in COMMANDS:
        error = UserError(f"there is no command {command!r}{nearest(command, COMMANDS)}")
        print(f"lcm-jax: error: {error}", file=sys.stderr)
        return 2

    def run(argv: Sequence[str]) -> int:  # imports within `cli.run`, which ends them soon at Ctrl-C
        return importlib.import_module(f"lcm_jax.{command}").main(argv)

    return cli.run(run, argv, command)


if __name__ == "__main__":
    sys.exit(main())
