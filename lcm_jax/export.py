"""python -m lcm_jax.export --workdir=runs/digits --out=runs/digits/lcm [--which=ema|student] [--verify]
python -m lcm_jax.export --workdir=runs/digits_lora --out=lcm.safetensors [--dialect=kohya] [--verify]
python -m lcm_jax.export --model=FOLDER --lora=FILE:WEIGHT [--sampler=lcm] --out=NEW_FOLDER [--verify]

Writes the trained weights of a run as a folder that diffusers loads: a consistency model as a
LatentConsistencyModelPipeline, a diffusion model or an autoencoder in the pipeline it came from; a LoRA as one file, in
the format of diffusers and peft or of kohya's scripts. With --model, writes that model with the LoRAs merged into its
weights; --sampler=lcm gives it an LCMScheduler, for an LCM-LoRA. --verify loads the result in diffusers and compares
the latents and images of both. --config.model.folder=DIR says where the run's model folder lies now, if it was moved.
"""

import contextlib
import pathlib
import sys
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from lcm_jax import cli
from lcm_jax.adapters import lora
from lcm_jax.config import PLACES, Config, load_resolved
from lcm_jax.data.batches import batches
from lcm_jax.data.sources import Source, open_data
from lcm_jax.errors import UserError, say
from lcm_jax.families import family_of
from lcm_jax.host import compile_cache
from lcm_jax.host.images import to_signed
from lcm_jax.interop.folder import Folder, read_folder
from lcm_jax.interop.folder_writing import write_folder
from lcm_jax.interop.lora.file import DIALECTS, write_lora
from lcm_jax.interop.lora.merge import Loras, lcm_recipe, merged_kernels, with_kernels
from lcm_jax.interop.recipe import Recipe
from lcm_jax.interop.trained_folder import with_lcm_scheduler, write_lcm_folder, write_trained_folder
from lcm_jax.interop.weights import DTYPES
from lcm_jax.objectives import OBJECTIVES
from lcm_jax.training import checkpoint, identity
from lcm_jax.training.networks import adapted, chosen, read_model, trained_components

BATCHES, IMAGES = 16, 32  # of the training data, from which an autoencoder's scaling_factor is measured


def export(
    workdir: epath.PathLike,
    out: pathlib.Path,
    *,
    which: str | None = None,
    step: int | None = None,
    dtype: str = "float32",
    dialect: str | None = None,
    places: Mapping[str, str] | None = None,
) -> tuple[int, str]:
    """Writes the newest checkpoint (or that of `step`) of the run in `workdir` to `out`.

    Args:
      out: the new folder; of adapters, the file, *.safetensors.
      which: "ema" or "student"; by default "ema" for a distilled model, and for the others where the run keeps one.
      dtype: of the trained weights in the new folder or file.
      dialect: of a LoRA file, "diffusers" (default) or "kohya".
      places: where the run's inputs lie now, as for `load_resolved`.

    Returns:
      The checkpoint's step, and which weights were written.

    Raises:
      UserError: no such run, no such checkpoint, no EMA in it, a model folder that changed since the run began, `out`
        can't be written.
    """
    config = load_resolved(workdir, places)
    if dialect and not config.lora.rank:
        raise UserError(f"the dialect {dialect} has no effect: {workdir} holds full networks, not a LoRA; leave it out")
    if config.lora.rank and out.suffix != ".safetensors":
        raise UserError(f"{workdir} holds a LoRA, which is one file: {out} should end in .safetensors")
    if not config.lora.rank and out.suffix == ".safetensors":
        raise UserError(
            f"{workdir} holds all weights of a model, which is a folder: {out} should not end in .safetensors"
        )
    objective, options = chosen(config)
    needs_ema = objective.recipe is not None and not config.lora.rank  # published LCM-LoRAs are trained without
    which = which or ("ema" if config.ema.decay or needs_ema else "student")
    if which == "ema" and not config.ema.decay:
        raise UserError(f"{workdir} has no EMA (its config.ema.decay is 0); export --which=student")
    source = read_model(config)
    if changed := identity.changed(workdir, {"model": identity.of_folder(source)}):
        raise UserError(changed)
    params, step = checkpoint.restore_params(workdir, which, step)
    family = family_of(source.model_index)
    exported = objective.roles(options, family).exported.values()
    if config.lora.rank:
        trained = trained_components(config, family)
        networks = {name: source.components[component].network() for name, component in trained.items()}
        adapters = {}
        for name, targets in adapted(config, trained, networks).items():
            if name not in exported:
                continue
            wanted = lora.shapes(networks[name].shapes, targets)
            if {path: array.shape for path, array in params.get(name, {}).items()} != wanted:
                raise UserError(
                    f"the adapters in {workdir} don't fit {config.model.folder}, which is not the model that they "
                    "were trained on"
                )
            adapters[name] = lora.Adapter(params[name], lora.alphas(targets))
        header = recipe_of(config, source, which, step).to_header() if objective.recipe else {}
        write_lora(out, adapters, dialect=dialect or DIALECTS[0], dtype=dtype, header=header)
    elif objective.recipe:
        denoiser = params[family.denoiser]
        write_lcm_folder(source, denoiser, out, recipe=recipe_of(config, source, which, step), dtype=dtype)
    else:
        updates = {}
        params = {name: params[name] for name in exported}
        if objective.latent_std:
            data = open_data(config.data)
            if changed := identity.changed(workdir, {"data": identity.of_data(data)}):
                raise UserError(changed)
            updates = {"vae": {"scaling_factor": measured_scaling(config, source, params["vae"], data)}}
        write_trained_folder(source, params, out, config_updates=updates, dtype=dtype)
    return step, which


