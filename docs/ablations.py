"""python docs/ablations.py [--runs=runs/ablations] [--only=k___50,l2]

Distils the digits teacher once for each line of RECIPES, `configs/digits.py` at half its length with a few options
changed, evaluates each result and writes the table of docs/ablations.md to standard output. What is there already is
not done again. GLIBC_TUNABLES=glibc.malloc.hugetlb=1 makes it a quarter faster on Linux.
"""

import argparse
import json
import pathlib
import subprocess
import sys

RECIPES: dict[str, list[str]] = {
    "as it is": [],
    "as it is, another seed": ["--config.seed=1"],
    "psi = DPM-Solver-2": ["--config.lcd.solver=dpm"],
    "psi = DPM-Solver++(2S)": ["--config.lcd.solver=dpmpp"],
    "k = 1": ["--config.lcd.skip=1"],
    "k = 5": ["--config.lcd.skip=5"],
    "k = 10": ["--config.lcd.skip=10"],
    "k = 50": ["--config.lcd.skip=50"],
    "no w-embedding": ["--config.lcd.w_embedding_dim=0"],
    "no EMA": ["--config.ema.decay=0.0"],
    "EMA 0.99": ["--config.ema.decay=0.99"],
    "EMA 0.999": ["--config.ema.decay=0.999"],
    "l2": ["--config.lcd.distance=l2"],
}
TRAINING = "--config.steps=600"
STEPS = (1, 2, 4)


def slug(name: str) -> str:
    """A folder's name for a recipe."""
    return "".join(c if c.isalnum() else "_" for c in name.lower()).strip("_")


def run(command: str, *arguments: str) -> None:
    """Runs one of lcm_jax's commands; stops everything if it fails."""
    subprocess.run([sys.executable, "-m", f"lcm_jax.{command}", *arguments], check=True, stdout=sys.stderr)


def main() -> None:
    """Runs what --only names, or all, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=pathlib.Path, default=pathlib.Path("runs/ablations"))
    parser.add_argument("--only", help="names of folders, with commas between")
    args = parser.parse_args()
    if unknown := set((args.only or "").split(",")) - {"", *map(slug, RECIPES)}:
        parser.error(f"--only: there is no {', '.join(sorted(unknown))}; there are {', '.join(map(slug, RECIPES))}")
    chosen = {name: o for name, o in RECIPES.items() if not args.only or slug(name) in args.only.split(",")}
    lines = []
    for name, overrides in chosen.items():
        folder = args.runs / slug(name)
        result = folder / "evaluation" / "evaluation.json"
        if not result.exists():
            which = "student" if "--config.ema.decay=0.0" in overrides else "ema"
            run("train", "--config=configs/digits.py", f"--workdir={folder}", TRAINING, *overrides)
            run("export", f"--workdir={folder}", f"--out={folder}/lcm", f"--which={which}")
            # one guidance for all, the middle of the range; without w-embedding it is in the weights
            guidance = 1.0 if "--config.lcd.w_embedding_dim=0" in overrides else 2.5
            steps = ",".join(map(str, STEPS))
            run("evaluate", f"--model={folder}/lcm", f"--steps={steps}", f"--guidance-scale={guidance}")
        rows = {r["steps"]: r["score"] for r in json.loads(result.read_text())["rows"] if r["name"] == "student"}
        cells = [f"{100 * rows[n]['prompt']['share']:.1f} %" for n in STEPS] + [
            f"{rows[n]['frechet']:.1f}" for n in STEPS
        ]
        lines.append(f"| {name} | `{' '.join(overrides) or '(no option)'}` | {' | '.join(cells)} |")
    print(f"| | options | {' | '.join(f'{n} right' for n in STEPS)} | {' | '.join(f'{n} Fréchet' for n in STEPS)} |")
    print("|---|---|" + "--:|" * 2 * len(STEPS))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
