"""How much of the time of a slow reward an iteration hides.

Whole iterations of the trainer on the embedded model. A local server scores with a reward that takes so many
milliseconds per image and no time of this machine's processors, as one on a GPU of its own. Three arms, in turn in one
process, their order changing from round to round:

- free: the same server with a reward that takes no time, which is the floor;
- overlapped: as shipped, each batch of images is submitted when it is drawn and scored while the next is drawn;
- held back: no image is submitted before all are drawn.

All figures are medians over the rounds. Waiting is the time between the last image drawn and the last score, plus that
for the scores of the candidates; hidden is the share of the waiting of "held back" that overlapping saves. It varies
less than whole iterations do where other jobs share the processors. What cannot be hidden: the batch drawn last, and
the candidates of AdaGRPO, which are scored before it is known what to draw. The images of branches are all finished by
one last step, and the update needs every score.

    python scripts/bench/overlap.py --milliseconds 20 --rounds 3
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import paced
import torch

from adagrpo_train import build
from adagrpo_train.scoring.collector import Collector
from adagrpo_train.settings import read_settings
from adagrpo_train.types import Images, Scores

ONE_STEP = ["plan=fixed", "plan.noisy=[0]"]  # a short update: sampling and scoring are most of the iteration
CASES = {
    "default, 2 batches of 48": [],
    "1 trained step, 8 of 12": [*ONE_STEP, "micro_batch=12"],
    "1 trained step, 8 of 12, AdaGRPO": [*ONE_STEP, "micro_batch=12", "adagrpo=on"],
}
ARMS = ("free", "overlapped", "held back")


class HeldBack:
    """A collector that submits nothing before the scores are asked for."""

    def __init__(self, collector: Collector) -> None:
        self._collector = collector
        self._pieces: list[tuple[Images, Sequence[str], Sequence[int] | None]] = []

    def add(self, images: Images, prompts: Sequence[str], groups: Sequence[int] | None = None) -> None:
        self._pieces.append((images, prompts, groups))

    def scores(self) -> Scores:
        for piece in self._pieces:
            self._collector.add(*piece)
        return self._collector.scores()


class Timed:
    """A trainer whose reward takes so many milliseconds per image."""

    def __init__(self, overrides: list[str], milliseconds: float, folder: Path) -> None:
        reward = ["reward=custom", "reward.custom.mode=local", f"reward.custom.reward={paced.NAME}"]
        reward += ["reward.custom.weights.brightness=1", f"reward.custom.settings.milliseconds={milliseconds}"]
        settings = read_settings([*overrides, *reward, "tracker=local", "evaluation.images=7"])
        self._trainer, self._parts = build.make_trainer(settings, build.make_engine(settings), folder, None)
        self._iteration = 0

    def iterate(self, *, hold_back: bool) -> tuple[float, float]:
        """Seconds of the next iteration, and of waiting for scores in it."""
        scorer = self._parts.scorer
        collect = scorer.collect
        if hold_back:
            scorer.collect = lambda: HeldBack(collect())  # type: ignore[method-assign]
        started = time.perf_counter()
        metrics = self._trainer._train_once(self._iteration)
        seconds = time.perf_counter() - started
        scorer.collect = collect
        self._iteration += 1
        assert "reward/skipped" not in metrics
        return seconds, metrics["time/reward_seconds"]

    def close(self) -> None:
        self._parts.rewards.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--milliseconds", type=float, default=20.0, help="of the slow reward, per image")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    columns = (*(f"{arm} s" for arm in ARMS), "overlapped/held", *(f"waiting, {arm} s" for arm in ARMS[1:]), "hidden")
    print(f"{f'{options.milliseconds:g} ms per image':<34}" + "".join(f"{c:>{len(c) + 3}}" for c in columns))
    for name, overrides in CASES.items():
        cells = measure(overrides, options.milliseconds, options.rounds)
        print(f"{name:<34}" + "".join(f"{v:>{len(c) + 3}.2f}" for v, c in zip(cells, columns, strict=True)), flush=True)


def measure(overrides: list[str], milliseconds: float, rounds: int) -> list[float]:
    """Medians over the rounds, in the order of the columns."""
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        folder = Path(temporary)
        stack.enter_context(known_here(folder))
        free = Timed(overrides, 0.0, folder / "free")
        stack.callback(free.close)
        slow = Timed(overrides, milliseconds, folder / "slow")
        stack.callback(slow.close)
        arms = {"free": (free, False), "overlapped": (slow, False), "held back": (slow, True)}
        rows = []
        for n in range(rounds + 1):  # the first is not counted
            order = ARMS[n % 3 :] + ARMS[: n % 3]
            found = {arm: arms[arm][0].iterate(hold_back=arms[arm][1]) for arm in order}
            floor, (over, waited), (held, waited_held) = found["free"][0], found["overlapped"], found["held back"]
            rows.append((floor, over, held, over / held, waited, waited_held, 1 - waited / waited_held))
    return [statistics.median(values) for values in zip(*rows[1:], strict=True)]


@contextmanager
def known_here(folder: Path) -> Iterator[None]:
    """This process and the servers it starts know the reward meanwhile."""
    variables = paced.installed(folder)
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    sys.path.append(str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


if __name__ == "__main__":
    main()
