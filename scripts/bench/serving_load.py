"""How a reward server bears load: does it still answer whether it is well, and does its memory keep to its budget?

Health: latency of /healthz and /readyz, each over a connection of its own as probes make them, while a process of its
own keeps the server scoring, for several rounds over the cases. Memory: peak over idle resident memory of a server
while 24 clients send it far more than its byte budget at once, how often it asked them to come back, and whether all
of them got all scores in the end.

    python scripts/bench/serving_load.py --seconds 4 --rounds 3
"""

import argparse
import collections
import multiprocessing
import re
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from http.client import HTTPConnection
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import numpy as np
import paced
import serving

from rewards.client.remote import RemoteClient, RemoteSettings
from rewards.client.supervisor import LocalServers
from rewards.contract import Sample
from rewards.wire import WireItem

MIB = 2**20
BATCHES = 2  # of serving.IMAGES images of 512 px under way at once while health is asked for
PROBE_PAUSE_SECONDS = 0.01
HEALTH_TARGET_MS = 50
MEMORY_SLACK_MIB = 64
CLIENTS = 24
RED = 100  # the score of every image
WORKLOADS: dict[str, tuple[str, Mapping[str, object], bool]] = {
    "idle": (paced.NAME, {}, False),
    "sleeps 5 ms per image": (paced.NAME, {"milliseconds": 5}, True),
    "computes 5 ms per image": (paced.NAME, {"milliseconds": 5, "works": True}, True),
    "computes nothing": (paced.NAME, {}, True),
    "tiny_clip": ("tiny_clip", {}, True),
}
"""Case -> reward, its settings, whether it is kept scoring."""


class Overload(NamedTuple):
    """What every client asks for, and the byte budget of the server it asks."""

    budget: int  # MiB
    side: int  # pixels
    fmt: str
    chunk: int  # images of a request


