"""Stable Diffusion 3.5 medium and FLUX.1-dev at their real sizes on one GPU, with random weights: seconds, MFU, memory.

NOT YET RUN ON A GPU: none was at hand when this was written. `--tiny` runs all of it on a CPU with models of a few
thousand weights; that shows that it works, and its figures mean nothing.

At 512 pixels, with one GPU's share of experiment=adagrpo_flux_hpsv3 (10 candidates, 16 steps, 12 branches at each of
steps 0, 2, 4 and 6) but a reward that costs next to nothing, it measures with the project's sampler and trainer:

- peak: the rate of a matrix product in the dtype of the network, what MFU is relative to;
- iteration: one AdaGRPO iteration after one that is not counted, split by stage. "rest" is what is
  neither network, decoding, waiting for the reward nor the update; "syncs" are the places where the host waits for the
  GPU, as torch.cuda.set_sync_debug_mode finds them;
- forward: one network call without gradient, by batch;
- update: forward, backward, clipping and optimizer step of one batch of transitions, in parts of update_micro_batch,
  with the largest |ratio - 1| of the rollout's log-probabilities before the first step;
- drift: the largest |ratio - 1| if transitions are drawn in one batch and evaluated one by one.

Networks with adapters are bfloat16; where every weight is trained, weights are float32 and products bfloat16. One FLOP
is an addition or a multiplication; they are counted on the network without adapters (torch.utils.flop_counter). A
backward pass counts as one forward with adapters and as two when every weight is trained. Memory is the most that torch
had allocated.

    python scripts/bench/gpu.py --out gpu.jsonl                  within 10 minutes; rows are written as they are known
    python scripts/bench/gpu.py --only 'flux_dev lora .* iteration'
    python scripts/bench/gpu.py --tiny
"""

import argparse
import gc
import itertools
import json
import re
import statistics
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO, cast

import torch
from drawn import SIZES, models_drawn, transformer
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils.flop_counter import FlopCounterMode

from adagrpo_train import build
from adagrpo_train.runtime.network import repeated_blocks
from adagrpo_train.settings import read_settings
from adagrpo_train.types import Conditions, Transitions

COMMON = [
    # One GPU's share of the published run: each of its 8 has 10 candidates and trains on one of them.
    *("experiment=adagrpo_flux_hpsv3", "curriculum.candidates=10", "curriculum.chosen=1", "engine=single"),
    *("model.resolution=512", "model.dtype=bfloat16", "reward=jpeg_size", "tracker=local"),
    "prompts.path=${asset:prompts/shapes_train.jsonl}",
    "prompts.evaluation_path=${asset:prompts/shapes_heldout.jsonl}",
]
TINY = [  # an iteration of the same shape, small
    *("curriculum.candidates=2", "group_size=2", "plan.at=[0,1]", "micro_batch=2"),
    *("model.num_steps=3", "model.resolution=32", "model.dtype=float32", "evaluation.images=7"),
    "network.autocast=null",
]


@dataclass(frozen=True)
class Setup:
    """A model and what of it is trained."""

    model: str  # option of the group, and name in drawn.SIZES
    trainable: str
    overrides: tuple[str, ...]


_SD35 = ("model.guidance_scale=1.0", "model.max_sequence_length=128")  # guidance would double every network call
SETUPS = (
    Setup("flux_dev", "lora", ("trainable.rank=64", "trainable.targets=all")),
    Setup("sd35_medium", "lora", (*_SD35, "trainable.rank=32", "trainable.targets=attention")),
    Setup("sd35_medium", "full", (*_SD35, "model.dtype=float32", "network.autocast=bfloat16")),
)
BATCHES = (1, 12, 48)
UPDATE_BATCHES = (1, 4, 12, 48)
COMPILED_UPDATE_BATCHES = (
    4,
)  # AdaGRPO's own: one state per branch step. Each size takes about half a minute to compile
TINY_BATCHES = (1, 2)
LIMIT_SECONDS = 5.0  # of the repeats of one figure
COLUMNS = ("model", "trainable", "mode", "case", "batch", "seconds", "tflops", "mfu", "peak_gib", "note")
WIDTHS = (13, 11, 10, 11, 7, 12, 12, 10, 10, 0)


