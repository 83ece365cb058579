"""What a run was made with and on: versions, commit and hardware. A report may be drawn elsewhere, later."""

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from adagrpo_train import __version__

_PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft")
_CHECKOUT = Path(__file__).parents[2]
_UNKNOWN = "unknown"


def environment() -> dict[str, str]:
    """Names and values for people; a value that cannot be found is "unknown"."""
    packages = {"adagrpo-train": __version__} | {name: _version(name) for name in _PACKAGES}
    here = {"date": datetime.now(UTC).date().isoformat(), "commit": _commit(), "python": platform.python_version()}
    return _hardware() | here | packages


def _hardware() -> dict[str, str]:
    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return {
        "system": platform.platform(aliased=True),
        "processor": f"{_processor()} ({platform.machine()})",
        "cores": str(_cores()),
        "memory": _memory(),
        "gpus": ", ".join(f"{gpus.count(name)} x {name}" for name in dict.fromkeys(gpus)) or "none",
        "processes": os.environ.get("WORLD_SIZE", "1"),
    }


def _processor() -> str:
    information = Path("/proc/cpuinfo")  # platform.processor() is empty on most Linux systems
    lines = information.read_text(encoding="utf-8").splitlines() if information.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or _UNKNOWN


def _cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory() -> str:
    names = ("SC_PAGE_SIZE", "SC_PHYS_PAGES")
    if not set(names) <= os.sysconf_names.keys():
        return _UNKNOWN
    page, pages = (os.sysconf(name) for name in names)
    return f"{page * pages / 2**30:.1f} GiB"


def _commit() -> str:
    """Of the checkout that the package lies in, with a note where files differ from it; an installed one has none."""
    if not (_CHECKOUT / ".git").exists():
        return _UNKNOWN
    try:
        head = _git("rev-parse", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", "adagrpo_train", "rewards", "configs")
    except (OSError, subprocess.SubprocessError):  # no git, or a checkout that is not the user's own
        return _UNKNOWN
    return f"{head} with changes" if changed else head


def _git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(_CHECKOUT), *arguments], capture_output=True, text=True, check=True, timeout=30
    )
    return done.stdout.strip()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
