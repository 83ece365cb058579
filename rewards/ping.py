"""`python -m rewards.ping URL...`: what do these servers serve, and do they score?"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np

from rewards.client.batch import RewardRefusedError, RewardUnavailableError
from rewards.client.remote import RemoteClient, RemoteSettings
from rewards.contract import Sample

_SIDE = 224  # pixels


def main(arguments: list[str] | None = None) -> int:
    """Print what was found. Returns 1 if a server does not score, 2 after a mistake in the arguments."""
    options = _parse(arguments)
    try:
        token = options.token_file.read_text(encoding="utf-8").split()[0] if options.token_file else None
        settings = RemoteSettings(deadline_seconds=options.seconds)
        clients = [RemoteClient([url], token=token, settings=settings) for url in options.urls]
    except (OSError, ValueError, IndexError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    prints = set()
    try:
        for url, client in zip(options.urls, clients, strict=True):
            client.wait_ready(options.seconds)
            prints.add(client.fingerprint)
            sys.stdout.write(_report(url, client))
    except (RewardUnavailableError, RewardRefusedError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    finally:
        for client in clients:
            client.close()
    if len(prints) > 1:
        sys.stderr.write("error: the fingerprints differ: these servers cannot score the images of one run\n")
    return int(len(prints) > 1)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m rewards.ping", description=__doc__)
    parser.add_argument("urls", metavar="URL", nargs="+", help="http://host:port")
    parser.add_argument("--token-file", type=Path, help="file with the token of the servers")
    parser.add_argument("--seconds", type=float, default=30.0, help="longest wait")
    return parser.parse_args(arguments)


def _report(url: str, client: RemoteClient) -> str:
    info = client.info
    slope = np.linspace(0, 255, _SIDE, dtype=np.uint8)
    picture = np.stack(np.broadcast_arrays(slope[:, None], slope[None, :], np.uint8(127)), axis=-1)
    started = time.monotonic()
    batch = client.submit([Sample("ping", info.example_prompts[0], picture)]).result()
    seconds = time.monotonic() - started
    scores = ", ".join(f"{name} {values[0]:.6g}" for name, values in batch.scores.items())
    return (
        f"{url}\n"
        f"  reward       {info.name} ({', '.join(info.metrics)}), range {info.value_range or 'unbounded'}\n"
        f"  source       {info.source or '-'}; licence: {info.licence or '-'}\n"
        f"  fingerprint  {batch.fingerprint}\n"
        f"  a picture    {batch.reasons[0] or scores}, in {seconds * 1000:.0f} ms\n"
    )


if __name__ == "__main__":
    sys.exit(main())
