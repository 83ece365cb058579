"""`adagrpo-rewards COMMAND`: the commands of this package under one name."""

import pkgutil
import sys

_COMMANDS = {
    "verify": "score bundled images with the real checkpoints, and compare with recorded scores",
    "check": "does a reward keep the contract?",
    "serve": "one reward behind one port",
    "ping": "what do these servers serve, and do they score?",
}


def main(arguments: list[str] | None = None) -> int:
    """Hand the arguments to `python -m rewards.COMMAND`. Returns its status, or 2 if there is no such command."""
    command, *rest = (sys.argv[1:] if arguments is None else arguments) or [""]
    if command in _COMMANDS:
        return pkgutil.resolve_name(f"rewards.{command}:main")(rest)
    asked = command in ("-h", "--help")
    lines = [f"  {name:<8}{what}" for name, what in _COMMANDS.items()]
    text = "\n".join(["usage: adagrpo-rewards COMMAND ... (COMMAND --help says more)", *lines, ""])
    (sys.stdout if asked else sys.stderr).write(text)
    return 0 if asked else 2
