"""What the settings for memory and speed cost and save, on the embedded model.

Each setting against its default, alternating in one process: seconds of an update (forward and backward pass) or of a
rollout's network call as a ratio of medians; peak memory in a process of its own, above what lay there before.

    python scripts/bench/memory.py --repeats 5             # --compile adds minutes of compilation
"""

import argparse
import ctypes
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from adagrpo_train import build
from adagrpo_train.models.sd3 import SD3Model
from adagrpo_train.runtime.network import Computation
from adagrpo_train.runtime.prompt_cache import PromptEncoder
from adagrpo_train.runtime.replicated import ReplicatedEngine
from adagrpo_train.runtime.trainable import Full, LoRA
from adagrpo_train.settings import read_settings

SIZES = {"lora": LoRA(rank=16, alpha=32, targets="all"), "full": Full()}


@dataclass
class Case:
    """A model as one setting computes it, and the batch it works on."""

    model: SD3Model
    x: torch.Tensor
    sigma: torch.Tensor
    conditions: Any
    states: int  # per call of the update

    def rollout(self) -> None:
        with torch.no_grad():
            self.model.velocity(self.model.transformer, self.x, self.sigma, self.conditions)

    def update(self) -> None:
        for rows in torch.arange(len(self.x)).split(self.states):
            at = self.conditions[rows]
            self.model.velocity(self.model.transformer, self.x[rows], self.sigma[rows], at).square().mean().backward()
        self.model.transformer.zero_grad(set_to_none=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="timed pairs per setting")
    parser.add_argument("--batch", type=int, default=48, help="states per call of the rollout")
    parser.add_argument("--compile", action="store_true", help="measure network.compile, too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for trainable in SIZES:
        plain = case(trainable, options.batch)
        print(f"{trainable}: update of {options.batch} states, peak {megabytes(plain.update):.0f} MB", flush=True)
        settings: dict[str, dict[str, Any]] = {
            "network.gradient_checkpointing=always": {"gradient_checkpointing": "always"},
            "update_micro_batch=batch/6": {"states": options.batch // 6},
        }
        if options.compile:
            settings["network.compile=true"] = {"compile": True}
        for name, changes in settings.items():
            other = case(trainable, options.batch, **changes)
            started = time.perf_counter()
            other.rollout()
            other.update()
            first = time.perf_counter() - started
            print(
                f"  {name:<40} update time x {ratio(plain.update, other.update, options.repeats):.2f}"
                f"  rollout time x {ratio(plain.rollout, other.rollout, options.repeats):.2f}"
                f"  update peak x {megabytes(other.update) / megabytes(plain.update):.2f}"
                f"  first call {first:.1f} s",
                flush=True,
            )
    prompts(options.repeats)
    optimizers(options.repeats)


def case(trainable: str, batch: int, *, states: int | None = None, **changes: Any) -> Case:
    values = read_settings([]).values
    section = {key: value for key, value in values["model"].items() if key != "_target_"}
    model = SD3Model(**section, device=torch.device("cpu"))
    SIZES[trainable].attach(model, seed=0, reference=False)
    network = {"autocast": None, "gradient_checkpointing": "never", "compile": False}
    Computation(model, model.device, **(network | changes))
    conditions = model.encode(["a red circle"])[torch.zeros(batch, dtype=torch.long)]
    return Case(
        model, torch.randn((batch, *model.latent_shape)), torch.full((batch,), 0.5), conditions, states or batch
    )


def ratio(plain: Callable[[], None], other: Callable[[], None], repeats: int) -> float:
    """Median seconds of the second over median seconds of the first, taken in turns."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        for seconds, function in zip(times, (plain, other), strict=True):
            started = time.perf_counter()
            function()
            seconds.append(time.perf_counter() - started)
    return statistics.median(times[1]) / statistics.median(times[0])


def megabytes(function: Callable[[], None]) -> float:
    """Peak memory of a call above what its process had before, measured in a fork."""
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    process = context.Process(target=_peak, args=(function, results))
    process.start()
    peak = results.get()
    process.join()
    return peak


def _peak(function: Callable[[], None], results: Any) -> None:
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what earlier calls gave back would be taken again unseen
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = _status("VmRSS")
    function()
    results.put((_status("VmHWM") - before) / 1024)


def _status(name: str) -> int:
    """Kilobytes."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1])


def prompts(repeats: int) -> None:
    """Reading an embedding against encoding its prompt."""
    model = SD3Model(
        **{key: value for key, value in read_settings([]).values["model"].items() if key != "_target_"},
        device=torch.device("cpu"),
    )
    texts = [f"{count} red circles" for count in range(32)]
    encoders = sum(p.nbytes for part in model.text_encoders() for p in part.parameters()) / 1e6
    with tempfile.TemporaryDirectory() as folder:
        alone = ReplicatedEngine(kind="single", device="cpu", timeout_seconds=600)
        cache = PromptEncoder(model, folder=folder, engine=alone)
        cache.prepare(texts)
        again = case("lora", 1).model
        times = ratio(lambda: void(again.encode(texts)), lambda: void(cache.encode(texts)), repeats)
    print(
        f"prompt_cache: reading 32 prompts, time x {times:.2f} of encoding them in one batch; frees {encoders:.0f} MB"
    )


def void(_: object) -> None: ...


def optimizers(repeats: int) -> None:
    """State and step of the 8-bit optimizer against AdamW's, every weight trained."""
    made, size = [], []
    for name in ("adamw", "adamw_8bit"):
        model = case("full", 1).model
        for parameter in model.transformer.parameters():
            parameter.grad = torch.randn_like(parameter)
        try:
            optimizer = build.make(
                read_settings([f"optimizer={name}"]).values["optimizer"],
                "optimizer",
                params=list(model.transformer.parameters()),
            )
        except build.ConfigError as error:
            print(f"{name}: not measured ({error})")
            return
        optimizer.step()
        made.append(optimizer)
        size.append(sum(v.nbytes for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)))
    times = ratio(lambda: void(made[0].step()), lambda: void(made[1].step()), repeats)
    print(f"adamw_8bit: state x {size[1] / size[0]:.2f} ({size[0] / 1e6:.0f} MB with adamw), step time x {times:.2f}")


if __name__ == "__main__":
    main()
