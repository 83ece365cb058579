"""Whether a reward that answers scores as where its scores were recorded."""

from adagrpo_train.errors import RewardError
from adagrpo_train.scoring.collector import Source
from rewards import verify
from rewards.client.batch import RewardRefusedError, RewardUnavailableError


def compare_with_record(source: Source) -> bool:
    """Ask for the scores of the bundled pictures; whether a record was there to compare them with.

    Raises:
        RewardError: a score is not the recorded one, or the reward does not answer.
    """
    entry, info = source.entry, source.client.info
    record = verify.recorded(entry.reward, entry.settings)
    if record is None:
        return False
    try:
        batch = source.client.submit(verify.samples(info)).result()
    except (RewardUnavailableError, RewardRefusedError) as error:
        raise RewardError(f"reward {entry.name}: {error}") from error
    found = [
        {metric: float(batch.scores[metric][row]) for metric in info.metrics} if reason is None else reason
        for row, reason in enumerate(batch.reasons)
    ]
    # Why a picture is refused, a server says in words of its own.
    recorded = [
        new if isinstance(old, str) and isinstance(new, str) else old
        for old, new in zip(record["scores"], found, strict=False)
    ]
    if wrong := verify.differences(recorded, found, info.tolerance):
        raise RewardError(
            f"reward {entry.name} does not score as recorded: {'; '.join(wrong)}. Recorded of "
            f"{record['fingerprint']}, here it is {source.client.fingerprint}; install those versions, or look at "
            f"adagrpo-rewards verify {entry.reward}"
        )
    return True
