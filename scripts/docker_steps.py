"""Does what a Dockerfile says in a folder that holds a root file system, where there is no Docker.

The folder stands for the base image: `debootstrap --include=python3,python3-venv bookworm ROOT` makes one. COPY takes
only what .dockerignore lets through, RUN runs in a chroot as root. `--start` starts the image as its user, with what
comes after `--` (nothing: with its CMD), `--health` runs its health check. Needs root, and Linux. It shows nothing of
base images, layers, volumes and networks between containers.

    sudo python scripts/docker_steps.py docker/reward.Dockerfile ROOT --build-arg EXTRA=shapes
    sudo python scripts/docker_steps.py docker/reward.Dockerfile ROOT --start -- shapes
"""

import argparse
import fnmatch
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
_VARIABLE = re.compile(r"\$\{(\w+)\}|\$(\w+)")


@dataclass
class Image:
    """What a Dockerfile says, its variables filled in.

    Attributes:
        base: the base image.
        steps: COPY and RUN in their order, each with the folder and the environment it happens in.
        variables, folder, user: what a container of it starts with.
        entrypoint, command, health: argument lists; empty if there are none.
    """

    base: str = ""
    steps: list["Step"] = field(default_factory=list)
    variables: dict[str, str] = field(default_factory=dict)
    folder: str = "/"
    user: str = "0:0"
    entrypoint: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)
    health: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Step:
    """One COPY or RUN."""

    kind: str
    text: str
    folder: str
    variables: Mapping[str, str]


def read(path: Path, arguments: Mapping[str, str]) -> Image:
    """The image of a Dockerfile with one FROM, in the part of the language that those of this project use.

    Args:
        arguments: of the build, in place of the defaults of ARG.

    Raises:
        ValueError: an instruction is not one of that part, or an argument is not declared.
    """
    image, declared = Image(), {}
    for line in _lines(path.read_text(encoding="utf-8")):
        kind, _, text = line.partition(" ")
        text = text.strip()
        known = declared | image.variables
        if kind == "ARG":
            name, _, default = text.partition("=")
            declared[name] = arguments.get(name, default)
        elif kind == "FROM":
            image.base = _filled(text, known)
            declared = {}  # those before FROM hold for its line only
        elif kind in ("COPY", "RUN"):
            image.steps.append(Step(kind, text, image.folder, known))
        else:
            _set(image, kind, text, known)
    if unknown := set(arguments) - set(_declared(path)):
        raise ValueError(f"{path} declares no ARG {', '.join(sorted(unknown))}")
    return image


def copied(step: Step, ignore: "Ignore") -> tuple[list[Path], str]:
    """The sources of a COPY, relative to the repository, and where they go.

    Raises:
        ValueError: a source is not there, or .dockerignore keeps it from the builder.
    """
    *sources, target = step.text.split()
    for source in sources:
        if not (REPO / source).exists():
            raise ValueError(f"COPY {source}: no such file or folder")
        if not ignore.lets_through(source):
            raise ValueError(f"COPY {source}: .dockerignore keeps it from the builder")
    return [Path(source) for source in sources], str(Path(step.folder) / target)


class Ignore:
    """The patterns of a .dockerignore, the last that fits counts."""

    def __init__(self, text: str) -> None:
        lines = [line.strip() for line in text.splitlines()]
        self._patterns = [line for line in lines if line and not line.startswith("#")]

    def lets_through(self, path: str) -> bool:
        """Whether the builder gets this file or folder, relative to the repository."""
        passed = True
        for pattern in self._patterns:
            if _covers(pattern.removeprefix("!"), path):
                passed = pattern.startswith("!")
        return passed