OVERLOADS = {
    "raw 512 px, 8 per request": Overload(64, 512, "raw", 8),
    "raw 1024 px, 4 per request": Overload(256, 1024, "raw", 4),
    "png 1024 px, 8 per request": Overload(64, 1024, "png", 8),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=4.0, help="of probing per case and round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=3, help="of each overloading client")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report_health(Path(folder), options.rounds, options.seconds)
        with ProcessPoolExecutor(CLIENTS, multiprocessing.get_context("spawn")) as clients:
            list(clients.map(time.sleep, [1.0] * CLIENTS))  # all have started
            report_memory(Path(folder), options.requests, clients)


def report_health(folder: Path, rounds: int, seconds: float) -> None:
    found: dict[tuple[str, str], list[float]] = collections.defaultdict(list)
    images: collections.Counter[str] = collections.Counter()
    with ExitStack() as stack:
        servers = {
            name: stack.enter_context(paced.server(folder / f"health{n}", reward, settings=settings))
            for n, (name, (reward, settings, _)) in enumerate(WORKLOADS.items())
        }
        for _ in range(rounds):
            for name, server in servers.items():
                before = scored(server)
                with busy(server) if WORKLOADS[name][2] else ExitStack():
                    for path, latencies in probe(server.urls[0], seconds).items():
                        found[name, path] += latencies
                images[name] += scored(server) - before
    print(f"{'ms to an answer while scoring':<32}{'path':<10}{'probes':>7}{'p50':>8}{'p95':>8}{'max':>8}{'images':>8}")
    for (name, path), latencies in found.items():
        p50, p95 = np.percentile(latencies, (50, 95))
        print(
            f"{name:<32}{path:<10}{len(latencies):>7}{p50:>8.1f}{p95:>8.1f}{max(latencies):>8.1f}{images[name]:>8}"
            f"{'' if p95 < HEALTH_TARGET_MS else f'  above {HEALTH_TARGET_MS} ms'}"
        )


def probe(url: str, seconds: float) -> dict[str, list[float]]:
    """Milliseconds from connecting to the whole answer."""
    found: dict[str, list[float]] = {"/healthz": [], "/readyz": []}
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for path, latencies in found.items():
            started = time.perf_counter()
            connection = HTTPConnection(urlsplit(url).netloc, timeout=30)
            connection.request("GET", path)
            answer = connection.getresponse()
            answer.read()
            latencies.append(1000 * (time.perf_counter() - started))
            connection.close()
            assert answer.status == 200, (path, answer.status)
            time.sleep(PROBE_PAUSE_SECONDS)
    return found


@contextmanager
def busy(server: LocalServers) -> Iterator[None]:
    """The server always has images to score meanwhile."""
    context = multiprocessing.get_context("spawn")
    begun, enough = context.Event(), context.Event()
    load = context.Process(target=keep_scoring, args=(server.urls, server.token, begun, enough))
    load.start()
    try:
        assert begun.wait(60), "no scores"
        yield
    finally:
        enough.set()
        load.join()


def keep_scoring(urls: list[str], token: str, begun: Event, enough: Event) -> None:
    """In a process of its own, whose work does not hold up the one that probes."""
    client, samples = RemoteClient(urls, token=token), serving.pictures(512)
    waiting = collections.deque(client.submit(samples) for _ in range(BATCHES))
    while not enough.is_set():
        waiting.popleft().result()
        begun.set()
        waiting.append(client.submit(samples))
    client.close()


def report_memory(folder: Path, requests: int, clients: Executor) -> None:
    columns = ("budget", "asked for", "idle", "peak - idle", "after - idle")
    print(f"\n{f'MiB of a server, {CLIENTS} clients':<32}" + "".join(f"{column:>14}" for column in columns), end="")
    print(f"{'scores':>12}{'429':>7}{'seconds':>9}")
    for n, (name, case) in enumerate(OVERLOADS.items()):
        limits = {"queued_bytes": case.budget * MIB, "body_bytes": min(64, case.budget) * MIB}
        with paced.server(folder / f"memory{n}", settings={"milliseconds": 20}, limits=limits) as server:
            started = time.monotonic()
            idle, peak, after, scores = overload(server, case, requests, clients)
            seconds, refused = time.monotonic() - started, metric(server, 'reward_requests_total{status="429"}')
        pixels = 3 * case.side**2 * case.chunk
        asked = CLIENTS * RemoteSettings().in_flight * pixels / MIB
        cells = (case.budget, asked, idle, peak - idle, after - idle)
        print(
            f"{name:<32}" + "".join(f"{cell:>14.0f}" for cell in cells) + f"{scores:>12}{refused:>7}{seconds:>9.1f}"
            f"{'' if peak - idle <= case.budget + MEMORY_SLACK_MIB else f'  above budget + {MEMORY_SLACK_MIB} MiB'}",
            flush=True,
        )


def overload(server: LocalServers, case: Overload, requests: int, clients: Executor) -> tuple[float, float, float, str]:
    """Idle, peak and later resident MiB, and "scores had/asked for"."""
    (pid,) = server.processes
    for _ in range(2):  # code and buffers that stay
        ask(server.urls, server.token, case, 1)
    idle = resident(pid, "VmRSS")
    Path(f"/proc/{pid}/clear_refs").write_text("5")  # forget the peak so far
    answers = [clients.submit(ask, server.urls, server.token, case, requests) for _ in range(CLIENTS)]
    had = sum(answer.result() for answer in answers)
    peak = resident(pid, "VmHWM")
    time.sleep(0.5)
    return idle, peak, resident(pid, "VmRSS"), f"{had}/{CLIENTS * requests * case.chunk}"


def ask(urls: list[str], token: str, case: Overload, requests: int) -> int:
    """How many images of one client, submitted all at once, got their score."""
    image = np.full((case.side, case.side, 3), RED, np.uint8)
    samples = [Sample(str(n), "a photo of a cat", image) for n in range(requests * case.chunk)]
    settings = RemoteSettings(chunk_images=case.chunk, chunk_bytes=64 * MIB)
    picture = serving.FORMATS[case.fmt]("0", samples[0]).image  # once: to keep the server busy
    with serving.sent_as(lambda identity, sample: WireItem(identity, sample.prompt, picture)):
        client = RemoteClient(urls, token=token, settings=settings)
        batch = client.submit(samples).result()
        client.close()
    return int((batch.scores["first"] == RED).sum())


def resident(pid: int, field: str) -> float:
    """MiB; VmRSS is the memory held now, VmHWM the most held so far."""
    found = re.search(rf"{field}:\s*(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


def scored(server: LocalServers) -> int:
    return metric(server, 'reward_images_total{outcome="scored"}')


def metric(server: LocalServers, name: str) -> int:
    request = urllib.request.Request(f"{server.urls[0]}/metrics", headers={"Authorization": f"Bearer {server.token}"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        lines = answer.read().decode().splitlines()
    return next((int(float(line.rsplit(" ", 1)[1])) for line in lines if line.startswith(name)), 0)


if __name__ == "__main__":
    main()
