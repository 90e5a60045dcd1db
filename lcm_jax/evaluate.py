"""python -m lcm_jax.evaluate --model=runs/digits/lcm [--out=runs/digits/evaluation] [--diffusers] [--teacher]
python -m lcm_jax.evaluate --model=FOLDER --lora=LCM:WEIGHT [--lora=OTHER:WEIGHT] [--style=italic] [--weights=0,0.5,1]

Evaluates how well a model of the captioned digits follows its prompts: 1,120 prompts (10 digits, 56 colour pairs,
twice) and the same noise for every row. A classifier trained on real digits reads the digits; the colours are read
from the pixels. The Fréchet distance is to real test images, in the classifier's 64 features. Writes table.md,
evaluation.json, sheet.png and curves.png.

The teacher's rows are shipped with the package and tied to its files by a hash. --teacher measures them again (half
an hour on two cores), --teacher=FOLDER measures another teacher.

With --lora the model is a diffusion model. The first LoRA is the LCM-LoRA to evaluate; the others are part of the
model. The table has rows with and without the LCM-LoRA, and weights.png shows the effect of its weight.
"""

import argparse
import functools
import hashlib
import math
import pathlib
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lcm_jax import cli
from lcm_jax.diffusion.sampling import lcm_timesteps
from lcm_jax.digits import lora_rows, teacher_rows
from lcm_jax.digits.classifier import STYLE_WEIGHTS, WEIGHTS, Classifier, load_classifier
from lcm_jax.digits.dataset import SIZE, STYLES
from lcm_jax.digits.evaluation_set import Prompt, real_images, sheet_prompts, test_prompts
from lcm_jax.digits.guidance import best_guidance, trained_range, work
from lcm_jax.digits.measures import METRICS, Score, score
from lcm_jax.digits.report import Row, curves, figure_class, said, table
from lcm_jax.digits.sampling import BATCH, in_batches, sample_all
from lcm_jax.digits.sheet import sheet
from lcm_jax.errors import UserError, say
from lcm_jax.host import compile_cache, files
from lcm_jax.host.files import write, write_json
from lcm_jax.host.images import to_signed, to_uint8, to_unit, write_png
from lcm_jax.inference import verify
from lcm_jax.inference.pipeline import Pipeline, load_pipeline
from lcm_jax.interop.lora.file import find
from lcm_jax.monitor.progress import Sampling
from lcm_jax.parallel.mesh import found_devices

STEPS = (1, 2, 4, 8)


def ceilings(pipe: Pipeline, classifier: Classifier, prompts: Sequence[Prompt], style: str = STYLES[0]) -> list[Row]:
    """Returns rows for real test images, and for the same images encoded and decoded by the VAE.

    What compares with real images (Fréchet distance, variety) is that of real validation images, in the second row
    after the VAE too, so that it compares two different sets of real images.
    """
    asked = None if style == STYLES[0] else style
    real = real_images(prompts, "test", style)
    features, _ = classifier(real)
    validation = real_images(prompts, "validation", style)

    def scored(change: Callable[[np.ndarray], np.ndarray]) -> Score:
        own = score(change(real), prompts, classifier, features, asked)
        others = score(change(validation), prompts, classifier, features)
        return Score({m.name: (others if m.against_real else own)[m.name] for m in METRICS})

    through_vae = functools.partial(_through_vae, pipe)
    return [Row("real test images", scored(lambda same: same)), Row("the same through the VAE", scored(through_vae))]


def _through_vae(pipe: Pipeline, images: np.ndarray) -> np.ndarray:
    decoded = []
    for start in range(0, len(images), BATCH):
        pixels = to_signed(images[start : start + BATCH])
        latents = pipe.vae(pixels, None, method="to_latents")
        decoded.append(np.asarray(pipe.vae(latents, method="to_images")))
    return to_uint8(to_unit(np.concatenate(decoded)))


def student_rows(
    student: Pipeline,
    classifier: Classifier,
    prompts: Sequence[Prompt],
    steps: Sequence[int],
    guidance_scale: float | None = None,
) -> list[Row]:
    """Returns one row per number of steps of a consistency model, at `guidance_scale` or at the best guidance."""
    features, _ = classifier(real_images(prompts, "test"))
    candidates = trained_range(student) if guidance_scale is None else [guidance_scale]
    rows = []
    with Sampling(work(steps, candidates, len(prompts))) as progress:
        for n in steps:
            guidance = best_guidance(student, classifier, n, candidates, progress=progress)
            done = progress.series(f"student, {n} step{'s' * (n != 1)}", len(prompts), n)
            images, rate = sample_all(student, prompts, n, guidance, done=done)
            rows.append(Row("student", score(images, prompts, classifier, features), n, guidance, rate))
            print(said(rows[-1]), flush=True)
    return rows


