"""When one rank fails, all end soon, and each says why."""

import os
import sys
import threading
from datetime import timedelta
from types import TracebackType

from torch.distributed import DistError, TCPStore

from adagrpo_train.errors import AdaGRPOError, TrainingError

GRACE_SECONDS = 30.0
"""After the first error, how long a rank may take to end by itself."""
_POLL_SECONDS = 1.0


class FailingTogether:
    """Around the work of a rank: its first error is left where the other ranks look, and theirs ends this one.

    A collective in which one rank is missing can wait as long as the process group allows. Here a second connection
    to the launcher's store tells within seconds that a rank has failed, and why; GRACE_SECONDS later the process is
    ended from a thread, whatever it waits for. A rank that is killed leaves no note: the others fail when the
    connection breaks, or after the group's timeout.

    Args:
        rank: of this process.
        world_size: with one process nothing is done.
    """

    def __init__(self, *, rank: int, world_size: int) -> None:
        self._rank, self._alone = rank, world_size == 1
        self._key = f"adagrpo_train/failed/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        self._done = threading.Event()

    def __enter__(self) -> None:
        if not self._alone:
            threading.Thread(target=self._watch, daemon=True).start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        if error is None or self._alone or (isinstance(error, AdaGRPOError) and error.on_every_rank):
            return
        first = self._leave_note(f"rank {self._rank}: {type(error).__name__}: {error}")
        if first and not first.startswith(f"rank {self._rank}:"):
            raise TrainingError(f"ended because another process failed first, {first}") from error
        if _is_of_communication(error):
            raise TrainingError(
                f"lost another process: it was killed, its machine is gone, or it did not answer within "
                f"engine.timeout_seconds ({str(error).partition('. ')[0]})"
            ) from error

    def _leave_note(self, text: str) -> str:
        """The first note that any rank left, this one's if there was none; "" when the store is gone."""
        try:
            return _store().compare_set(self._key, "", text).decode()
        except (DistError, RuntimeError):  # its process has ended: it failed first, and has said why itself
            return ""

    def _watch(self) -> None:
        try:
            store = _store()
            while not self._done.wait(_POLL_SECONDS):
                if store.check([self._key]):
                    break
            else:
                return
            note = store.get(self._key).decode()
        except (DistError, RuntimeError):  # the store's process has ended: the connections to it break by themselves
            return
        if not self._done.wait(GRACE_SECONDS):
            sys.stderr.write(f"error on rank {self._rank}: ended because another process failed first, {note}\n")
            sys.stderr.flush()
            os._exit(1)


def _store() -> TCPStore:
    """A connection of its own: the process group's is busy while it waits."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=10))


def _is_of_communication(error: BaseException) -> bool:
    """Whether an error came out of a collective; gloo raises plain RuntimeErrors."""
    return isinstance(error, DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error).lower())
