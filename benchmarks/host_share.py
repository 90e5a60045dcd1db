"""python benchmarks/host_share.py [--size=middle] [--steps=8]

Measures the share of training time in which no operation of the compiled step runs. Runs `train` on captioned digits
and profiles a few steps in the middle, without saving or sampling. Needs the extra `demo`.
"""

import argparse
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Iterable

import networks
from jax.profiler import ProfileData

from lcm_jax import cli
from lcm_jax.errors import UserError

WARM_UP = 5  # steps before the profile


def busy(intervals: Iterable[tuple[float, float]]) -> float:
    """Returns the length of the union of (start, end) intervals."""
    total, until = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def operations(profile: pathlib.Path) -> list[tuple[float, float]]:
    """Returns (start, end) in nanoseconds of each compiled operation in a profile folder."""
    (file,) = profile.rglob("*.xplane.pb")
    found = []
    for plane in ProfileData.from_file(str(file)).planes:
        for line in plane.lines:
            for event in line.events:
                if any(name == "hlo_op" for name, _ in event.stats):
                    found.append((event.start_ns, event.start_ns + event.duration_ns))
    return found


def main(argv: list[str]) -> int:
    """Runs `train` and prints the share."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=networks.SIZES, default="middle")
    parser.add_argument("--steps", type=int, default=8, help="of the profile")
    args = parser.parse_args(argv)
    if args.steps < 1:
        raise UserError(f"--steps={args.steps}; it must be at least 1")
    size, last = networks.SIZES[args.size], WARM_UP + args.steps
    with tempfile.TemporaryDirectory() as temporary:
        root = pathlib.Path(temporary)
        code = subprocess.call(
            [
                *(sys.executable, "-m", "lcm_jax.train"),
                "--config=configs/digits.py",
                f"--workdir={root / 'run'}",
                f"--config.model.folder={networks.write(size, root / 'folder')}",
                f"--config.data.image_size={4 * size.latents}",
                f"--config.batch_size={size.batch}",
                f"--config.steps={last + 2}",
                f"--config.profile.steps=({WARM_UP + 1}, {last})",
            ]
        )
        if code:
            return code
        found = operations(root / "run" / "profile")
    whole = max(end for _, end in found) - min(start for start, _ in found)
    print(
        f"{args.size}: {args.steps} steps of {whole / args.steps / 1e6:.0f} ms; in {1 - busy(found) / whole:.2%} of "
        "the time no operation of the step runs"
    )
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main, command="host_share"))