def diffusers_row(
    sample: Callable[..., np.ndarray], student: Pipeline, classifier: Classifier, prompts: Sequence[Prompt], row: Row
) -> Row:
    """Returns a row for the model, prompts and noise of `row`, sampled by diffusers (`sample`: see `lcm_sampler`)."""
    features, _ = classifier(real_images(prompts, "test"))
    there = functools.partial(sample, guidance_scale=row.guidance_scale)
    with Sampling(len(prompts)) as progress:
        done = progress.series("student in diffusers", len(prompts))
        images, rate = in_batches(there, prompts, student.latent_shape(1)[1:], row.steps or 1, done=done)
    measured = score(images, prompts, classifier, features)
    return Row("student in diffusers", measured, row.steps, row.guidance_scale, rate)


def main(argv: Sequence[str]) -> int:
    """Runs the command; `argv` without the program's name. Returns the exit code."""
    parser = cli.parser("evaluate", __doc__)
    parser.add_argument("--model", help="a consistency model's folder, as lcm_jax.export writes it")
    parser.add_argument("--out", type=cli.folder, help="a folder for the results (default: beside the model)")
    parser.add_argument("--steps", type=_steps, default=STEPS, help="network steps of the model (default: 1,2,4,8)")
    parser.add_argument(
        "--guidance-scale", type=float, help="default: the best one on other noise, chosen like the teacher's"
    )
    parser.add_argument("--diffusers", action="store_true", help="also sample in diffusers (needs lcm_jax[diffusers])")
    parser.add_argument(
        "--teacher",
        nargs="?",
        const=str(teacher_rows.TEACHER),
        help="measure the teacher's rows again (of this folder, if given)",
    )
    cli.add_lora(parser)
    parser.add_argument("--style", choices=STYLES, help="with --lora: style of the model's digits")
    parser.add_argument(
        "--weights", type=_numbers, help="with --lora: weights of the LCM-LoRA (default: 0,0.25,…,1.25)"
    )
    args = parser.parse_args(argv)
    if "" in (args.model, args.teacher):
        raise UserError(f"--{'model' if args.model == '' else 'teacher'}= is empty; give a folder")
    if not args.model and not args.teacher:
        raise UserError("give --model=FOLDER, or --teacher to measure only the teacher")
    for option in ("diffusers", "lora"):
        if getattr(args, option) and not args.model:
            raise UserError(f"--{option} needs a model; add --model=FOLDER")
    for option in ("diffusers", "teacher", "guidance_scale") if args.lora else ("style", "weights"):
        if getattr(args, option) is not None and getattr(args, option) is not False:
            name = option.replace("_", "-")
            raise UserError(f"--{name} has no effect with{'' if args.lora else 'out'} --lora; leave it out")
    if args.guidance_scale is not None and not math.isfinite(args.guidance_scale):
        raise UserError(f"--guidance-scale={args.guidance_scale} is not a finite number")
    out = args.out or (_beside(args.model) if args.model else pathlib.Path()) / "evaluation"
    found_devices()
    compile_cache.enable()
    figure_class()  # fails before the long computation if matplotlib is missing
    if args.lora:
        return _lora(args, out)
    classifier = load_classifier()
    teacher = _digits_model(args.teacher or str(teacher_rows.TEACHER), is_lcm=False)
    shipped, where = ([], "") if args.teacher else teacher_rows.shipped()
    on_sheet, prompts = sheet_prompts(), test_prompts()
    rows, sampled, student = [], {}, None

    if args.model:
        student = _digits_model(args.model, is_lcm=True)
        if not args.teacher and not _same_autoencoder(student, teacher):
            raise UserError(
                f"{args.model} was not distilled from {teacher.folder.path}, whose rows ship with the package; pass "
                "its own teacher with --teacher=FOLDER"
            )
        original = student.folder.scheduler.get("original_inference_steps", 50)
        for steps in args.steps:
            lcm_timesteps(steps, student.process, original)
        files.make_folder("--out", out)
        in_diffusers = verify.lcm_sampler(student, args.steps[-1]) if args.diffusers else None
        rows = student_rows(student, classifier, prompts, args.steps, args.guidance_scale)
        for row in rows:
            name = f"student, {row.steps} step{'s' * (row.steps != 1)}"
            sampled[name], _ = sample_all(student, on_sheet, row.steps or 1, row.guidance_scale, fill=True)
        if in_diffusers:
            rows.append(diffusers_row(in_diffusers, student, classifier, prompts, rows[-1]))
    if args.teacher:
        files.make_folder("--out", out)
        print("Measuring the teacher …", flush=True)
        shipped = teacher_rows.measure(teacher, classifier, lambda line: print(line, flush=True))
        write_json(out / "teacher.json", teacher_rows.to_json(shipped, teacher.folder.path))
    images = {"real test images": real_images(on_sheet, "test")}
    for row in shipped:
        if row.name == teacher_rows.SAMPLERS["ddim"] and row.steps in (4, 50):
            name = f"teacher, {row.steps} steps"
            images[name], _ = sample_all(teacher, on_sheet, row.steps, row.guidance_scale, "ddim")
    sampled = {**images, **sampled}
    rows = [*ceilings(teacher, classifier, prompts), *shipped, *rows]

    here = teacher_rows.machine()
    measured = teacher_rows.hashes(student.folder.path if student else teacher.folder.path)
    values = {"model": args.model, **measured, "teacher_sha256": teacher_rows.folder_hash(teacher.folder.path)}
    _report(out, rows, {**values, "machine": here, "teacher_machine": where or here})
    if where:
        print(f"\nimages/s: teacher on {where}; other rows on this machine, {here}")
    write_png(out / "sheet.png", sheet(sampled, [prompt.text for prompt in on_sheet]))
    write_png(out / "curves.png", curves(rows))
    say(f"Done: {out} holds table.md, evaluation.json, sheet.png and curves.png")
    return 0


