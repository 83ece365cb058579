"""Three base algorithms, each plain, with the curriculum, and with AdaGRPO whole: does the training reward rise?

Starts one `adagrpo-train` per cell, by config groups alone, as many at once as there are cores, and prints the mean
training reward of the first and of the last iterations, with the held-out gain.

    python scripts/bench/nine_runs.py --trainable lora --iterations 40 --out runs/nine
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from statistics import mean

ALGORITHMS = ("flow_grpo", "dance_grpo", "flow_cps")
ARMS = {
    "plain": ("curriculum=uniform", "advantage=group"),
    "curriculum": ("curriculum=boundary", "advantage=group"),
    "curriculum + cross_level": ("curriculum=boundary", "advantage=cross_level"),
}
LEARNING_RATE = {"lora": "6e-4", "full": "1e-4"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trainable", nargs="+", choices=("lora", "full"), default=["lora", "full"])
    parser.add_argument("--iterations", type=int, default=40)
    parser.add_argument("--window", type=int, default=8, help="iterations averaged at each end")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at once, one thread each")
    parser.add_argument("--out", type=Path, default=Path("runs/nine"))
    parser.add_argument("overrides", nargs="*", help="further key=value settings for every run")
    options = parser.parse_args()
    cells = list(product(options.trainable, ALGORITHMS, ARMS))
    with ThreadPoolExecutor(options.jobs) as pool:
        folders = list(pool.map(lambda cell: run(cell, options), cells))
    print(f"{'trained':<8}{'algorithm':<12}{'arm':<26}{'first':>8}{'last':>8}{'gain':>8}   held-out strict")
    risen = 0
    for (trainable, algorithm, arm), folder in zip(cells, folders, strict=True):
        first, last = ends(folder, options.window)
        risen += last > first
        print(
            f"{trainable:<8}{algorithm:<12}{arm:<26}{first:>8.3f}{last:>8.3f}{last - first:>+8.3f}   {heldout(folder)}"
        )
    print(f"{risen} of {len(cells)} raised the training reward")


def run(cell: tuple[str, str, str], options: argparse.Namespace) -> Path:
    """One run; its folder. A failed run ends the whole program with its output."""
    trainable, algorithm, arm = cell
    folder = options.out / f"{trainable}-{algorithm}-{arm.replace(' ', '')}"
    command = [sys.executable, "-m", "adagrpo_train", f"trainable={trainable}", f"algorithm={algorithm}", *ARMS[arm]]
    command += [f"optimizer.lr={LEARNING_RATE[trainable]}", f"iterations={options.iterations}", "tracker=local"]
    command += ["evaluation.every=0", "checkpoint.every=0", *options.overrides, f"hydra.run.dir={folder}"]
    done = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr}")
    return folder


def ends(folder: Path, window: int) -> tuple[float, float]:
    """Mean training reward of the first and of the last `window` iterations."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rewards = [row["reward/mean"] for row in rows if "reward/mean" in row]
    return mean(rewards[:window]), mean(rewards[-window:])


def heldout(folder: Path) -> str:
    strict = json.loads((folder / "summary.json").read_text())["heldout"]["strict"]
    return f"{strict['before']:.3f} -> {strict['after']:.3f} ({strict['gain']:+.3f} +- {strict['standard_error']:.3f})"


if __name__ == "__main__":
    main()
