"""Rewards whose scores are already there: of a record, whose images nobody scores again."""

from collections.abc import Mapping, Sequence
from concurrent.futures import Future

from adagrpo_train.scoring.collector import Source
from adagrpo_train.scoring.entry import RewardEntry
from rewards.client.batch import RewardBatch, RewardRefusedError
from rewards.contract import RewardInfo, Sample


class AnsweredReward:
    """Says what the reward is and has nothing more to say.

    Args:
        name: of the reward.
        metrics: of its scores.
        fingerprint: of the reward that gave them.
    """

    def __init__(self, name: str, *, metrics: Sequence[str], fingerprint: str) -> None:
        self.info = RewardInfo(
            name, tuple(metrics), value_range=None, max_batch=1, tolerance=0.0, source="a record", licence=""
        )
        self.fingerprint = fingerprint

    def wait_ready(self, seconds: float) -> None:
        """There is nobody to wait for."""

    def submit(self, samples: Sequence[Sample]) -> Future[RewardBatch]:
        """Refused: other scores than the recorded ones would be of another run."""
        raise RewardRefusedError(f"reward {self.info.name} has been recorded and scores no further image")

    def close(self) -> None:
        """Nothing is open."""


def answered(entries: Sequence[RewardEntry], recorded: Mapping[str, Mapping[str, object]]) -> list[Source]:
    """The sources of a run whose scores are recorded.

    Args:
        entries: what the configuration says of each.
        recorded: reward -> "metrics" and "fingerprint", of a record.
    """
    return [Source(entry, AnsweredReward(entry.name, **recorded[entry.name])) for entry in entries]  # pyright: ignore[reportArgumentType]