def _lora(args: argparse.Namespace, out: pathlib.Path) -> int:
    """Evaluates an LCM-LoRA on a model of the digits; returns the exit code."""
    style, weights = args.style or STYLES[0], args.weights or lora_rows.WEIGHTS
    (lcm, weight), *others = cli.loras(args.lora).items()
    classifier_file = WEIGHTS if style == STYLES[0] else STYLE_WEIGHTS
    classifier = load_classifier(classifier_file)
    pipe = _digits_model(args.model, is_lcm=False)
    pipe.set_loras({lcm: weight or 1.0, **dict(others)})  # fails early if one can't be read
    for steps in args.steps:
        pipe.lcm_timesteps(steps)
    if pipe.lora_recipe is None:
        warnings.warn(
            f"{lcm} doesn't record that it is an LCM-LoRA, or its number of timesteps: measuring it with 50",
            UserWarning,
            stacklevel=2,
        )
    measured = lora_rows.Measured(pipe, (lcm, weight), dict(others), classifier, style)
    files.make_folder("--out", out)
    print("Measuring the model itself …", flush=True)
    with measured.progress(args.steps, weights):
        base = measured.without()
        with_it = measured.with_lora(args.steps)
        shown = min(with_it, key=lambda row: abs((row.steps or 1) - 4))
        curve = measured.over_weights(shown, weights)
    rows = [*ceilings(pipe, classifier, test_prompts(), style), *base, *with_it, *curve]
    of_loras = {file: hashlib.sha256(find(file).read_bytes()).hexdigest() for file in cli.loras(args.lora)}
    values = {"model": args.model, "loras": cli.loras(args.lora), "lora_sha256": of_loras, "style": style}
    values |= teacher_rows.hashes(pipe.folder.path, classifier_file)
    _report(out, rows, {**values, "machine": teacher_rows.machine()})
    on_sheet = sheet_prompts()
    images = measured.sheet(on_sheet, [*base, *with_it])
    write_png(out / "sheet.png", sheet(images, [prompt.text for prompt in on_sheet]))
    write_png(out / "weights.png", lora_rows.weight_curves(curve, weights, base[-1]))
    say(f"Done: {out} holds table.md, evaluation.json, sheet.png and weights.png")
    return 0


def _report(out: pathlib.Path, rows: list[Row], values: dict[str, Any]) -> None:
    text = table(rows)
    print(text)
    write(out / "table.md", text + "\n")
    values = {**values, "prompts": len(test_prompts())}
    write_json(out / "evaluation.json", {**values, "rows": [row.to_dict() for row in rows]})


def _numbers(text: str) -> tuple[float, ...]:
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError:
        numbers = (math.nan,)
    if not all(map(math.isfinite, numbers)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers like 0,0.5,1")
    return numbers


def _beside(model: str) -> pathlib.Path:
    """Returns the parent of the model's folder."""
    path = pathlib.Path(model)
    return path.parent if path.name not in ("", "..") else path.resolve().parent


def _steps(text: str) -> tuple[int, ...]:
    try:
        steps = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers like 1,2,4") from None
    if len(set(steps)) < len(steps):
        raise argparse.ArgumentTypeError(f"{text!r} repeats a number")
    if min(steps) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} has {min(steps)}; each must be at least 1")
    return steps


def _digits_model(folder: str, *, is_lcm: bool) -> Pipeline:
    """Loads a model of the captioned digits; raises UserError if it is of the other kind or of another image size."""
    pipe = load_pipeline(folder)
    if pipe.is_lcm != is_lcm:
        kinds = ("a diffusion model", "a consistency model")
        raise UserError(f"{folder} holds {kinds[pipe.is_lcm]}; {kinds[is_lcm]} is needed here")
    factor = pipe.vae.network.config.factor
    height, width = (side * factor for side in pipe.latent_shape(1)[1:3])
    if (height, width) != (SIZE, SIZE):
        raise UserError(
            f"{folder} samples {width} x {height} pixels; only models of the captioned digits ({SIZE} x "
            f"{SIZE}) can be evaluated"
        )
    return pipe


def _same_autoencoder(a: Pipeline, b: Pipeline) -> bool:
    """Returns whether both have equal VAE weights, as a student and its teacher do."""
    ours, theirs = (pipe.folder.components["vae"].params for pipe in (a, b))
    return ours.keys() == theirs.keys() and all(np.array_equal(ours[k], theirs[k]) for k in ours)


if __name__ == "__main__":
    sys.exit(cli.run(main))
