"""python benchmarks/step_vs_torch.py [--size=small] [--rounds=20] [--batch=N] [--dtype=float32] [--attention=xla]

Compares one step of latent consistency distillation with the same step on diffusers' torch modules: student, target and
teacher, DDIM, Huber loss, AdamW, clipping, EMA; latents as data, captions through the text encoder. Each runs in its
own process, in alternation; ratios are taken per round. Compare with the fastest torch variant (plain, channels_last,
compiled). A variant whose loss or gradient norm differs on the same inputs is left out.

Needs the extra `diffusers`. Sizes: micro, small, middle, large (a CPU's), sd15 (a GPU's: 512 px, --dtype=bfloat16).
"""

import argparse
import pathlib
import statistics
import sys
import tempfile

import jax
import networks
import numpy as np
import turns
from jax_step import JaxStep
from torch_step import SKIP, W_DIM, Settings, TorchStep

from lcm_jax import cli
from lcm_jax.config import Config, EMAConfig, ModelConfig, OptimizerConfig
from lcm_jax.data.config import DataConfig
from lcm_jax.errors import UserError
from lcm_jax.host import compile_cache
from lcm_jax.interop.folder import read_folder
from lcm_jax.interop.tokenizer import load_tokenizer
from lcm_jax.objectives import lcd

PEAKS = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H200": 989e12, "NVIDIA A100-SXM4-80GB": 312e12}  # bfloat16, dense
VARIANTS = ("plain", "channels_last", "compiled", "channels_last,compiled")


def draw_inputs(config: Config, size: networks.Size, null_ids: np.ndarray, path: pathlib.Path) -> None:
    """Writes the batch and the random draws of lcm_jax's first step to an .npz file, channels first."""
    random = np.random.default_rng(0)
    shape = (config.batch_size, size.latents, size.latents, 4)
    _, key = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), 0))
    draws = lcd.draw(key, shape, config.lcd, 1000)
    ids = random.integers(0, 500, (config.batch_size, size.tokens))
    np.savez(
        path,
        z_0=random.standard_normal(shape).astype(np.float16).astype(np.float32).transpose(0, 3, 1, 2),
        eps=np.asarray(draws.eps).transpose(0, 3, 1, 2),
        i=np.asarray(draws.i, np.int64),
        w=np.asarray(draws.w),
        input_ids=ids,
        null_ids=null_ids,
    )


def same(one: turns.Contestant, other: turns.Contestant, tolerance: float) -> bool:
    """Returns whether loss and gradient norm agree within the relative tolerance; prints a difference to stderr."""
    for name in ("loss", "grad_norm"):
        a, b = one.facts[name], other.facts[name]
        if not abs(a - b) <= tolerance * abs(b):
            print(f"{other.name} gives another {name} and is left out: {b:.6g} instead of {a:.6g}", file=sys.stderr)
            return False
    return True


def main(argv: list[str]) -> int:
    """Measures all contestants and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=networks.SIZES, default="small")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--batch", type=int, help="another batch than the size's own")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--attention", choices=("xla", "cudnn"), default="xla")
    parser.add_argument("--remat", choices=("none", "block", "block_save_attention", "layer"), default="none")
    parser.add_argument("--cpu-devices", type=int, default=2, help="as config.mesh.cpu_devices")
    parser.add_argument("--together", action="store_true", help="build all at once; compile times are then of no use")
    parser.add_argument("--torch", default="plain;channels_last", help=f"with ; between: {'; '.join(VARIANTS)}")
    args = parser.parse_args(argv)
    if args.rounds < 1 or (args.batch is not None and args.batch < 1):
        raise UserError("--rounds and --batch must be at least 1")
    jax.config.update("jax_platforms", "cpu")  # this process leaves the accelerator to the contestants
    size = networks.SIZES[args.size]
    with tempfile.TemporaryDirectory() as temporary:
        folder = networks.write(size, pathlib.Path(temporary) / "folder")
        config = Config(
            model=ModelConfig(folder=str(folder), dtype=args.dtype, remat=args.remat, attention=args.attention),
            data=DataConfig(latents=True, image_size=4 * size.latents),
            batch_size=args.batch or size.batch,
            lcd=lcd.LCDConfig(skip=SKIP, w_embedding_dim=W_DIM),
            optimizer=OptimizerConfig(learning_rate=1e-6),
            ema=EMAConfig(decay=0.95),
        )
        inputs = pathlib.Path(temporary) / "inputs.npz"
        null_ids = load_tokenizer(read_folder(folder, only=()))([""]).astype(np.int64)
        draw_inputs(config, size, null_ids, inputs)
        ours = turns.Contestant(
            "lcm_jax",
            JaxStep,
            config,
            inputs,
            args.cpu_devices,
            env={"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
            wait=not args.together,
        )
        contestants = [ours]
        for variant in args.torch.split(";"):
            chosen = variant.strip().split(",")
            settings = Settings(args.dtype, "channels_last" in chosen, "compiled" in chosen)
            contestants.append(
                turns.Contestant(settings.name, TorchStep, folder, inputs, settings, wait=not args.together)
            )
        tolerance = 1e-3 if args.dtype == "float32" else 5e-2
        for peer in contestants[1:]:
            if not same(ours, peer, tolerance):
                contestants.remove(peer)
                peer.close()
        if len(contestants) == 1:
            raise UserError("every variant of torch gives another loss or gradient norm; there is nothing to compare")
        rounds = turns.take_turns(contestants, args.rounds)
        print(turns.table(contestants, config.batch_size, rounds))
        print(speed(config.batch_size, ours, rounds))
        for contestant in contestants:
            contestant.close()
    return 0


def speed(batch: int, ours: turns.Contestant, rounds: list[dict[str, float]]) -> str:
    """Returns a line with FLOPs per image, FLOP/s, and the share of the device's peak if known."""
    needed, device = ours.facts["flops"], ours.facts["device"]
    rate = needed / statistics.median(one[ours.name] for one in rounds)
    share = f", {rate / PEAKS[device]:.1%} of its peak" if device in PEAKS else ""
    return f"\n{needed / batch / 1e9:.3g} GFLOP per image; {rate / 1e9:.0f} GFLOP/s on {device}{share}"


if __name__ == "__main__":
    compile_cache.enable()
    sys.exit(cli.run(main, command="step_vs_torch"))
