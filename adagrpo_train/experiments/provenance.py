"""Where and from what the runs of a study were made."""

from datetime import date
from typing import Any

from adagrpo_train.runtime.environment import environment

_VERSIONS = ("python", "adagrpo-train", "torch", "diffusers", "transformers", "peft")


def provenance() -> dict[str, Any]:
    """Commit, date, machine and versions, in words."""
    known = environment()
    machine = f"{known['cores']} cores of {known['processor']}, {known['memory']}"
    if known["gpus"] != "none":
        machine += f", {known['gpus']}"
    return {
        "commit": known["commit"],
        "date": date.today().isoformat(),
        "machine": machine,
        "versions": {name: known[name] for name in _VERSIONS},
    }
