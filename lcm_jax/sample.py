"""python -m lcm_jax.sample --model=runs/digits/lcm --prompt="a red seven on a blue background" [--steps=4 --seed=0]
python -m lcm_jax.sample --model=FOLDER --prompts=prompts.txt --images-per-prompt=4 --out=images/

Samples images from a folder of diffusers' StableDiffusion, LatentConsistencyModel or StableDiffusionXL pipeline.
--out=NAME.png is one file with all images in a grid; --out=FOLDER/ gets one file per image, 00000.png and so on, each
written as soon as it is done. Every file stores its prompt, seed and command. --lora=FILE:WEIGHT (repeatable)
attaches a LoRA; with an LCM-LoRA, --sampler=lcm samples in four steps.
"""

import argparse
import math
import os
import pathlib
import shlex
import sys
from collections.abc import Iterator, Sequence

import numpy as np

from lcm_jax import cli
from lcm_jax.data import images as image_files
from lcm_jax.errors import UserError, say
from lcm_jax.host import arguments, compile_cache, files
from lcm_jax.host.images import grid, write_png
from lcm_jax.inference.image_to_image import initial_latents
from lcm_jax.inference.pipeline import Pipeline, load_pipeline
from lcm_jax.inference.request import at_least_one
from lcm_jax.inference.rules import SAMPLERS, Settings
from lcm_jax.monitor.progress import Sampling
from lcm_jax.parallel.mesh import found_devices

IN_A_GRID = 256  # images; a grid is held in memory


def main(argv: Sequence[str]) -> int:
    """Runs the command; `argv` without the program's name. Returns the exit code."""
    args = _parser().parse_args(argv)
    prompts, each = _prompts(args), at_least_one("--images-per-prompt", args.images_per_prompt)
    prompts = [prompt for prompt in prompts for _ in range(each)]
    if _is_grid(args.out) and len(prompts) > IN_A_GRID:
        raise UserError(
            f"--out={args.out} would be a grid of {len(prompts)} images, more than {IN_A_GRID}; give a folder: "
            "--out=FOLDER/"
        )
    if args.scale < 1:
        raise UserError(f"--scale={args.scale} must be at least 1")
    found_devices()
    compile_cache.enable()
    pipe = load_pipeline(args.model, loras=cli.loras(args.lora), dtype=args.dtype)
    with cli.each_warning_once():
        _sample(pipe, args, prompts, ["lcm-jax", "sample", *argv])
    return 0


def _sample(pipe: Pipeline, args: argparse.Namespace, prompts: list[str], command: Sequence[str]) -> None:
    """Samples the images and writes them to --out."""
    out, is_grid = pathlib.Path(args.out), _is_grid(args.out)
    settings = pipe.rules.settings(
        args.steps,
        args.guidance_scale,
        args.sampler,
        args.timesteps,
        strength=args.strength,
        from_image=args.image is not None,
    )
    if args.image is not None:
        args.image, args.height, args.width = _read_image(args, pipe)
    pipe.rules.check_negatives([args.negative_prompt or ""], settings)
    arguments.seed(args.seed)
    size = pipe.default_batch_size(len(prompts), args.height, args.width)
    args.batch_size = size if args.batch_size is None else at_least_one("--batch-size", args.batch_size)
    files.make_folder("--out", out.parent if is_grid else out)
    write = _write_grid if is_grid else _write_each
    write(out, args, prompts, _images(pipe, args, prompts), _metadata(args, settings, command))


Images = Iterator[tuple[int, np.ndarray]]


def _write_grid(
    out: pathlib.Path, args: argparse.Namespace, prompts: list[str], images: Images, texts: dict[str, str]
) -> None:
    all_images = np.concatenate([image for _, image in images])
    columns, labels = math.ceil(math.sqrt(len(all_images))), prompts if args.label else None
    its_own = {"prompt": "\n".join(prompts), "image": str(args.first_image)}
    write_png(out, grid(all_images, columns=columns, scale=args.scale, labels=labels), its_own | texts)
    what = "image is" if len(prompts) == 1 else f"{len(prompts)} images are"
    say(f"The {what} in {out}")


def _write_each(
    out: pathlib.Path, args: argparse.Namespace, prompts: list[str], images: Images, texts: dict[str, str]
) -> None:
    for (number, image), prompt in zip(images, prompts, strict=True):
        sheet = grid(image, scale=args.scale, labels=[prompt] if args.label else None)
        write_png(out / f"{number:05}.png", sheet, {"prompt": prompt, "image": str(number), **texts})
    what = "image is" if len(prompts) == 1 else f"{len(prompts)} images are"
    say(f"The {what} in {out}/")


