"""What a run was made with."""

import platform
from importlib.metadata import PackageNotFoundError, version

from adagrpo_train import __version__

_PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft")


def environment() -> dict[str, str]:
    """System, Python, and versions of what decides about numbers: a run may be looked at elsewhere, later."""
    packages = {"adagrpo-train": __version__} | {name: _version(name) for name in _PACKAGES}
    return {"system": f"{platform.system()} {platform.machine()}", "python": platform.python_version()} | packages


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
