"""Two processes that differ in what their rewards say, and still decide together."""

import json
import os
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from torch.multiprocessing import start_processes

from adagrpo_train.errors import AdaGRPOError
from adagrpo_train.runtime.engine import Engine
from adagrpo_train.runtime.replicated import ReplicatedEngine
from adagrpo_train.runtime.stopping import StopRequest
from adagrpo_train.scoring.collector import Source
from adagrpo_train.scoring.connect import Rewards
from adagrpo_train.scoring.entry import RewardEntry
from adagrpo_train.scoring.scorer import Scorer
from rewards import registry
from rewards.client.batch import RewardUnavailableError
from rewards.client.inproc import InprocClient
from rewards.contract import ItemError, Sample
from rewards.shapes.reward import ShapesReward
from tests.support import PROMPTS, Memory, make_trainer, use_reward

pytestmark = pytest.mark.slow


class Pixels(ShapesReward):
    """Spread inside every group; from its second call on, rank 0 misses what the mood says."""

    def __init__(self, mood: str = "") -> None:
        self._mood, self._calls = mood, 0

    def score(self, batch: Sequence[Sample]) -> Sequence[Mapping[str, float]]:
        self._calls += 1
        if self._calls > 1 and os.environ["RANK"] == "0":
            if self._mood == "missing":
                raise ItemError("not on this rank")
            if self._mood == "away":
                raise RewardUnavailableError("away")
        return [dict.fromkeys(self.info.metrics, float(sample.image.mean()) / 255) for sample in batch]

    def fingerprint(self) -> str:
        return f"pixels of rank {os.environ['RANK']}"


def test_two_ranks_decide_together_though_one_alone_lacks_scores(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    start_processes(_rank, args=(port, tmp_path), nprocs=2, start_method="fork")
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first["stopped"] == second["stopped"] == "StoppedError: asked to stop while waiting for reward shapes"
    assert first["fingerprints"] == second["fingerprints"]
    assert "pixels of rank 0 for process 0 and pixels of rank 1 for process 1" in first["fingerprints"]
    assert first["moved"] == second["moved"] != first["start"] == second["start"]
    (row,) = first["training"]
    assert (row["policy/updates"], row["reward/unused_fraction"]) == (2, 0.5)
    assert "curriculum/level" not in row  # per_rank: the main rank has nothing yet to tell it from
    assert row["advantage/abs_mean"] > 0


def _rank(rank: int, port: int, folder: Path) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "LOCAL_WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
    }
    AcceleratorState._reset_state(reset_partial_state=True)  # what earlier tests of the forked process left
    torch.set_num_threads(1)
    engine = ReplicatedEngine(kind="ddp", device="cpu", timeout_seconds=600)
    said = {"stopped": _stopped(engine), "fingerprints": _fingerprints(engine, folder)} | _trained(folder)
    (folder / f"{rank}.json").write_text(json.dumps(said))
    engine.close()


def _stopped(engine: Engine) -> str:
    """Rank 0 misses its reward; rank 1 has its scores and is the one that is asked to stop."""
    stop = StopRequest()
    stop.requested = engine.rank == 1
    entry = RewardEntry(name="shapes", reward="shapes", settings={}, weights={"smooth": 1.0}, on_unavailable="wait")
    client = InprocClient(Pixels("away"), device="cpu")
    scorer = Scorer([Source(entry, client)], scale="raw", level="reward", alpha=0.5, engine=engine, stop=stop)
    image = torch.zeros((1, 32, 32, 3), dtype=torch.uint8).numpy()
    scorer.score(image, PROMPTS.texts[:1])
    return _error(lambda: scorer.score(image, PROMPTS.texts[:1]))


def _fingerprints(engine: Engine, folder: Path) -> str:
    entry = RewardEntry(name="shapes", reward="shapes", settings={}, weights={"smooth": 1.0})
    make, registry.make = registry.make, lambda name, settings: Pixels()
    try:
        return _error(lambda: Rewards([entry], engine=engine, log_dir=folder))
    finally:
        registry.make = make


def _trained(folder: Path) -> dict[str, Any]:
    settings = ["iterations=1", "advantage=cross_level", "curriculum.per_rank=true", "micro_batch=2"]
    settings += [
        "updates_per_iteration=2",
        "model.num_steps=5",
        "reward.shapes.max_bad_fraction=0.6",
        "evaluation.images=2",
    ]
    trainer, parts, _ = make_trainer(*settings, run_dir=folder)
    use_reward(trainer, Pixels("missing"))
    start, memory = _weights(parts), Memory()
    assert trainer.train(memory if os.environ["RANK"] == "0" else None) == "completed"
    return {"start": start, "moved": _weights(parts), "training": memory.training}


def _weights(parts: Any) -> float:
    return float(sum(p.detach().double().square().sum() for p in parts.policy.parameters))


def _error(call: Any) -> str:
    try:
        call()
    except AdaGRPOError as error:
        assert error.on_every_rank
        return f"{type(error).__name__}: {error}"
    return "no error"
