"""How much a server accepts. Published by ``/v1/info``, so that clients cut their requests to measure."""

import math
from dataclasses import asdict, dataclass

from rewards.wire import MAX_ITEMS, MAX_SIDE


@dataclass(frozen=True)
class Limits:
    """Bounds on one request and on all of them together.

    Attributes:
        body_bytes: largest body of one request, also after decompression.
        queued_bytes: bodies and the pixels of image files held at any time, over all requests; above it the answer is
            429.
        read_seconds: longest wait for the whole head of a request, and for its whole body.
        deadline_seconds: longest life of a request, whatever it asks for.
        batch_seconds: a batch that takes longer is taken for hung: the process ends, for its supervisor to restart.
        collect_seconds: how long a batch waits for more images.
        connections: most connections at once; others are hung up on.

    Raises:
        ValueError: a limit is no finite number above 0, or the budget is smaller than one body.
    """

    body_bytes: int = 64 * 2**20
    queued_bytes: int = 256 * 2**20
    read_seconds: float = 30.0
    deadline_seconds: float = 600.0
    batch_seconds: float = 300.0
    collect_seconds: float = 0.005
    connections: int = 1000

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                raise ValueError(f"{name}={value}: must be a finite number > 0")
        if self.queued_bytes < self.body_bytes:
            raise ValueError(f"queued_bytes={self.queued_bytes} must be at least body_bytes={self.body_bytes}")

    def public(self) -> dict[str, int | float]:
        """What ``/v1/info`` says."""
        return asdict(self) | {"items": MAX_ITEMS, "side": MAX_SIDE}
