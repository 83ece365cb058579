"""What ``/metrics`` shows."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram


class Metrics:
    """Counters of one server, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("reward_requests", "Requests by status", ["status"], registry=self.registry)
        self.images = Counter("reward_images", "Images by outcome", ["outcome"], registry=self.registry)
        self.queued_bytes = Gauge("reward_queued_bytes", "Bytes of bodies and pixels held now", registry=self.registry)
        self.batch_seconds = Histogram("reward_batch_seconds", "Seconds of a batch", registry=self.registry)
        sizes = (1, 2, 4, 8, 16, 32, 64, 128, 256)
        self.batch_images = Histogram("reward_batch_images", "Images of a batch", buckets=sizes, registry=self.registry)
