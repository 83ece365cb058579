"""How near the estimates of `adagrpo-check` come to what training then takes.

For each case, alternating: a process checks the run and estimates seconds and memory, another trains it for some
iterations and measures them. Printed are ratios, estimate over measurement, of medians: of an iteration and of an
evaluation by the clock and in processor seconds (which others on the machine disturb less), and of the peak memory.

    python scripts/bench/plan.py --repeats 2
"""

import argparse
import multiprocessing
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

CASES = {
    "default (adapters)": [],
    "every weight, AdaGRPO": ["trainable=full", "adagrpo=on"],
    "branches, AdaGRPO": ["plan=branch", "adagrpo=on"],
    "the demo": ["experiment=tiny_demo"],
    "tiny_flux, Flow-CPS with KL": ["model=tiny_flux", "algorithm=flow_cps", "algorithm.objective.kl_weight=0.01"],
}
FIGURES = ("iteration s", "iteration CPU s", "evaluation s", "evaluation CPU s", "peak MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=2, help="checks and trainings of each case")
    parser.add_argument("--iterations", type=int, default=4, help="of each training; the first one is not counted")
    parser.add_argument("--images", type=int, default=96, help="of an evaluation")
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    options = parser.parse_args()
    print(f"{'case':<30}" + "".join(f"{name:>26}" for name in FIGURES))
    for case, overrides in ((case, own) for case, own in CASES.items() if options.only in case):
        run = [*overrides, "tracker=local", "evaluation.every=0", "checkpoint.every=0"]
        run += [f"evaluation.images={options.images}", "evaluation.grid_images=7", "lr_schedule.anneal_iterations=0"]
        run += [f"iterations={options.iterations}"]
        found: dict[Callable[..., Any], list[tuple[float, ...]]] = {checked: [], trained: []}
        for _ in range(options.repeats):
            for function, figures in found.items():
                figures.append(alone(function, run, options.threads))
        cells = []
        for before, after in zip(*(zip(*figures, strict=True) for figures in found.values()), strict=True):
            estimate, measured = statistics.median(before), statistics.median(after)
            cells.append(f"{estimate:.3g} / {measured:.3g} = {estimate / measured:.2f}")
        print(f"{case:<30}" + "".join(f"{cell:>26}" for cell in cells), flush=True)


def alone(function: Callable[..., tuple[float, ...]], *arguments: Any) -> tuple[float, ...]:
    """What a function returns in a process of its own, whose memory begins at nothing."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(function, *arguments).result()


def checked(overrides: list[str], threads: int) -> tuple[float, ...]:
    """FIGURES as the check estimates them."""
    from adagrpo_train import build
    from adagrpo_train.preflight.run import Preflight
    from adagrpo_train.settings import read_settings

    torch.set_num_threads(threads)
    settings = read_settings(overrides)
    preflight = Preflight(settings, build.make_engine(settings), lambda text: None)
    preflight()
    assert preflight.estimates is not None
    clock, processor = preflight.estimates
    return clock.iteration, processor.iteration, clock.evaluation, processor.evaluation, clock.peak / 1e6


def trained(overrides: list[str], threads: int) -> tuple[float, ...]:
    """FIGURES of a real run."""
    from adagrpo_train.cli.train import main as train
    from adagrpo_train.trainer import Trainer

    torch.set_num_threads(threads)
    iterations, evaluations = timed(Trainer, "_train_once"), timed(Trainer, "_evaluate")
    with tempfile.TemporaryDirectory() as folder:
        status = train([*overrides, f"hydra.run.dir={Path(folder) / 'run'}"])
    assert status == 0
    seconds = [statistics.median(values) for values in zip(*iterations[1:], strict=True)]
    _, held_out = evaluations  # the first one warms up
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    return *seconds, *held_out, peak


def timed(owner: Any, method: str) -> list[tuple[float, float]]:
    """Clock and processor seconds of every call of a method from now on."""
    seconds: list[tuple[float, float]] = []
    original = getattr(owner, method)

    def noted(*arguments: Any, **named: Any) -> Any:
        clock, processor = time.perf_counter(), time.process_time()
        result = original(*arguments, **named)
        seconds.append((time.perf_counter() - clock, time.process_time() - processor))
        return result

    setattr(owner, method, noted)
    return seconds


if __name__ == "__main__":
    main()