class Record:
    """Writes each row as soon as it is known, and starts nothing once the budget is spent.

    Args:
        lines: gets a JSON object per row.
        budget_seconds: from now on; what has begun by then is finished.
        only: regular expression of the cases to measure, searched in "model trainable mode case batch".
        device: where the work is done.
    """

    def __init__(self, lines: TextIO, *, budget_seconds: float, only: str, device: torch.device) -> None:
        self._lines, self._only, self._device = lines, re.compile(only), device
        self._ends = time.monotonic() + budget_seconds
        print("".join(f"{name:<{width}}" for name, width in zip(COLUMNS, WIDTHS, strict=True)), flush=True)

    def wants(self, labels: Mapping[str, Any]) -> bool:
        return self._only.search(" ".join(str(value) for value in labels.values())) is not None

    def case(self, labels: Mapping[str, Any], measure: Callable[[], dict[str, Any]]) -> None:
        """Measure and write one row, or why there is none."""
        if time.monotonic() > self._ends:
            self.write({**labels, "note": "left out: the budget is spent"})
            return
        started = time.monotonic()
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        found: dict[str, Any]
        try:
            found = measure()
        except torch.OutOfMemoryError:
            found = {"note": "out of memory"}
            gc.collect()
        if self._device.type == "cuda":
            found["peak_gib"] = torch.cuda.max_memory_allocated(self._device) / 2**30
            torch.cuda.empty_cache()
        self.write({**labels, **found, "case_seconds": time.monotonic() - started})

    def write(self, row: Mapping[str, Any]) -> None:
        self._lines.write(json.dumps(row) + "\n")
        self._lines.flush()
        cells = (_shown(row.get(name)) for name in COLUMNS)
        print("".join(f"{cell:<{width}}" for cell, width in zip(cells, WIDTHS, strict=True)), flush=True)


