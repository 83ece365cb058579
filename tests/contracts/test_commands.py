"""Commands that README, scripts and Dockerfiles show are understood, and divide among the processes they start."""

import re
import shlex
from itertools import pairwise
from pathlib import Path

import pytest

from adagrpo_train.settings import read_settings

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "scripts/torchrun.sh", "scripts/slurm.sh", "docker/trainer.Dockerfile")
PROGRAM = re.compile(r"adagrpo-train|adagrpo-eval|adagrpo-check|-m adagrpo_train|scripts/(torchrun|slurm)\.sh")
GPUS = 8  # of a machine, where a command does not say


def _lines(page: str) -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    if page.endswith(".md"):
        text = "\n".join(re.findall(r"^```bash\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE))
    else:
        text = "\n".join(line[1:].strip() for line in text.splitlines() if line.startswith("#"))
    return [line for line in re.sub(r"\\\n\s*", "", text).splitlines() if PROGRAM.search(line) and "=" in line]


COMMANDS = [(page, line) for page in PAGES for line in _lines(page)]


def _processes(words: list[str]) -> int:
    options = dict(pairwise(words))
    if "--num_processes" in options:
        return int(options["--num_processes"])
    machines = int(options.get("--nodes", 1))
    return machines * GPUS if any(word.endswith(("torchrun.sh", "slurm.sh")) for word in words) else 1


@pytest.mark.parametrize(("page", "line"), COMMANDS, ids=[f"{page}-{n}" for n, (page, _) in enumerate(COMMANDS)])
def test_a_command_that_is_shown_composes_for_its_processes(page: str, line: str) -> None:
    words = shlex.split(line, comments=True)
    overrides = [word for word in words if re.match(r"[a-z_.]+=", word)]
    settings = read_settings([word for word in overrides if not word.startswith("resume=")])
    for key in ("candidates", "chosen"):
        assert settings.values["curriculum"].get(key, 0) % _processes(words) == 0, key


def test_the_commands_are_found() -> None:
    assert len([page for page, _ in COMMANDS if page == "README.md"]) > 12
    assert {page for page, _ in COMMANDS} >= {"README.md", "scripts/torchrun.sh", "scripts/slurm.sh"}
