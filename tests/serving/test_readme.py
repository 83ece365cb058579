"""The page on writing one's own reward: its example, typed in as written, works."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_example_of_the_page_keeps_the_contract(tmp_path: Path) -> None:
    page = (ROOT / "rewards" / "README.md").read_text(encoding="utf-8")
    files = dict(re.findall(r"`([a-z.]+)`\n\n```[a-z]+\n(.*?)```", page, flags=re.DOTALL))
    assert files.keys() == {"redness.py", "pyproject.toml"}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--target", "site", "."],
        cwd=tmp_path, check=True,
    )  # fmt: skip
    (command,) = re.findall(r"^python -m (rewards.check redness) --settings '(.*)'$", page, flags=re.MULTILINE)
    path = f"{ROOT}{os.pathsep}{tmp_path / 'site'}"
    done = subprocess.run(
        [sys.executable, "-m", *command[0].split(), "--settings", command[1]],
        env=os.environ | {"PYTHONPATH": path}, cwd=tmp_path / "site", capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "FAILED" not in done.stdout
    assert done.stdout.count("ok ") == 9
