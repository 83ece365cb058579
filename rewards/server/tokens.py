"""Who may ask: whoever shows a token of this server."""

import hmac
import logging
from pathlib import Path

_SHORTEST = 32  # characters
_log = logging.getLogger(__name__)


class Tokens:
    """One or several tokens, each on a line of its own.

    Args:
        text: the lines.

    Raises:
        ValueError: there is none, or one is too short to be safe.
    """

    def __init__(self, text: str) -> None:
        self._tokens = _parsed(text)

    def accept(self, shown: str) -> bool:
        """Whether it is one of the tokens; takes as long for a near miss as for any other."""
        return any([hmac.compare_digest(shown.encode(), token) for token in self._tokens])


class TokenFile(Tokens):
    """Tokens of a file that is read again when it changes, so that they can be replaced while servers run.

    To replace one: add the new token on a second line, give it to the clients, then remove the old line.

    Args:
        path: a file that only its owner can read.

    Raises:
        ValueError: others can read the file, or it holds no proper token.
        OSError: it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stamp = _stamp(path)
        super().__init__(_private_text(path))

    def accept(self, shown: str) -> bool:
        try:
            stamp = _stamp(self._path)
            if stamp != self._stamp:
                self._tokens = _parsed(_private_text(self._path))
                self._stamp = stamp
        except (OSError, ValueError) as error:
            _log.error("the tokens stay as they were: %s", error)
        return super().accept(shown)


def _parsed(text: str) -> list[bytes]:
    tokens = [line.strip() for line in text.splitlines() if line.strip()]
    shortest = min((len(token) for token in tokens), default=0)
    if shortest < _SHORTEST:
        raise ValueError(f"the token has {shortest} characters, at least {_SHORTEST} are needed")
    return [token.encode() for token in tokens]


def _stamp(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_mtime_ns, status.st_ino, status.st_size


def _private_text(path: Path) -> str:
    if path.stat().st_mode & 0o077:
        raise ValueError(f"--token-file {path}: others can read it; chmod 600 {path}")
    return path.read_text(encoding="utf-8")