def export_merged(model: str, loras: Loras, out: pathlib.Path, *, lcm: bool = False) -> None:
    """Writes the folder `model` with LoRAs merged into its weights, in the same files and dtypes.

    Args:
      model: a folder or a hub id.
      loras: file → weight.
      lcm: whether the new folder gets an LCMScheduler.

    Raises:
      UserError: as `read_folder`, `merged_kernels` and `write_folder` do.
    """
    folder = read_folder(model)
    kernels = merged_kernels(folder, loras)
    merged = with_kernels(folder, kernels)
    if lcm:
        merged = with_lcm_scheduler(merged, lcm_recipe(loras, folder.schedule.num_train_timesteps))
    write_folder(merged, out)


def recipe_of(config: Config, teacher: Folder, which: str, step: int) -> Recipe:
    """Returns what lcm_jax.json says about a distillation."""
    objective, options = chosen(config)
    assert objective.recipe
    return Recipe(
        teacher=teacher.path.name if pathlib.Path(config.model.folder).is_dir() else config.model.folder,
        weights=which,
        **objective.recipe(options, teacher.schedule),
        steps=step,
        batch_size=config.batch_size,
        learning_rate=config.optimizer.learning_rate,
        ema_decay=config.ema.decay,
    )


def measured_scaling(config: Config, source: Folder, params: dict[str, np.ndarray], data_set: Source) -> float:
    """Returns the VAE's scaling_factor: latent_std / the standard deviation of its latents over some training images.

    All channels and places together, draws from the posterior included (arXiv 2112.10752, appendix G).
    """
    vae = source.components["vae"].network()

    @jax.jit
    def moments(params: dict[str, jax.Array], images: jax.Array) -> tuple[jax.Array, jax.Array]:
        mean, logvar = vae.apply(params, to_signed(images), method="encode")
        return jnp.mean(mean), jnp.mean(mean**2 + jnp.exp(logvar))

    def no_tokens(texts: list[str]) -> np.ndarray:
        return np.zeros((len(texts), 1), np.int32)

    device_params = jax.tree.map(jnp.asarray, params)
    read = batches(config.data, tokenize=no_tokens, batch_size=IMAGES, seed=config.seed, source=data_set)
    with contextlib.closing(read) as data:
        seen = [moments(device_params, next(data)["image"]) for _ in range(BATCHES)]
    first, second = np.mean(np.asarray(seen, np.float64), axis=0)
    objective, options = chosen(config)
    assert objective.latent_std
    return float(objective.latent_std(options) / np.sqrt(second - first**2))