def _parser() -> cli.Parser:
    parser = cli.parser("sample", __doc__)
    parser.add_argument("--model", required=True, help="a diffusers folder, or a hub id")
    parser.add_argument("--prompt", action="append", default=[], help="repeatable")
    parser.add_argument(
        "--prompts", metavar="FILE", type=pathlib.Path, help="a text file, one prompt per line; not blank lines, nor #…"
    )
    parser.add_argument("--images-per-prompt", metavar="N", type=int, default=1, help="default: 1")
    cli.add_lora(parser)
    parser.add_argument("--steps", type=int, help="network steps (default: 4 for a consistency model, else 50)")
    parser.add_argument(
        "--guidance-scale",
        type=float,
        help="default: the middle of a consistency model's trained range, 7.5 for a diffusion model, 1 with "
        "--sampler=lcm; without a w-embedding, values up to 1 turn guidance off",
    )
    parser.add_argument("--seed", type=int, default=0, help="in 0 … 2^64 - 1 (default: 0)")
    parser.add_argument(
        "--first-image", metavar="I", type=int, default=0, help="number of the first image of the seed (default: 0)"
    )
    parser.add_argument(
        "--out",
        default="sample.png",
        help="NAME.png: a grid of all images; FOLDER/: a file per image (default: sample.png)",
    )
    parser.add_argument("--scale", type=int, default=1, help="enlarge small images by this factor (default: 1)")
    parser.add_argument("--label", action="store_true", help="write each prompt under its image")
    parser.add_argument(
        "--negative-prompt", help="text that guidance steers away from; not for a consistency model with a w-embedding"
    )
    parser.add_argument("--height", type=int, help="in pixels (default: the model's training size)")
    parser.add_argument("--width", type=int)
    parser.add_argument(
        "--image", metavar="FILE", type=pathlib.Path, help="start from this image, resized and cropped to the size"
    )
    parser.add_argument("--strength", type=float, help="how much of it is replaced, in (0, 1] (default: 0.8, SDXL 0.3)")
    parser.add_argument(
        "--decode-in-strips",
        action=argparse.BooleanOptionalAction,
        help="whether the VAE decodes strip by strip, with about half the memory (default: from 1024 x 1024 pixels on)",
    )
    parser.add_argument("--timesteps", type=_timesteps, help="instead of --steps: decreasing, e.g. 999,759,499,259")
    parser.add_argument(
        "--sampler", choices=SAMPLERS, help="for a diffusion model (default: ddim; with an LCM-LoRA from lcm_jax: lcm)"
    )
    parser.add_argument(
        "--batch-size", metavar="N", type=int, help="images sampled at once (default: 1 on a CPU, up to 32 elsewhere)"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="compute dtype")
    return parser


def _prompts(args: argparse.Namespace) -> list[str]:
    """Returns the prompts of --prompt, then those of the file; raises UserError if there is none."""
    prompts = [arguments.text("--prompt", prompt) for prompt in args.prompt]
    if args.prompts is None and not prompts:
        raise UserError("give --prompt=TEXT, or --prompts=FILE")
    if args.prompts is None:
        return prompts
    with files.one_line(args.prompts, "read"):
        lines = args.prompts.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")  # without a byte order mark
    for number, line in enumerate(lines, 1):
        prompt = arguments.text(f"--prompts={args.prompts}: line {number}", line.strip())
        if prompt and not prompt.startswith("#"):
            prompts.append(prompt)
    if not prompts:
        raise UserError(f"--prompts={args.prompts} has no prompt; write one per line")
    return prompts


def _is_grid(out: str) -> bool:
    """Returns whether --out is a PNG file; False for a folder; raises UserError for the name of another file."""
    suffix = pathlib.Path(out).suffix
    if not out:
        raise UserError("--out= is empty; give NAME.png, or FOLDER/")
    if os.path.isdir(out) or out.endswith("/") or not suffix:
        return False
    if suffix.lower() != ".png":
        raise UserError(f"--out={out} should end in .png; or give the folder of a file per image, with a slash: {out}/")
    return True


def _images(pipe: Pipeline, args: argparse.Namespace, prompts: list[str]) -> Images:
    """Yields the number and the image (1, H, W, 3) of each of these prompts, batch by batch, and shows the progress."""
    count, size = len(prompts), args.batch_size
    with Sampling(count) as progress:
        done = progress.series("", count)
        for start in range(0, count, size):
            images = pipe(
                prompts[start : start + size],
                steps=args.steps,
                guidance_scale=args.guidance_scale,
                seed=args.seed,
                negative_prompt=args.negative_prompt,
                height=args.height,
                width=args.width,
                timesteps=args.timesteps,
                sampler=args.sampler,
                batch_size=size,
                first_image=args.first_image + start,
                image=args.image,
                strength=args.strength,
                decode_in_strips=args.decode_in_strips,
            )
            for i, image in enumerate(images):
                yield args.first_image + start + i, image[None]
            done(start + len(images))


def _read_image(args: argparse.Namespace, pipe: Pipeline) -> tuple[np.ndarray, int, int]:
    """Returns the latents (h, w, C) of --image, and its height and width in pixels: of the options, or the model's."""
    _, *latent, _ = pipe.latent_shape(1, args.height, args.width)
    height, width = (side * pipe.networks["vae"].network.config.factor for side in latent)
    with files.one_line(args.image, "read"):
        encoded = args.image.read_bytes()
    try:
        pixels = image_files.fitted(encoded, height, width)
    except image_files.BadImage as error:
        raise UserError(f"--image={args.image}: {error}") from None
    return initial_latents(pipe.networks["vae"], pixels[None], 1, 1, 1)[0], height, width


def _metadata(args: argparse.Namespace, settings: Settings, command: Sequence[str]) -> dict[str, str]:
    """Returns what all files of a command store, by keyword."""
    how: dict[str, object] = {
        "negative_prompt": args.negative_prompt,
        "seed": args.seed,
        "steps": len(settings.timesteps),
        "timesteps": args.timesteps and ",".join(map(str, args.timesteps)),
        "guidance_scale": f"{settings.guidance_scale:g}",
        "sampler": settings.sampler,
        "strength": args.strength,
        "model": args.model,
        "lora": " ".join(args.lora) or None,
        "dtype": args.dtype,
        "command": shlex.join(command),
        "Software": cli.version(),
    }
    return {keyword: str(value) for keyword, value in how.items() if value is not None}


def _timesteps(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers like 999,759") from None


if __name__ == "__main__":
    sys.exit(cli.run(main))
