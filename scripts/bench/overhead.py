"""What the trainer adds to the work it cannot avoid.

For each algorithm: seconds of one iteration, against seconds of the bare network calls of that iteration (same
batches, forward or forward and backward), its image decoding and its reward, alternating in one process. The ratio
of the medians is printed; seconds on a shared machine are not comparable between runs, the ratio is.

    python scripts/bench/overhead.py --repeats 7
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adagrpo_train import build
from adagrpo_train.settings import read_settings
from adagrpo_train.trainer import Trainer
from adagrpo_train.types import Conditions
from rewards.contract import Sample

CASES = {
    "flow_grpo": ["algorithm=flow_grpo"],
    "dance_grpo": ["algorithm=dance_grpo"],
    "flow_cps": ["algorithm=flow_cps"],
    "flow_grpo + AdaGRPO": ["algorithm=flow_grpo", "adagrpo=on"],
    "flow_grpo, branches + AdaGRPO": ["algorithm=flow_grpo", "plan=branch", "adagrpo=on"],
    "demo (every weight)": ["experiment=tiny_demo"],
}


@dataclass
class Calls:
    """The unavoidable work of one iteration."""

    network: list[tuple[bool, int]] = field(default_factory=list)  # (with gradient, states)
    decoded: list[Tensor] = field(default_factory=list)
    scored: list[Sequence[Sample]] = field(default_factory=list)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="timed pairs per case")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{'case':<32}{'iteration s':>12}{'bare s':>10}{'ratio':>8}")
    for name, overrides in CASES.items():
        iteration, bare = measure(overrides, options.repeats)
        print(f"{name:<32}{iteration:>12.3f}{bare:>10.3f}{iteration / bare:>8.3f}", flush=True)


def measure(overrides: list[str], repeats: int) -> tuple[float, float]:
    """Median seconds of an iteration and of its bare calls."""
    settings = read_settings([*overrides, "tracker=local", "evaluation.images=7"])
    engine = build.make_engine(settings)
    with tempfile.TemporaryDirectory() as folder:
        trainer, parts = build.make_trainer(settings, engine, Path(folder), None)
        trainer._train_once(0)
        pairs = []
        for repeat in range(repeats):
            calls = Calls()
            undo = record(trainer, parts, calls)
            started = time.perf_counter()
            trainer._train_once(repeat + 1)
            iteration = time.perf_counter() - started
            undo()
            started = time.perf_counter()
            replay(parts, calls)
            pairs.append((iteration, time.perf_counter() - started))
    return statistics.median(p[0] for p in pairs), statistics.median(p[1] for p in pairs)


def record(trainer: Trainer, parts: build.Parts, calls: Calls) -> Callable[[], None]:
    """Note every call of the network, the decoder and the reward. Returns how to stop."""
    policy, client = parts.policy, parts.rewards.sources[0].client
    velocity, decode, submit = policy.velocity, policy.decode, client.submit

    def noted_velocity(x: Tensor, sigma: Tensor, conditions: Conditions) -> Tensor:
        calls.network.append((torch.is_grad_enabled(), len(x)))
        return velocity(x, sigma, conditions)

    def noted_decode(x0: Tensor) -> np.ndarray:
        calls.decoded.append(x0)
        return decode(x0)

    def noted_submit(samples: Sequence[Sample]) -> Any:
        calls.scored.append(samples)
        return submit(samples)

    policy.velocity, policy.decode, client.submit = noted_velocity, noted_decode, noted_submit  # type: ignore[method-assign]

    def undo() -> None:
        del policy.velocity, policy.decode, client.submit  # type: ignore[attr-defined]

    return undo


def replay(parts: build.Parts, calls: Calls) -> None:
    """The same batches through the network alone, then the decoder and the reward."""
    model, policy = parts.policy._model, parts.policy
    conditions = policy.encode(["a red circle"])
    for gradient, states in calls.network:
        x = torch.zeros((states, *model.latent_shape))  # type: ignore[attr-defined]
        sigma, rows = torch.full((states,), 0.5), conditions[torch.zeros(states, dtype=torch.long)]
        with torch.set_grad_enabled(gradient):
            output = model.velocity(policy.network, x, sigma, rows)
        if gradient:
            output.mean().backward()
    for x0 in calls.decoded:
        model.decode(x0)
    for samples in calls.scored:
        parts.rewards.sources[0].client.submit(samples).result()
    for parameter in policy.parameters:
        parameter.grad = None


if __name__ == "__main__":
    main()
