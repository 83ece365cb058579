"""What the queue of a server holds on to: images that are answered or given up must not outlive their byte budget."""

import asyncio
import threading
import time
import weakref
from collections.abc import Mapping, Sequence

import numpy as np

from rewards.contract import Sample
from rewards.server.batcher import Batcher
from rewards.server.limits import Limits
from rewards.server.metrics import Metrics
from rewards.shapes.reward import ShapesReward
from rewards.wire import Failure
from tests.serving.ordered import Greedy, Ordered


class Held(Ordered):
    """Scores when it is let."""

    def __init__(self) -> None:
        super().__init__()
        self.let = threading.Event()

    def score(self, batch: Sequence[Sample]) -> Sequence[Mapping[str, float]]:
        assert batch[0].id == "trial" or self.let.wait(10)
        return super().score(batch)


def _image() -> np.ndarray:
    return np.full((16, 16, 3), 7, np.uint8)


async def _started(reward: Held) -> Batcher:
    batcher = Batcher(reward, device="cpu", limits=Limits(), metrics=Metrics())
    await batcher.start()
    return batcher


def test_an_image_is_let_go_when_it_is_scored() -> None:
    async def score_one() -> None:
        reward = Held()
        reward.let.set()
        batcher = await _started(reward)
        image = _image()
        alive = weakref.ref(image)
        samples = [Sample("a", "", image)]
        assert await batcher.score(samples, time.monotonic() + 10) == [{"ordered": 7.0}]
        del samples, image
        await asyncio.sleep(0.1)
        assert alive() is None
        await batcher.stop()

    asyncio.run(score_one())


def test_an_image_that_nobody_waits_for_is_let_go_before_the_batch_at_hand_is_done() -> None:
    async def give_one_up() -> None:
        reward = Held()
        batcher = await _started(reward)
        first = asyncio.create_task(batcher.score([Sample("first", "", _image())], time.monotonic() + 10))
        await asyncio.sleep(0.1)
        image = _image()
        alive = weakref.ref(image)
        second = asyncio.create_task(batcher.score([Sample("second", "", image)], time.monotonic() + 10))
        await asyncio.sleep(0.1)
        second.cancel()
        await asyncio.gather(second, return_exceptions=True)
        del second, image
        await asyncio.sleep(0.1)
        assert alive() is None
        reward.let.set()
        assert await first == [{"ordered": 7.0}]
        await batcher.stop()

    asyncio.run(give_one_up())


def test_what_a_failed_batch_took_is_free_when_its_half_is_scored() -> None:
    batcher = Batcher(Greedy(), device="cpu", limits=Limits(), metrics=Metrics())
    outcomes = batcher._score([Sample(str(n), "", np.full((16, 16, 3), n, np.uint8)) for n in range(16)])
    assert outcomes == [{"ordered": float(n)} for n in range(16)]


def test_a_prompt_that_speaks_of_a_lost_gpu_ends_no_server() -> None:
    """The reward repeats the prompt in its refusal."""
    ends: list[int] = []
    batcher = Batcher(ShapesReward(), device="cpu", limits=Limits(), metrics=Metrics(), give_up=ends.append)
    image = np.zeros((32, 32, 3), np.uint8)
    refused, scored = batcher._score([Sample("a", "CUDA error", image), Sample("b", "a red circle", image)])
    assert isinstance(refused, Failure)
    assert (refused.code, ends) == ("unsupported_item", [])
    assert isinstance(scored, dict)
