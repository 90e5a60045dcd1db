"""python -m lcm_jax.blank --preset=digits --out=runs/teacher/blank [--seed=0]

Writes an untrained model to start training from: a small StableDiffusionPipeline folder with random weights and a
tokenizer trained on the captions of the captioned digits (lcm_jax.digits.dataset).
"""

import sys
from collections.abc import Sequence

from lcm_jax import cli
from lcm_jax.digits.presets import PRESETS, write_blank
from lcm_jax.errors import UserError, say
from lcm_jax.host import compile_cache
from lcm_jax.parallel.mesh import found_devices


def main(argv: Sequence[str]) -> int:
    """Runs the command; `argv` without the program's name. Returns the exit code."""
    parser = cli.parser("blank", __doc__)
    parser.add_argument("--preset", required=True, help=" | ".join(PRESETS))
    parser.add_argument("--out", required=True, type=cli.folder, help="the folder to write")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if not 0 <= args.seed < 2**32:
        raise UserError(f"--seed is {args.seed}; it must be in 0..{2**32 - 1}")
    found_devices()
    compile_cache.enable()
    out = write_blank(args.preset, args.out, args.seed)
    say(f"Wrote an untrained model to {out}")
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
