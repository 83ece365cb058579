"""The wheel, alone in a folder, holds everything a run needs."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.slow


def files_below(folder: Path) -> set[str]:
    """The paths of all files below `folder`, relative to it, without what Python and editors leave behind."""
    return {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and not path.name.startswith(".")
    }


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that a freshly built wheel was unpacked to."""
    built, unpacked = tmp_path_factory.mktemp("built"), tmp_path_factory.mktemp("unpacked")
    run([sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(built)], cwd=REPO)
    (archive,) = built.glob("*.whl")
    zipfile.ZipFile(archive).extractall(unpacked)
    return unpacked


def run(command: list[str], *, cwd: Path, **environment: str) -> str:
    """What `command` printed; a failure shows all of it."""
    done = subprocess.run(
        command,
        cwd=cwd,
        env=os.environ | environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}"
    return done.stdout


def test_the_wheel_holds_every_file_of_the_packages_and_the_configs(wheel: Path) -> None:
    expected = files_below(REPO / "adagrpo_train") | {f"configs/{name}" for name in files_below(REPO / "configs")}
    assert files_below(wheel / "adagrpo_train") == expected
    assert files_below(wheel / "rewards") == files_below(REPO / "rewards")


def test_a_run_from_another_folder_uses_only_the_wheel(wheel: Path, tmp_path: Path) -> None:
    program = (
        "import adagrpo_train.settings as settings, rewards; print(settings.config_dir(), rewards.__file__, sep='\\n')"
    )
    environment = {"PYTHONPATH": str(wheel), "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", "OMP_NUM_THREADS": "1"}
    configs, rewards_file = run([sys.executable, "-c", program], cwd=tmp_path, **environment).splitlines()[-2:]
    assert Path(configs) == wheel / "adagrpo_train" / "configs"
    assert Path(rewards_file).parent == wheel / "rewards"

    run([sys.executable, "-m", "adagrpo_train", "debug=smoke"], cwd=tmp_path, **environment)
    assert list(tmp_path.iterdir()), "the run left nothing in the folder it was started from"