class Subject:
    """A trainer on a drawn model.

    Args:
        peak: FLOP/s of a matrix product in a dtype.
        folder: of the trainer's run.
    """

    def __init__(
        self, setup: Setup, *, compiled: bool, tiny: bool, folder: Path, peak: Callable[[torch.dtype], float]
    ) -> None:
        self._setup, self._compiled, self._tiny = setup, compiled, tiny
        self._folder, self._peak_of = folder, peak
        self._iterations = itertools.count()
        self.built = False

    def build(self) -> dict[str, Any]:
        """Draw the model and make the trainer."""
        setup, tiny = self._setup, self._tiny
        path = f"{setup.model}{'_tiny' if tiny else ''}"
        overrides = [*COMMON, f"model={setup.model}", f"trainable={setup.trainable}", *setup.overrides]
        overrides += TINY if tiny else [f"network.compile={str(self._compiled).lower()}"]
        settings = read_settings([*overrides, f"model.path={path}"])
        engine = build.make_engine(settings)
        with models_drawn(engine.device):
            self._trainer, self._parts = build.make_trainer(settings, engine, self._folder, None)
        self._device, self._model = engine.device, cast(Any, self._parts.policy)._model
        counters.clear()
        if self._compiled and tiny:
            for block in repeated_blocks(self._model.transformer):
                block.compile(backend="eager")  # traced, but not translated to C++: that takes a minute
        self._conditions = self._parts.policy.encode(["a red circle"])
        on_meta = transformer(SIZES[path], self._model.dtype, torch.device("meta"))
        self._flops = flops_of_a_row(self._model, on_meta, self._conditions)
        self._peak = self._peak_of(torch.bfloat16 if settings.values["network"]["autocast"] else self._model.dtype)
        self.built = True
        return {"flops_of_a_row": self._flops, "note": f"{self._flops / 1e12:.4g} TFLOP a row"}

    def cases(self) -> Iterator[tuple[str, int | str, Callable[[], dict[str, Any]]]]:
        """Name, batch and function of everything that is measured, what matters most first."""
        batches, updates = BATCHES, COMPILED_UPDATE_BATCHES if self._compiled else UPDATE_BATCHES
        if self._tiny:
            batches = updates = TINY_BATCHES
        yield "iteration", "", self.iteration
        for batch in batches:
            yield "forward", batch, partial(self.forward, batch)
        for batch in updates:
            yield "update", batch, partial(self.update, batch)
        for batch in batches:
            yield "drift", batch, partial(self.drift, batch)

    def close(self) -> None:
        if self.built:
            self._parts.rewards.close()

    def iteration(self) -> dict[str, Any]:
        """One iteration by stage, after one that warms up (and compiles)."""
        warm_up = self._trainer._train_once(next(self._iterations))["time/iteration_seconds"]
        with _clock(self._parts.policy, self._device) as clock, _host_syncs(self._device) as places:
            metrics = self._trainer._train_once(next(self._iterations))
        whole = metrics["time/iteration_seconds"]
        stages = {
            "network": clock.network_seconds(),
            "decode": sum(clock.decoding),
            "reward": metrics["time/reward_seconds"],
            "update": metrics["time/update_seconds"],
        }
        stages["rest"] = whole - sum(stages.values())
        syncs = sum(places.values()) if self._device.type == "cuda" else None
        return {
            "seconds": whole,
            **self._rate(metrics["nfe/sampling"], stages["network"]),
            "stages": stages,
            "nfe": {kind: metrics[f"nfe/{kind}"] for kind in ("sampling", "training")},
            "ratio_deviation": metrics["policy/rollout_deviation"],
            "syncs": syncs,
            "sync_places": places,
            "warm_up_seconds": warm_up,
            "compiled_programs": counters["stats"]["unique_graphs"],
            "note": " ".join(f"{name} {seconds:.3g} s," for name, seconds in stages.items())
            + f" |ratio-1| {metrics['policy/first_ratio_deviation']:.1e}, {syncs} syncs; rate: network alone",
        }

    def forward(self, batch: int) -> dict[str, Any]:
        """A network call of a rollout."""
        policy = self._parts.policy
        x, sigma, conditions = self._states(batch)
        with torch.no_grad():
            seconds = _seconds_of(lambda: policy.velocity(x, sigma, conditions), self._device)
        return {"seconds": seconds, **self._rate(batch, seconds)}

    def update(self, batch: int) -> dict[str, Any]:
        """An optimizer step on a batch of transitions that the present weights have drawn."""
        batches = [self._draw(batch)]
        advantages, usable = torch.linspace(-1, 1, batch), torch.ones(batch, dtype=torch.bool)

        def step() -> dict[str, float]:
            return self._trainer._update(batches, self._conditions, advantages, usable, next(self._iterations))

        deviation = step()["policy/rollout_deviation"]
        seconds = _seconds_of(step, self._device)
        return {
            "seconds": seconds,
            **self._rate(batch * (2 if self._setup.trainable == "lora" else 3), seconds),
            "ratio_deviation": deviation,
            "note": f"|ratio-1| {deviation:.1e}",
        }

    def drift(self, batch: int) -> dict[str, Any]:
        """How far ratios are from 1 if a batch is not evaluated as it was drawn: at most 4 of its rows, one by one."""
        sampler, transition = self._parts.sampler, self._parts.sampler._transition
        drawn = self._draw(batch)
        assert drawn.log_prob is not None
        ratios = []
        for row in range(min(batch, 4)):
            x, sigma, sigma_next = (part[row : row + 1] for part in (drawn.x, drawn.sigma, drawn.sigma_next))
            with torch.no_grad():
                velocity = self._parts.policy.velocity(x, sigma, self._conditions)
            step = transition.step(x, velocity, sigma, sigma_next, sampler.sigma_max)
            ratios.append(transition.log_prob(drawn.x_next[row : row + 1], step) - drawn.log_prob[row : row + 1])
        deviation = float((torch.cat(ratios).exp() - 1).abs().max())
        return {"ratio_deviation": deviation, "note": f"|ratio-1| {deviation:.1e}"}

    def _draw(self, batch: int) -> Transitions:
        """One stochastic step of a batch, as the sampler makes and records it."""
        sampler = self._parts.sampler
        x, _, conditions = self._states(batch)
        rows = torch.zeros(batch, dtype=torch.long)
        with torch.no_grad():
            return sampler._draw(
                self._parts.policy.velocity,
                x,
                sampler.sigma(1, x),
                sampler.sigma(2, x),
                conditions,
                torch.randn(x.shape, device=self._device),
                rows,
                torch.arange(batch),
            )

    def _states(self, batch: int) -> tuple[Tensor, Tensor, Conditions]:
        x = torch.randn((batch, *self._model.latent_shape), device=self._device).to(self._model.dtype)
        rows = torch.zeros(batch, dtype=torch.long, device=self._device)
        return x, torch.full((batch,), 0.5, device=self._device), self._conditions[rows]

    def _rate(self, rows: float, seconds: float) -> dict[str, float]:
        rate = rows * self._flops * self._model.evaluations_per_velocity / seconds
        return {"tflops": rate / 1e12, "mfu": rate / self._peak}


def flops_of_a_row(model: Any, network: nn.Module, conditions: Conditions) -> int:
    """FLOPs of a network call without gradient with one row, counted on shapes alone.

    Args:
        network: on the device "meta".
        conditions: one row.
    """
    meta = torch.device("meta")
    x = torch.empty((1, *model.latent_shape), dtype=model.dtype, device=meta)
    on_meta: list[Any] = [None if value is None else value.to(meta) for value in vars(conditions).values()]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.velocity(network, x, torch.empty(1, device=meta), Conditions(*on_meta))
    return counter.get_total_flops() // model.evaluations_per_velocity


