"""`adagrpo-check`."""

import argparse
import os
import sys
from typing import TYPE_CHECKING

from adagrpo_train.cli.command import on_each_rank, with_settings
from adagrpo_train.errors import ConfigError
from adagrpo_train.settings import Settings

if TYPE_CHECKING:
    from adagrpo_train.runtime.engine import Engine

_HELP = """\
usage: adagrpo-check [key=value ...]
       accelerate launch --config_file configs/accelerate/ENGINE.yaml --num_processes N \
           -m adagrpo_train.cli.check engine=ENGINE [key=value ...]
       adagrpo-check --plan-only [--processes N] [--tflops X] [key=value ...]

Check a run before it is started: give it the settings of adagrpo-train. The model is loaded, images of a few prompts
are drawn and scored, pieces of an iteration are timed; then the plan is printed: counts, files, memory, time. Nothing
is trained or left behind. Servers of rewards elsewhere are waited for at most 30 seconds.

Options:
  --plan-only      the plan from shapes alone: no weights, no rewards, no GPU
  --processes N    with --plan-only: of the run (1)
  --tflops X       with --plan-only: what each process computes, in 10^12 operations a second, to estimate times by
  --cfg            print the composed configuration and stop
  --help           this text

Exit status: 0 when every check was passed, 2 when one failed.
"""


def main(arguments: list[str] | None = None) -> int:
    """Check a run. Returns 0 when every check was passed, else 2."""
    parser = argparse.ArgumentParser(prog="adagrpo-check", usage=_HELP, add_help=False, allow_abbrev=False)
    parser.add_argument("--plan-only", action="store_true")
    parser.add_argument("--processes", type=int)
    parser.add_argument("--tflops", type=float)
    options, others = parser.parse_known_args(sys.argv[1:] if arguments is None else arguments)
    if options.plan_only:
        return with_settings(others, _HELP, lambda settings: _plan(settings, options))
    for name in ("processes", "tflops"):
        if getattr(options, name) is not None:
            sys.stderr.write(f"error: --{name} belongs to --plan-only; see --help\n")
            return 2
    return with_settings(others, _HELP, lambda settings: on_each_rank(settings, _check))


def _check(settings: Settings, engine: "Engine") -> None:
    from adagrpo_train.preflight.run import Preflight

    Preflight(settings, engine, sys.stdout.write)()


def _plan(settings: Settings, options: argparse.Namespace) -> None:
    from adagrpo_train.preflight.run import plan_only

    processes = int(os.environ.get("WORLD_SIZE", "1")) if options.processes is None else options.processes
    if processes < 1:
        raise ConfigError(f"--processes {processes}: must be >= 1")
    if options.tflops is not None and not options.tflops > 0:
        raise ConfigError(f"--tflops {options.tflops}: must be > 0")
    if os.environ.get("RANK", "0") == "0":
        plan_only(settings, sys.stdout.write, processes=processes, tflops=options.tflops)


if __name__ == "__main__":
    sys.exit(main())
