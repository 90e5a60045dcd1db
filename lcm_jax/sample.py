"""python -m lcm_jax.sample --model=runs/digits/lcm --prompt="a red seven on a blue background" [--steps=4 --seed=0]

Samples one image per --prompt (repeatable) from any folder that diffusers' StableDiffusionPipeline or
LatentConsistencyModelPipeline writes, and saves them as a grid in one PNG. --lora=FILE:WEIGHT (repeatable) attaches a
LoRA; with an LCM-LoRA, --sampler=lcm samples in four steps.
"""

import argparse
import math
import pathlib
import sys
from collections.abc import Sequence

from lcm_jax import cli
from lcm_jax.errors import UserError, say
from lcm_jax.host import arguments, compile_cache
from lcm_jax.host.images import grid, write_png
from lcm_jax.inference.pipeline import SAMPLERS, load_pipeline


def main(argv: Sequence[str]) -> int:
    """Runs the command; `argv` without the program's name. Returns the exit code."""
    parser = cli.parser("sample", __doc__)
    parser.add_argument("--model", required=True, help="a diffusers folder, or a hub id")
    parser.add_argument("--prompt", required=True, action="append", help="repeatable")
    cli.add_lora(parser)
    parser.add_argument("--steps", type=int, help="network steps (default: 4 for a consistency model, else 50)")
    parser.add_argument(
        "--guidance-scale",
        type=float,
        help="default: the middle of a consistency model's trained range, 7.5 for a diffusion model, 1 with "
        "--sampler=lcm; without a w-embedding, values up to 1 turn guidance off",
    )
    parser.add_argument("--seed", type=int, default=0, help="in 0 … 2^64 - 1 (default: 0)")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("sample.png"), help="default: sample.png")
    parser.add_argument("--scale", type=int, default=1, help="enlarge small images by this factor (default: 1)")
    parser.add_argument("--label", action="store_true", help="write each prompt under its image")
    parser.add_argument(
        "--negative-prompt", help="text that guidance steers away from; not for a consistency model with a w-embedding"
    )
    parser.add_argument("--height", type=int, help="in pixels (default: the model's training size)")
    parser.add_argument("--width", type=int)
    parser.add_argument("--timesteps", type=_timesteps, help="instead of --steps: decreasing, e.g. 999,759,499,259")
    parser.add_argument(
        "--sampler", choices=SAMPLERS, help="for a diffusion model (default: ddim; with an LCM-LoRA from lcm_jax: lcm)"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="compute dtype")
    args = parser.parse_args(argv)
    if args.out.suffix.lower() != ".png":
        raise UserError(f"--out={args.out} should end in .png")
    if args.scale < 1:
        raise UserError(f"--scale={args.scale} must be at least 1")
    prompts = [arguments.text("--prompt", prompt) for prompt in args.prompt]
    compile_cache.enable()
    pipe = load_pipeline(args.model, loras=cli.loras(args.lora), dtype=args.dtype)
    pictures = pipe(
        prompts,
        steps=args.steps,
        guidance_scale=args.guidance_scale,
        seed=args.seed,
        negative_prompt=args.negative_prompt,
        height=args.height,
        width=args.width,
        timesteps=args.timesteps,
        sampler=args.sampler,
    )
    columns, labels = math.ceil(math.sqrt(len(pictures))), prompts if args.label else None
    write_png(args.out, grid(pictures, columns=columns, scale=args.scale, labels=labels))
    what = "image is" if len(pictures) == 1 else f"{len(pictures)} images are"
    say(f"The {what} in {args.out}")
    return 0


def _timesteps(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers like 999,759") from None


if __name__ == "__main__":
    sys.exit(cli.run(main))
