"""What it costs to ask a reward server, as ratios within one run.

One server of a free scorer on the loopback, cases in turn, several rounds. For each case: CPU milliseconds per 64
images of this process (the client) and of the server, and the time from submission to scores, as medians over the
rounds and relative to the first case. Seconds on a shared machine are not comparable between runs; the ratios are.

    python scripts/bench/serving.py --rounds 9
"""

import argparse
import io
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import paced
from PIL import Image

from rewards.client import remote
from rewards.client.remote import RemoteClient, RemoteSettings
from rewards.client.supervisor import LocalServers
from rewards.contract import Sample
from rewards.wire import WireImage, WireItem

IMAGES = 64
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "raw, 8 images per request": ("raw", {}),
    "raw, 1 image per request": ("raw", {"chunk_images": 1}),
    "raw, 64 images per request": ("raw", {"chunk_images": IMAGES, "chunk_bytes": 2**26}),
    "raw through zstd, 8 per request": ("raw", {"compress": True}),
    "png, 8 images per request": ("png", {}),
}


class Cost(NamedTuple):
    """Of 64 images."""

    client: float  # CPU ms
    server: float  # CPU ms
    wall: float  # ms


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=4, help="batches of 64 images of a case in a round; png has one")
    parser.add_argument("--side", type=int, default=512, help="pixels")
    options = parser.parse_args()
    samples = pictures(options.side)
    costs: dict[str, list[Cost]] = {name: [] for name in CASES}
    with tempfile.TemporaryDirectory() as folder, paced.server(Path(folder, "free")) as server:
        for _ in range(options.rounds):
            for name, (fmt, changes) in CASES.items():
                repeats = 1 if fmt == "png" else options.repeats
                costs[name].append(measure(server, samples, fmt, changes, repeats))
    first = median(next(iter(costs.values())))
    title = f"per {IMAGES} images of {options.side} x {options.side}"
    print(f"{title:<34}" + "".join(f"{column + ' ms':>17}" for column in Cost._fields))
    for name, found in costs.items():
        cells = (f"{value:9.0f} ({value / base:5.2f})" for value, base in zip(median(found), first, strict=True))
        print(f"{name:<34}" + "".join(f"{cell:>17}" for cell in cells))


def measure(server: LocalServers, samples: list[Sample], fmt: str, changes: dict[str, Any], repeats: int) -> Cost:
    """Cost of one case, after one batch that is not counted."""
    (pid,) = server.processes
    with sent_as(FORMATS[fmt]):
        client = RemoteClient(server.urls, token=server.token, settings=RemoteSettings(**changes))
        client.submit(samples).result()
        before = time.process_time(), cpu_seconds(pid), time.monotonic()
        for _ in range(repeats):
            scores = client.submit(samples).result().scores["first"]
            assert np.array_equal(scores, np.arange(IMAGES)), scores
        after = time.process_time(), cpu_seconds(pid), time.monotonic()
        client.close()
    return Cost(*(1000 * (end - start) / repeats for start, end in zip(before, after, strict=True)))


def median(costs: list[Cost]) -> Cost:
    return Cost(*(statistics.median(values) for values in zip(*costs, strict=True)))


def pictures(side: int) -> list[Sample]:
    """Smooth colours with a little grain, as decoded latents have it. Sample n scores n."""
    rng = np.random.default_rng(0)
    samples = []
    for n in range(IMAGES):
        small = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        smooth = np.asarray(small.resize((side, side), Image.Resampling.BICUBIC), np.float32)
        image = np.clip(smooth + rng.normal(0, 2, smooth.shape), 0, 255).astype(np.uint8)
        image[0, 0, 0] = n
        samples.append(Sample(str(n), "a photo of a cat", image))
    return samples


@contextmanager
def sent_as(make: Callable[[str, Sample], WireItem]) -> Iterator[None]:
    """The client sends raw pixels; here it may send something else."""
    remote._wire_item = make
    try:
        yield
    finally:
        remote._wire_item = FORMATS["raw"]


def png_item(identity: str, sample: Sample) -> WireItem:
    file = io.BytesIO()
    Image.fromarray(sample.image).save(file, format="PNG")
    height, width, _ = sample.image.shape
    return WireItem(identity, sample.prompt, WireImage("png", width, height, memoryview(file.getvalue())))


def cpu_seconds(pid: int) -> float:
    """User and system time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


FORMATS: dict[str, Callable[[str, Sample], WireItem]] = {"raw": remote._wire_item, "png": png_item}


if __name__ == "__main__":
    main()
