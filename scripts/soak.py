"""Training traffic through servers that keep failing, for as long as asked: every score exact, nothing leaks.

Two supervised servers of a toy reward sit behind a layer that spoils 30 % of the answers in ten ways; every few
seconds one is killed, stopped for a while or left alone. The client submits batches of 48 images all the time and
compares every score with the one that the same reward gives in this process. Prints a line a minute and a table at the
end; the exit status is 1 if a score was wrong, if memory grew, or if files or processes were left open.

    python scripts/soak.py --minutes 60
"""

import argparse
import json
import logging
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rewards.client.batch import RewardBatch, RewardUnavailableError
from rewards.client.inproc import InprocClient
from rewards.client.remote import RemoteClient, RemoteSettings
from rewards.client.supervisor import LocalServers
from rewards.contract import Sample
from rewards.jpeg_size import JpegSize

ROOT = Path(__file__).parents[1]
IMAGES, SIDE = 48, 64
MOST_GROWTH = 20e6  # bytes of resident memory, from the end of the first fifth to the end


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        return soak(60 * options.minutes, random.Random(options.seed), Path(folder))


def soak(seconds: float, rng: random.Random, folder: Path) -> int:
    """Run and report; returns the exit status."""
    truth = InprocClient(JpegSize(), device="cpu")
    servers = LocalServers(
        "jpeg_size",
        settings={},
        devices=["cpu"] * 2,
        log_folder=folder,
        python=spoiling_interpreter(folder),
        steady_seconds=3,  # killed by us, they are no worse for it
        environment={
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "REWARD_FAULT": json.dumps({"kind": "any", "share": 0.3, "times": 10**12}),
        },
    )
    settings = RemoteSettings(deadline_seconds=60, attempt_seconds=3, cool_seconds=0.3, hedge_seconds=1.0)
    counts: Counter[str] = Counter()
    latencies: list[float] = []
    logging.getLogger("rewards").setLevel(logging.ERROR)
    with servers:
        servers.wait_ready(60)
        client = RemoteClient(servers.urls, token=servers.token, settings=settings)
        client.wait_ready(30)
        started, next_act, next_line = time.monotonic(), 2.0, 60.0
        first: tuple[int, int] | None = None
        stopped: list[tuple[float, int]] = []
        while (now := time.monotonic() - started) < seconds:
            if first is None and now > seconds / 5:
                first = resident_bytes(), open_files()
            if now > next_act:
                next_act = now + rng.uniform(2, 8)
                counts[disturb(servers, rng, stopped, now)] += 1
            wake(stopped, now)
            batch = one_batch(client, truth, rng, counts)
            if batch is not None:
                latencies.append(batch.stats.get("latency_p95", 0.0))
            if now > next_line:
                next_line += 60
                print(f"{now:6.0f} s  {dict(counts)}  {resident_bytes() / 1e6:.0f} MB", flush=True)
        last = resident_bytes(), open_files()
        wake(stopped, float("inf"))
        client.close()
        processes = servers.processes
    truth.close()
    left = sum(Path(f"/proc/{pid}").exists() for pid in processes)
    return report(counts, latencies, first or last, last, left)


def spoiling_interpreter(folder: Path) -> Path:
    """Stands for Python in `python -m rewards.serve ...`, and starts the same server with the faults of the tests."""
    script = folder / "python"
    script.write_text(f'#!/bin/sh\nshift 2\nexec {sys.executable} -m tests.serving.faults "$@"\n')
    script.chmod(0o700)
    return script


def disturb(servers: LocalServers, rng: random.Random, stopped: list[tuple[float, int]], now: float) -> str:
    """Do something to a server; what was done."""
    running = servers.processes
    if not running:
        return "left alone"
    pid = rng.choice(running)
    match rng.randrange(3):
        case 0:
            os.kill(pid, signal.SIGKILL)
            return "killed"
        case 1 if not stopped:
            os.kill(pid, signal.SIGSTOP)
            stopped.append((now + rng.uniform(1, 5), pid))
            return "stopped"
    return "left alone"


def wake(stopped: list[tuple[float, int]], now: float) -> None:
    """Let stopped servers go on when their time has come."""
    for entry in [entry for entry in stopped if entry[0] <= now]:
        stopped.remove(entry)
        try:
            os.kill(entry[1], signal.SIGCONT)
        except ProcessLookupError:
            continue


def one_batch(
    client: RemoteClient, truth: InprocClient, rng: random.Random, counts: Counter[str]
) -> RewardBatch | None:
    """Score random images by both, compare, and count."""
    pixels = np.random.default_rng(rng.getrandbits(32))
    samples = [
        Sample(str(n), "a prompt", pixels.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)) for n in range(IMAGES)
    ]
    expected = truth.submit(samples)
    try:
        batch = client.submit(samples).result()
    except RewardUnavailableError:
        counts["unavailable"] += 1
        client.wait_ready(60)
        return None
    found, right = batch.scores["jpeg_size"], expected.result().scores["jpeg_size"]
    missing = np.isnan(found)
    counts["batches"] += 1
    counts["images"] += len(samples)
    counts["missing"] += int(missing.sum())
    counts["wrong"] += int((found != right)[~missing].sum())
    counts["unexplained"] += sum(
        (reason is None) == bool(gap) for reason, gap in zip(batch.reasons, missing, strict=True)
    )
    for name in ("requests", "retries", "hedges", "ejections"):
        counts[name] += int(batch.stats[name])
    return batch


def report(
    counts: Counter[str], latencies: Sequence[float], first: tuple[int, int], last: tuple[int, int], left: int
) -> int:
    """Print the table; returns the exit status."""
    growth, files = last[0] - first[0], last[1] - first[1]
    rows = {name: str(count) for name, count in sorted(counts.items())} | {
        "latency p95, median over batches": f"{statistics.median(latencies):.2f} s" if latencies else "-",
        "memory of this process": f"{first[0] / 1e6:.1f} -> {last[0] / 1e6:.1f} MB",
        "open files of this process": f"{first[1]} -> {last[1]}",
        "processes left": str(left),
    }
    for name, text in rows.items():
        print(f"{name:<34}{text:>24}")
    faults = [
        text
        for text, wrong in {
            "a score was wrong": counts["wrong"] > 0,
            "a score was missing without a reason, or had one": counts["unexplained"] > 0,
            "nothing was scored": counts["batches"] == 0,
            "memory grew": growth > MOST_GROWTH,
            "files were left open": files > 8,  # connections come and go
            "processes were left": left > 0,
        }.items()
        if wrong
    ]
    print(f"FAILED: {', '.join(faults)}" if faults else "passed")
    return 1 if faults else 0


def resident_bytes() -> int:
    """Memory that this process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


if __name__ == "__main__":
    sys.exit(main())