def main() -> int:
    arguments, container_arguments = _split(sys.argv[1:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dockerfile", type=Path)
    parser.add_argument("root", type=Path, help="root file system in place of the base image; it is changed")
    parser.add_argument("--build-arg", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--start", action="store_true", help="start the image instead of making it")
    parser.add_argument("--health", action="store_true", help="run its health check instead")
    options = parser.parse_args(arguments)
    image = read(options.dockerfile, dict(pair.split("=", 1) for pair in options.build_arg))
    if options.start:
        return _start(image, options.root, [*image.entrypoint, *(container_arguments or image.command)])
    if options.health:
        return _start(image, options.root, image.health)
    ignore = Ignore((REPO / ".dockerignore").read_text(encoding="utf-8"))
    for step in image.steps:
        print(f"--- {step.kind} {step.text}", flush=True)
        if step.kind == "COPY":
            _copy(step, ignore, options.root)
        else:
            folder = f"mkdir -p {step.folder} && cd {step.folder} && "
            _chroot(options.root, ["/bin/sh", "-c", folder + step.text], step.variables).check_returncode()
    print(f"--- {options.dockerfile.name} is made")
    return 0


def _lines(text: str) -> list[str]:
    """Instructions, their continued lines joined; comments inside them are dropped, as Docker does."""
    kept = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    return [line.strip() for line in re.sub(r"\\\n\s*", " ", kept).splitlines() if line.strip()]


def _declared(path: Path) -> list[str]:
    lines = _lines(path.read_text(encoding="utf-8"))
    return [line.split()[1].partition("=")[0] for line in lines if line.startswith("ARG ")]


def _set(image: Image, kind: str, text: str, known: Mapping[str, str]) -> None:
    """The instructions that only describe a container."""
    if kind == "ENV":
        image.variables |= {name: _filled(value, known) for name, value in re.findall(r"(\w+)=(\S*)", text)}
    elif kind == "WORKDIR":
        image.folder = str(Path(image.folder) / _filled(text, known))
    elif kind == "USER":
        image.user = text
    elif kind == "ENTRYPOINT":
        image.entrypoint = json.loads(text)
    elif kind == "CMD":
        image.command = json.loads(text)
    elif kind == "HEALTHCHECK":
        image.health = [] if text == "NONE" else json.loads(text.partition("CMD ")[2])
    elif kind != "EXPOSE":
        raise ValueError(f"{kind} {text}: not known here")


def _filled(text: str, known: Mapping[str, str]) -> str:
    present = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", **known}
    return _VARIABLE.sub(lambda match: present[match[1] or match[2]], text)


def _covers(pattern: str, path: str) -> bool:
    """Whether a pattern fits a path or a folder above it."""
    parts = Path(path).parts
    whole = ["/".join(parts[:n]) for n in range(1, len(parts) + 1)]
    if pattern.startswith("**/"):
        return any(fnmatch.fnmatchcase(part, pattern[3:]) for part in parts)
    return any(name.count("/") == pattern.count("/") and fnmatch.fnmatchcase(name, pattern) for name in whole)


def _copy(step: Step, ignore: Ignore, root: Path) -> None:
    sources, target = copied(step, ignore)
    for source in sources:
        if (REPO / source).is_dir():
            for file in sorted(path for path in (REPO / source).rglob("*") if path.is_file()):
                relative = file.relative_to(REPO)
                if ignore.lets_through(relative.as_posix()):
                    _place(file, root, f"{target}/{relative.relative_to(source)}")
        else:
            _place(REPO / source, root, f"{target}/{source.name}" if step.text.endswith("/") else target)


def _place(file: Path, root: Path, target: str) -> None:
    place = root / target.lstrip("/")
    place.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(file, place)


def _start(image: Image, root: Path, arguments: list[str]) -> int:
    home = f"/home/{_name(root, image.user)}"
    script = f'cd {image.folder} && exec "$@"'
    command = ["/bin/sh", "-c", script, "sh", *arguments]
    return _chroot(root, command, image.variables | {"HOME": home}, user=image.user).returncode


def _name(root: Path, user: str) -> str:
    accounts = [line.split(":") for line in (root / "etc/passwd").read_text().splitlines()]
    return next(account[0] for account in accounts if account[2] == user.partition(":")[0])


def _chroot(
    root: Path, arguments: list[str], variables: Mapping[str, str], *, user: str = "0:0"
) -> "subprocess.CompletedProcess[bytes]":
    """Run in the root, with nothing of this machine's environment but how pip reaches its packages."""
    passed = {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
    environment = {"PATH": _filled("$PATH", {}), **passed, **variables}
    return subprocess.run(["chroot", f"--userspec={user}", str(root), *arguments], env=environment, check=False)


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    at = arguments.index("--") if "--" in arguments else len(arguments)
    return arguments[:at], arguments[at + 1 :]


if __name__ == "__main__":
    sys.exit(main())