def main(argv: Sequence[str]) -> int:
    """Runs the command; `argv` without the program's name. Returns the exit code."""
    parser = cli.parser("export", __doc__)
    parser.add_argument("--workdir", type=cli.workdir, help="the run's folder")
    parser.add_argument("--model", help="instead of --workdir: a diffusers folder, or a hub id, to merge LoRAs into")
    parser.add_argument("--out", required=True, type=cli.folder, help="the new folder, or the LoRA file")
    parser.add_argument("--which", choices=("ema", "student"), help="which weights of the run (default: ema)")
    parser.add_argument("--step", type=int, help="the run's checkpoint (default: the newest)")
    parser.add_argument("--dtype", choices=DTYPES, help="dtype of the trained weights (default: float32)")
    parser.add_argument("--dialect", choices=DIALECTS, help="format of the LoRA file (default: diffusers)")
    cli.add_lora(parser)
    parser.add_argument("--sampler", choices=("lcm",), help="with --model: the sampler stored in the new folder")
    parser.add_argument("--verify", action="store_true", help="compare with diffusers; needs lcm_jax[diffusers]")
    args, overrides = parser.parse_with_config(argv)
    places = _places(overrides)
    if (args.workdir is None) == (args.model is None):
        raise UserError("give --workdir, the run to export, or --model, the folder to merge LoRAs into")
    for option in ("which", "step", "dtype", "dialect") if args.model else ("lora", "sampler"):
        if getattr(args, option) not in (None, []):
            raise UserError(f"--{option} has no effect with --{'model' if args.model else 'workdir'}; leave it out")
    if args.model and places:
        raise UserError(f"{overrides[0]} has no effect with --model; leave it out")
    if args.model and not args.lora and not args.sampler:
        raise UserError("--model without --lora or --sampler would only copy the folder; give --lora=FILE:WEIGHT")
    if args.model and args.out.suffix == ".safetensors":
        raise UserError(f"--out={args.out}: --model writes a folder; choose a folder name")
    compile_cache.enable()
    model, lora_file, how, samples = args.out, None, [], True
    if args.model:
        loras = cli.loras(args.lora)
        export_merged(args.model, loras, args.out, lcm=args.sampler == "lcm")
        what = f"{args.model} with {len(loras)} LoRA{'' if len(loras) == 1 else 's'} merged into it"
    else:
        config, dtype = load_resolved(args.workdir, places), args.dtype or "float32"
        step, which = export(
            args.workdir, args.out, which=args.which, step=args.step, dtype=dtype, dialect=args.dialect, places=places
        )
        what = f"the {which} weights of step {step}"
        if config.lora.rank:
            model, lora_file = config.model.folder, args.out
            how = [f"--lora={args.out}"] + ["--sampler=lcm"] * bool(OBJECTIVES[config.objective].recipe)
        samples = OBJECTIVES[config.objective].latent_std is None
    if args.verify:
        from lcm_jax.inference.verify import verify

        difference = verify(model, lora=lora_file)
        compared = "weight differences, latents and images" if lora_file else "latents and images"
        say(f"diffusers loads it; its {compared} differ from those of lcm_jax by {difference:.1e} of their maximum.")
    if samples:
        words = cli.to_type("sample", f"--model={model}", *how, "--prompt=a prompt", "--seed=0", "--out=image.png")
        say(f"{args.out} holds {what}. To sample from it:")
    else:
        words = cli.to_type("train", "--config=FILE", f"--config.model.folder={model}", "--workdir=DIR")
        say(f"{args.out} holds {what}. To train the other networks with this autoencoder:")
    say(f"  {words}")
    return 0


def _places(overrides: Sequence[str]) -> dict[str, str]:
    """Parses --config.… of inputs that lie elsewhere than when the run trained. Raises UserError for other options."""
    found = {}
    for text in overrides:
        name, equals, value = text.removeprefix("--config.").partition("=")
        if name not in PLACES or not equals:
            raise UserError(f"{text} is not an option of export; only {', '.join(PLACES)} can differ from the run's")
        found[name] = value
    return found


if __name__ == "__main__":
    sys.exit(cli.run(main))