class Clock:
    """Seconds of network calls without gradient, on the device, and of decoding, on the host."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._spans: list[tuple[Any, Any]] = []
        self.decoding: list[float] = []

    def network_seconds(self) -> float:
        if self._device.type != "cuda":
            return sum(ended - started for started, ended in self._spans)
        torch.cuda.synchronize(self._device)
        return sum(started.elapsed_time(ended) for started, ended in self._spans) / 1000

    @contextmanager
    def network_call(self) -> Iterator[None]:
        started = self._stamp()
        yield
        self._spans.append((started, self._stamp()))

    def _stamp(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


@contextmanager
def _clock(policy: Any, device: torch.device) -> Iterator[Clock]:
    """Inside, the policy's calls are timed."""
    clock, velocity, decode = Clock(device), policy.velocity, policy.decode

    def timed_velocity(x: Tensor, sigma: Tensor, conditions: Conditions) -> Tensor:
        # The update is timed as a whole.
        with nullcontext() if torch.is_grad_enabled() else clock.network_call():
            return velocity(x, sigma, conditions)

    def timed_decode(x0: Tensor) -> Any:
        _wait_for(device)  # decoding ends with a copy to the host, which would wait for the network too
        started = time.perf_counter()
        images = decode(x0)
        clock.decoding.append(time.perf_counter() - started)
        return images

    policy.velocity, policy.decode = timed_velocity, timed_decode
    try:
        yield clock
    finally:
        del policy.velocity, policy.decode


@contextmanager
def _host_syncs(device: torch.device) -> Iterator[Counter[str]]:
    """How often the host waited for the GPU, by place in the code; empty without a GPU."""
    places: Counter[str] = Counter()
    if device.type != "cuda":
        yield places
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield places
        finally:
            torch.cuda.set_sync_debug_mode("default")
    found = (warning for warning in caught if "synchroniz" in str(warning.message) and warning.filename != __file__)
    places.update(f"{Path(warning.filename).name}:{warning.lineno}" for warning in found)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure everything. Returns 2 without a GPU, unless the models are tiny."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu.jsonl"), help="JSON lines; an older file is replaced")
    parser.add_argument("--budget-seconds", type=float, default=540.0, help="no measurement begins after them")
    parser.add_argument("--only", default="", metavar="REGEX", help='searched in "model trainable mode case batch"')
    parser.add_argument("--tiny", action="store_true", help="tiny models, on a CPU too")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not options.tiny:
        print("error: no GPU is there; --tiny runs on a CPU", file=sys.stderr)
        return 2
    with ExitStack() as stack:
        # More programs than torch's own limit are compiled on purpose; beyond one it would fall back without a word.
        changes = {"recompile_limit": 64, "fail_on_recompile_limit_hit": True}
        stack.enter_context(torch._dynamo.config.patch(changes))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        lines = stack.enter_context(options.out.open("w", encoding="utf-8"))
        record = Record(lines, budget_seconds=options.budget_seconds, only=options.only, device=device)
        peaks: dict[torch.dtype, float] = {}

        def peak(dtype: torch.dtype) -> float:
            if dtype not in peaks:
                peaks[dtype] = _matrix_product_rate(dtype, device, 256 if options.tiny else 8192)
                record.write(_machine(device) | {"case": "peak", "note": str(dtype), "tflops": peaks[dtype] / 1e12})
            return peaks[dtype]

        for setup, mode in itertools.product(SETUPS, ("eager", "compiled")):
            measure(
                setup, mode, record, peak, tiny=options.tiny, folder=folder / f"{setup.model}{setup.trainable}{mode}"
            )
    return 0


def measure(
    setup: Setup, mode: str, record: Record, peak: Callable[[torch.dtype], float], *, tiny: bool, folder: Path
) -> None:
    """All cases of a model, a choice of trained weights, and eager or compiled blocks."""
    labels = {"model": setup.model, "trainable": setup.trainable, "mode": mode}
    subject = Subject(setup, compiled=mode == "compiled", tiny=tiny, folder=folder, peak=peak)
    cases = [(labels | {"case": case, "batch": batch}, run) for case, batch, run in subject.cases()]
    wanted = [(row, run) for row, run in cases if record.wants(row)]
    if not wanted:
        return
    record.case(labels | {"case": "build", "batch": ""}, subject.build)
    if subject.built:
        for row, run in wanted:
            record.case(row, run)
    subject.close()
    gc.collect()
    torch._dynamo.reset()  # compiled programs hold what they were compiled for
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _seconds_of(function: Callable[[], Any], device: torch.device) -> float:
    """Median of up to 5 repeats, after one that is not counted."""
    function()
    _wait_for(device)
    seconds: list[float] = []
    while len(seconds) < 5 and sum(seconds) < LIMIT_SECONDS:
        started = time.perf_counter()
        function()
        _wait_for(device)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def _matrix_product_rate(dtype: torch.dtype, device: torch.device, size: int) -> float:
    """FLOP/s of the product of two square matrices."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    products = 20

    def multiply() -> None:
        for _ in range(products):
            torch.mm(a, b, out=out)

    return products * 2 * size**3 / _seconds_of(multiply, device)


def _machine(device: torch.device) -> dict[str, str]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return {"device": name, "torch": torch.__version__, "diffusers": version("diffusers")}


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _shown(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
