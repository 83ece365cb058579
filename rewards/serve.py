"""`python -m rewards.serve NAME`: one reward behind one port."""

import argparse
import dataclasses
import fcntl
import ipaddress
import json
import logging
import os
import signal
import socket
import stat
import sys
import threading
import time
from pathlib import Path

from rewards import registry
from rewards.server.limits import Limits
from rewards.server.tokens import TokenFile, Tokens

_GRACE_SECONDS = 30  # for what was begun before SIGTERM
_IDLE_SECONDS = 75  # of a connection: clients end idle ones earlier, so that none asks on one that is just being ended
_REMEDY = "make its environment by scripts/make_reward_env.sh, or pip install 'adagrpo-train[serve]' there"
_LAST_SECONDS = 5.0  # from the end of stdin to the end of the process, whatever the reward is doing


def main(arguments: list[str] | None = None) -> int:
    """Serve until SIGTERM or Ctrl-C. Returns 2 after a mistake in the arguments."""
    options = _parse(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    try:
        tokens = _tokens(options)
        if options.exit_with_stdin:
            _end_with_stdin()
        if tokens is None and not _loopback(options.host):
            raise ValueError(
                f"--host {options.host} can be reached from other machines: give --token-file (or --token-stdin)"
            )
        reward = registry.make(options.name, options.settings)
        if options.print_info:
            sys.stdout.write(json.dumps(dataclasses.asdict(reward.info), indent=2) + "\n")
            return 0
        limits = Limits(**options.limits)
        # Imported here: --help and a misspelt name need none of it.
        import uvicorn

        from rewards.server.app import RewardApp
        from rewards.server.protocol import impatient

        app = RewardApp(reward, device=options.device, tokens=tokens, limits=limits)
        listener = _bound_socket(options.host, options.port, shared=options.reuse_port)
    except ImportError as error:
        sys.stderr.write(f"error: {sys.executable} lacks what a server needs: {error}; {_REMEDY}\n")
        return 2
    except (ValueError, TypeError, LookupError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    config = uvicorn.Config(
        app.asgi(),
        http=impatient(limits.read_seconds, limits.connections),
        log_level="warning",
        timeout_keep_alive=_IDLE_SECONDS,
        timeout_graceful_shutdown=_GRACE_SECONDS,
        server_header=False,
        proxy_headers=False,
        lifespan="on",
        ws="none",
    )
    uvicorn.Server(config).run(sockets=[listener])
    return 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m rewards.serve", description=__doc__)
    parser.add_argument("name", metavar="NAME", help=f"one of {', '.join(registry.names())}")
    parser.add_argument("--host", default="127.0.0.1", help="another than the loopback needs a token")
    parser.add_argument("--port", type=_port, default=9001)
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument(
        "--settings", type=registry.json_object, default={}, metavar="JSON", help="of the reward, as a JSON object"
    )
    parser.add_argument(
        "--limits", type=registry.json_object, default={}, metavar="JSON", help="other limits than the default ones"
    )
    parser.add_argument("--print-info", action="store_true", help="say what the reward is, and end")
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--token-file",
        type=Path,
        help="file (mode 0600) with the token that clients must show; read again when it changes; several lines are "
        "several tokens",
    )
    source.add_argument("--token-stdin", action="store_true", help="read the token from the first line of stdin")
    supervised = parser.add_argument_group("for a parent process that starts servers")
    supervised.add_argument(
        "--exit-with-stdin", action="store_true", help="end when stdin is closed; write nothing more to it"
    )
    supervised.add_argument("--reuse-port", action="store_true", help="share a port that the parent keeps reserved")
    return parser.parse_args(arguments)


def _tokens(options: argparse.Namespace) -> Tokens | None:
    """The token is never an argument: those can be read by every user of the machine."""
    if options.token_stdin:
        return Tokens(sys.stdin.readline())
    return TokenFile(options.token_file) if options.token_file is not None else None


def _port(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) < 65536:
        raise argparse.ArgumentTypeError(f"{text}: must be 1 to 65535")
    return int(text)


def _bound_socket(host: str, port: int, *, shared: bool) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise OSError(f"--host {host}: {error.strerror}") from error
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if shared:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise OSError(f"cannot listen on {host}:{port}: {error.strerror}") from error
    return listener


def _end_with_stdin() -> None:
    """No server outlives the run that started it: a pipe closes however its other end dies, SIGKILL included.

    On Linux the kernel then sends SIGKILL by itself, which also ends a server that is stopped, or whose interpreter is
    stuck in one call of C. (PR_SET_PDEATHSIG would do it when the thread ends that started the server, which need not
    be the end of the run.) It does so as well if anything more is written to the pipe. Elsewhere a thread sees to it.
    """
    threading.Thread(target=_watch_stdin, name="stdin", daemon=True).start()
    if hasattr(fcntl, "F_SETSIG") and stat.S_ISFIFO(os.fstat(0).st_mode):
        fcntl.fcntl(0, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(0, fcntl.F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(0, fcntl.F_SETFL, fcntl.fcntl(0, fcntl.F_GETFL) | os.O_ASYNC)


def _watch_stdin() -> None:
    while sys.stdin.read(4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_LAST_SECONDS)
    os._exit(0)


def _loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


if __name__ == "__main__":
    sys.exit(main())
