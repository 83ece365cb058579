"""`adagrpo-replay`."""

import json
import sys
from pathlib import Path

from adagrpo_train.cli.command import quieten
from adagrpo_train.errors import AdaGRPOError, ConfigError

_HELP = """\
usage: adagrpo-replay RECORD_OR_RUN [key=value ...] [--json FILE]

What recorded iterations would have been under another configuration: which prompts would have been chosen, the level,
advantages, and the loss of every optimizer step. Needs a CPU and the record, no model. Record with

  adagrpo-train record.every=1 ...

and ask, for example,

  adagrpo-replay RUN curriculum=hardest
  adagrpo-replay RUN advantage.weight=0.5 curriculum.alpha=0.95
  adagrpo-replay RUN/record/000020 algorithm.objective.clip_range=1e-5

Without changes it checks that the record gives the advantages and losses of the run, bit for bit.

Options:
  --json FILE  write everything, for other programs
  --help       this text

Exit status: 0; 1 if without changes the record does not give what was recorded to the last bit; 2 after an error.
"""


def main(arguments: list[str] | None = None) -> int:
    """Replay. Exit status: 0, 1 if nothing was to change and something did, 2 after an error the user can mend."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if {"-h", "--help"} & set(words) or not words:
        sys.stdout.write(_HELP)
        return 0 if words else 2
    quieten()
    try:
        path, overrides, target = _understood(words)
        sound = _replay(path, overrides, target)
    except AdaGRPOError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0 if sound or overrides else 1


def _understood(words: list[str]) -> tuple[Path, list[str], Path | None]:
    """The records, the changes, and where to write JSON."""
    target = None
    if "--json" in words:
        at = words.index("--json")
        if at + 1 == len(words):
            raise ConfigError("--json: name the file")
        target = Path(words[at + 1])
        words = words[:at] + words[at + 2 :]
    options = [word for word in words if word.startswith("-")]
    if options:
        raise ConfigError(f"unknown option {options[0]}; changes are written key=value, see --help")
    paths = [word for word in words if "=" not in word or Path(word).exists()]
    if len(paths) != 1:
        raise ConfigError(f"name one run or record, not {', '.join(paths) or 'none'}; see --help")
    return Path(paths[0]).expanduser(), [word for word in words if word != paths[0]], target


def _replay(path: Path, overrides: list[str], target: Path | None) -> bool:
    """Whether the record gave what was recorded, under its own configuration."""
    # Imported here: it takes seconds, and --help does not need it.
    from rich.console import Console

    from adagrpo_train.replay.run import replay
    from adagrpo_train.replay.show import show
    from adagrpo_train.runtime.files import write_whole

    found = replay(path, overrides)
    show(found, Console(highlight=False, soft_wrap=True))
    if target:
        write_whole(target, json.dumps(found, indent=1, allow_nan=False) + "\n")
        sys.stdout.write(f"written to {target}\n")
    return found["reproduced"]["exact"]
