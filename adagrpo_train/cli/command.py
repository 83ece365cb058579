"""What every command that takes settings does: options, errors, exit status, processes."""

import logging
import os
import sys
import time
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

from adagrpo_train.errors import AdaGRPOError, ConfigError
from adagrpo_train.settings import Settings, read_settings

if TYPE_CHECKING:
    from adagrpo_train.runtime.engine import Engine

_LATER_SECONDS = 2.0
"""How much longer than the main process the others live after an error."""


def run_command(arguments: list[str] | None, usage: str, command: "Callable[[Settings, Engine], None]") -> int:
    """Read the settings and run a command on each process; see with_settings()."""
    return with_settings(arguments, usage, lambda settings: on_each_rank(settings, command))


def with_settings(arguments: list[str] | None, usage: str, act: Callable[[Settings], None]) -> int:
    """Read the settings and do something with them.

    Args:
        arguments: of the command line; None takes those of this process.
        usage: what --help prints.

    Returns:
        The exit status: 0 when done, 2 after an error the user can mend, 130 when interrupted.
    """
    overrides = list(sys.argv[1:] if arguments is None else arguments)
    if {"-h", "--help"} & set(overrides):
        sys.stdout.write(usage)
        return 0
    quieten()
    settings = None
    try:
        show = "--cfg" in overrides
        options = [o for o in overrides if o.startswith("-") and o != "--cfg"]
        if options:
            raise ConfigError(f"unknown option {options[0]}; settings are written key=value, see --help")
        settings = read_settings([o for o in overrides if o != "--cfg"])
        if show:
            from omegaconf import OmegaConf

            sys.stdout.write(OmegaConf.to_yaml(OmegaConf.create(settings.values)))
            return 0
        act(settings)
    except AdaGRPOError as error:
        rank = os.environ.get("RANK", "0")
        if rank == "0":
            sys.stderr.write(f"error: {error}\n")
        elif settings is not None and not error.on_every_rank:  # unreadable settings are so on every rank
            sys.stderr.write(f"error on rank {rank}: {error}\n")
        if rank != "0":
            # The launcher ends all processes as soon as one is gone, the one that has the report to write among them.
            time.sleep(_LATER_SECONDS)
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return 130
    return 0


def on_each_rank(settings: Settings, command: "Callable[[Settings, Engine], None]") -> None:
    """Join the other processes and run a command; if one of them fails, all end."""
    # Imported here: it takes seconds, and neither --help nor a misspelt key needs it.
    from adagrpo_train import build
    from adagrpo_train.runtime.failing import FailingTogether

    engine = build.make_engine(settings)
    with FailingTogether(rank=engine.rank, world_size=engine.world_size):
        command(settings, engine)
    engine.close()


def quieten() -> None:
    """Our own messages and warnings stay; chatter of libraries about their defaults goes."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("adagrpo_train").setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING)
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", module="torch.distributed.*")
