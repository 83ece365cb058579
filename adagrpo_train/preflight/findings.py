"""The outcomes of checks, told one by one."""

from collections.abc import Callable, Sequence

from adagrpo_train.errors import AdaGRPOError, PreflightError
from adagrpo_train.runtime.engine import Engine


class Note(str):
    """What a check says that is no fault, but should be known."""


class Findings:
    """Runs checks in their order and writes a line about each; a failed one does not keep the others from running.

    Args:
        engine: every rank runs the same checks, and one that fails on a rank has failed on all; None in a process that
            belongs to no run.
        write: takes text; of the main rank it is called alone.
    """

    def __init__(self, engine: Engine | None, write: Callable[[str], object]) -> None:
        self._engine, self._write = engine, write
        self._failures: dict[str, str] = {}
        self._skipped: set[str] = set()
        self._count = 0

    def check(self, name: str, function: Callable[[], str], *, needs: Sequence[str] = ()) -> bool:
        """Run a check; whether it was passed.

        Args:
            function: returns what was found, a `Note` where that is no plain success, or raises an AdaGRPOError whose
                message names what is wrong and the remedy.
            needs: checks that this one builds on; if one of them was not passed, it is left out.
        """
        missing = [other for other in needs if other in self._failures or other in self._skipped]
        if missing:
            self._skipped.add(name)
            self._say("left out", name, f"needs {', '.join(missing)}")
            return False
        self._count += 1
        try:
            text = function() if self._engine is None else self._engine.together(function)
        except AdaGRPOError as error:
            said = str(error)
            if said not in self._failures.values():  # one mistake may stop several checks
                self._say("FAILED", name, said)
            self._failures[name] = said
            return False
        self._say("note" if isinstance(text, Note) else "ok", name, text)
        return True

    @property
    def failed(self) -> bool:
        return bool(self._failures)

    def conclude(self) -> None:
        """Say how it went.

        Raises:
            PreflightError: on every rank, if a check failed.
        """
        if self._failures:
            error = PreflightError(f"{len(self._failures)} of {self._count} checks failed: {', '.join(self._failures)}")
            error.on_every_rank = True
            raise error
        self._say("ok", "all", f"{self._count} checks")

    def _say(self, status: str, name: str, text: str) -> None:
        if self._engine is None or self._engine.is_main:
            self._write(f"{status:<9}{name:<16}" + text.replace("\n", f"\n{'':<25}") + "\n")
