"""Where and from what the runs of a study were made."""

import os
import platform
import subprocess
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

_PACKAGES = ("adagrpo-train", "torch", "diffusers", "transformers", "peft")


def provenance() -> dict[str, Any]:
    """Commit (with "+changes" if files differ from it; "unknown" outside a checkout), date, machine and versions."""
    return {
        "commit": _commit(Path(__file__).parent),
        "date": date.today().isoformat(),
        "machine": f"{os.cpu_count()} cores of {_processor()}",
        "versions": {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}},
    }


def _commit(folder: Path) -> str:
    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short=9", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
