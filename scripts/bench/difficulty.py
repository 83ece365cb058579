"""How much does one image say about how hard a prompt is, and what do curricula then choose?

Reads an evaluation with several samples of each prompt:

    adagrpo-eval prompts.evaluation_path='${prompts.path}' evaluation.samples=12 hydra.run.dir=runs/difficulty
    python scripts/bench/difficulty.py runs/difficulty/evaluation.jsonl

A prompt's difficulty is the mean of its samples. Each curriculum chooses by one sample of every candidate, as in
training; "boundary, by the mean" knows the difficulty. The level is the mean of all samples.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch

from adagrpo_train.functional import selection


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("evaluation", type=Path)
    parser.add_argument("--score", default="total")
    parser.add_argument("--candidates", type=int, default=32)
    parser.add_argument("--chosen", type=int, default=8)
    parser.add_argument("--draws", type=int, default=4000)
    options = parser.parse_args()
    samples = read(options.evaluation, options.score)
    prompts, number = samples.shape
    within = samples.var(1, ddof=1).mean()
    between = samples.mean(1).var(ddof=1) - within / number
    print(f"{prompts} prompts, {number} samples of each; {options.score} {samples.mean():.3f}")
    print(f"standard deviation between prompts {max(between, 0.0) ** 0.5:.3f}, within a prompt {within**0.5:.3f}")
    print(f"of the variance of a single image {between / (between + within):.0%} is the prompt's")
    print(f"within 0.1 of the mean lie {(np.abs(samples - samples.mean()) < 0.1).mean():.1%} of the images\n")
    print("| chosen | distance of its difficulty from the level | spread of a group |\n|---|---|---|")
    for name, (distance, spread) in choices(samples, options.candidates, options.chosen, options.draws).items():
        print(f"| {name} | {distance:.3f} | {spread:.3f} |")


def read(path: Path, score: str) -> np.ndarray:
    """Scores [prompts, samples]."""
    by_prompt = defaultdict[str, list[float]](list)
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        by_prompt[row["prompt"]].append(row[score])
    return np.array(list(by_prompt.values()))


def choices(samples: np.ndarray, candidates: int, chosen: int, draws: int) -> dict[str, tuple[float, float]]:
    """Means over many drawn candidates: |difficulty - level| of the chosen prompts, and the spread of their samples."""
    rng = np.random.default_rng(0)
    level, difficulty, spread = float(samples.mean()), samples.mean(1), samples.std(1, ddof=1)
    found = defaultdict[str, list[np.ndarray]](list)
    for _ in range(draws):
        rows = rng.choice(len(samples), candidates, replace=False)
        single = torch.tensor(samples[rows, rng.integers(samples.shape[1], size=candidates)])
        picks = {
            "random": list(range(chosen)),
            "easiest": selection.easiest(single, chosen),
            "hardest": selection.hardest(single, chosen),
            "median": selection.nearest_to_median(single, chosen),
            "boundary": selection.nearest_to(single, level, chosen),
            "boundary, by the mean": selection.nearest_to(torch.tensor(difficulty[rows]), level, chosen),
        }
        for name, picked in picks.items():
            own = rows[picked]
            found[name].append(np.array([np.abs(difficulty[own] - level).mean(), spread[own].mean()]))
    means = {name: np.mean(values, axis=0) for name, values in found.items()}
    return {name: (float(distance), float(spread)) for name, (distance, spread) in means.items()}


if __name__ == "__main__":
    main()
