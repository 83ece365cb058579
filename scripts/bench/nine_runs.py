"""Three base algorithms, each plain, with the curriculum, and with AdaGRPO whole: does the training reward rise?

Starts one `adagrpo-train` per cell, by config groups alone, as many at once as there are cores. The training reward is
compared on fixed training prompts from fixed noise, before and after: that of the iterations themselves moves with the
mix of their prompts more than with the training.

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

# DanceGRPO moves every group from one start noise, which its own plan does: its steps are too small to tell samples of
# different start noises apart. Its published eta of 0.3 is for 16 steps; with 6 it hardly explores.
ALGORITHMS = {
    "flow_grpo": ("plan=fixed",),
    "dance_grpo": ("plan=random_steps", "algorithm.transition.eta=0.7"),
    "flow_cps": ("plan=fixed",),
}
ARMS = {
    "plain": ("curriculum=uniform", "advantage=group"),
    "curriculum": ("curriculum=boundary", "advantage=group"),
    "curriculum + cross_level": ("curriculum=boundary", "advantage=cross_level"),
}
LEARNING_RATE = {"lora": "4e-4", "full": "1e-4"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trainable", nargs="+", choices=("lora", "full"), default=["lora", "full"])
    parser.add_argument("--iterations", type=int, default=40)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at once, one thread each")
    parser.add_argument("--out", type=Path, default=Path("runs/nine"))
    parser.add_argument("overrides", nargs="*", help="further key=value settings for every run")
    options = parser.parse_args()
    cells = list(product(options.trainable, ALGORITHMS, ARMS))
    with ThreadPoolExecutor(options.jobs) as pool:
        folders = list(pool.map(lambda cell: run(cell, options), cells))
    print("| trained | algorithm | arm | training reward | gain |\n|---|---|---|---|---|")
    risen = 0
    for cell, folder in zip(cells, folders, strict=True):
        score = json.loads((folder / "summary.json").read_text())["heldout"]["total"]
        risen += score["gain"] > 0
        change = (
            f"{score['before']:.3f} -> {score['after']:.3f} | {score['gain']:+.3f} +- {score['standard_error']:.3f}"
        )
        print(f"| {' | '.join(cell)} | {change} |")
    print(f"\n{risen} of {len(cells)} raised the training reward")


def run(cell: tuple[str, str, str], options: argparse.Namespace) -> Path:
    """One run; its folder. A failed run ends the whole program with its output."""
    trainable, algorithm, arm = cell
    folder = options.out / f"{trainable}-{algorithm}-{arm.replace(' ', '')}"
    command = [sys.executable, "-m", "adagrpo_train", f"trainable={trainable}", f"algorithm={algorithm}", *ARMS[arm]]
    command += [*ALGORITHMS[algorithm], f"optimizer.lr={LEARNING_RATE[trainable]}", f"iterations={options.iterations}"]
    command += ["prompts.evaluation_path=${prompts.path}", "evaluation.every=0", "checkpoint.every=0", "tracker=local"]
    command += [*options.overrides, f"hydra.run.dir={folder}"]
    done = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr}")
    return folder


if __name__ == "__main__":
    main()
