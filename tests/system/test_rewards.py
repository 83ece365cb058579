"""Runs with several rewards, in process and behind servers of their own, disturbed and undisturbed."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from adagrpo_train.runtime import checkpoint
from tests.runs import (
    ROOT,
    Strike,
    begin,
    end_servers,
    environment,
    rows,
    run,
    servers_of,
    succeed,
    wait_for,
    weights,
)

pytestmark = pytest.mark.slow

BOTH = ["reward=[shapes,jpeg_size]", "reward.jpeg_size.mode=local"]
MOODY = '''
import os
from rewards.contract import LostError, UnavailableError
from rewards.jpeg_size import JpegSize

class Moody(JpegSize):
    """Scores like jpeg_size, but on rank 1 some calls fail, as MOODY says: first, last, error."""

    _calls = 0

    def score(self, batch):
        self._calls += 1
        first, last, error = os.environ.get("MOODY", "0 0 away").split()
        if os.environ.get("RANK") == "1" and int(first) <= self._calls <= int(last):
            raise {"away": UnavailableError, "lost": LostError}[error]("moody today")
        return super().score(batch)
'''
CUSTOM = ["reward=[shapes,custom]", "reward.custom.reward=moody", "reward.custom.weights.jpeg_size=0.1"]
CUSTOM += ["iterations=3", "checkpoint.every=0"]


@pytest.fixture(scope="module")
def moody(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Variables of a process that has a package installed which announces the reward `moody`."""
    folder = tmp_path_factory.mktemp("plugin")
    metadata = folder / "moody-1.0.dist-info"
    metadata.mkdir(parents=True)
    (folder / "moody_reward.py").write_text(MOODY)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: moody\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[adagrpo.rewards]\nmoody = moody_reward:Moody\n")
    return {"PYTHONPATH": f"{ROOT}{os.pathsep}{folder}"}


@pytest.fixture(scope="module")
def calm(moody: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two processes whose reward `moody` always answered."""
    run_dir = tmp_path_factory.mktemp("calm") / "run"
    succeed(*CUSTOM, f"hydra.run.dir={run_dir}", processes=2, variables=moody)
    return run_dir


def same_weights(first: Path, second: Path) -> bool:
    pairs = [(tensors[key], weights(second)[name][key]) for name, tensors in weights(first).items() for key in tensors]
    return all(torch.equal(a, b) for a, b in pairs)


def without_traffic(run_dir: Path) -> list[dict[str, object]]:
    traffic = ("/requests", "/retries", "/hedges", "/ejections")
    return [{k: v for k, v in row.items() if not k.endswith(traffic)} for row in rows(run_dir)]


def elsewhere() -> list[str]:
    """Settings that put tiny_clip on a server of another environment, with the library that this one lacks."""
    python = ROOT / ".venvs/open-clip/bin/python"
    if not python.exists():
        pytest.skip("no environment for it: bash scripts/make_reward_env.sh open-clip")
    return [
        "reward=[shapes,tiny_clip]",
        "reward.tiny_clip.mode=local",
        f"reward.tiny_clip.python={python}",
        "reward.tiny_clip.settings.library=open_clip",
    ]


@pytest.mark.parametrize("reward", ["jpeg_size", "tiny_clip"])
def test_a_server_killed_in_the_middle_changes_nothing_and_none_is_left_behind(reward: str, tmp_path: Path) -> None:
    settings = [*(BOTH if reward == "jpeg_size" else elsewhere()), "iterations=3"]
    succeed(*settings, f"hydra.run.dir={tmp_path / 'calm'}")
    mark = {"TEST_OF_SERVERS": str(tmp_path)}
    in_the_second = Strike("_roll_out", 2, end_servers)
    succeed(*settings, f"hydra.run.dir={tmp_path / 'hit'}", variables=mark, strike=in_the_second)
    assert any(row.get(f"reward/{reward}/retries") for row in rows(tmp_path / "hit"))
    assert same_weights(tmp_path / "calm", tmp_path / "hit")
    assert without_traffic(tmp_path / "calm") == without_traffic(tmp_path / "hit")
    assert not servers_of(str(tmp_path))


def test_a_killed_run_leaves_no_server_behind(tmp_path: Path) -> None:
    mark = {"TEST_OF_SERVERS": str(tmp_path)}
    forks = begin(*BOTH, "iterations=500", f"hydra.run.dir={tmp_path / 'run'}", variables=mark)
    try:
        wait_for(lambda: bool(servers_of(str(tmp_path))))
    finally:
        forks.kill()
    wait_for(lambda: not servers_of(str(tmp_path)))


def test_a_reward_trains_alike_in_process_and_behind_servers_of_the_run_and_elsewhere(tmp_path: Path) -> None:
    succeed("reward=[shapes,jpeg_size]", f"hydra.run.dir={tmp_path / 'inproc'}")
    succeed(*BOTH, f"hydra.run.dir={tmp_path / 'local'}")
    token = tmp_path / "token"
    token.touch(mode=0o600)
    token.write_text(f"{'a1' * 32}\n{'b2' * 32}\n")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    serve = [sys.executable, "-m", "rewards.serve", "jpeg_size", "--port", str(port), "--token-file", str(token)]
    server = subprocess.Popen(serve, env=environment(), cwd=ROOT)
    try:
        where = [f"reward.jpeg_size.urls=[http://127.0.0.1:{port}]", f"reward.jpeg_size.token_file={token}"]
        remote = ["reward=[shapes,jpeg_size]", "reward.jpeg_size.mode=remote", *where]
        succeed(*remote, f"hydra.run.dir={tmp_path / 'remote'}")
    finally:
        server.terminate()
        server.wait(timeout=60)
    assert same_weights(tmp_path / "inproc", tmp_path / "local")
    assert same_weights(tmp_path / "inproc", tmp_path / "remote")


def test_both_ranks_wait_for_a_reward_that_one_of_them_misses(
    calm: Path, tmp_path: Path, moody: dict[str, str]
) -> None:
    settings = [*CUSTOM, "reward.custom.on_unavailable=wait"]
    hit = moody | {"MOODY": "4 5 away"}
    output = succeed(*settings, f"hydra.run.dir={tmp_path / 'hit'}", processes=2, variables=hit)
    assert "reward custom: reward jpeg_size: moody today; waiting for it" in output
    assert same_weights(calm, tmp_path / "hit")


@pytest.mark.parametrize("error", ["away", "lost"])
def test_both_ranks_stop_with_a_checkpoint_when_one_of_them_loses_a_reward(
    error: str, calm: Path, tmp_path: Path, moody: dict[str, str]
) -> None:
    """What is saved is the state before the iteration: the resumed run equals an undisturbed one."""
    hit = moody | {"MOODY": f"5 5 {error}"}
    done = run(*CUSTOM, f"hydra.run.dir={tmp_path / 'hit'}", processes=2, variables=hit)
    assert done.returncode != 0
    assert done.stderr.count("error: reward custom: ") == done.stderr.count("moody today") == 1, done.stderr
    assert checkpoint.find(tmp_path / "hit").name != "iteration_000000"
    succeed(*CUSTOM, f"resume={tmp_path / 'hit'}", processes=2, variables=moody)
    assert same_weights(calm, tmp_path / "hit")


def test_a_server_that_cannot_start_is_told_with_its_own_words(tmp_path: Path) -> None:
    missing = tmp_path / "none"
    done = run("reward=jpeg_size", "reward.jpeg_size.mode=local", f"reward.jpeg_size.python={missing}")
    assert done.returncode == 2
    assert str(missing) in done.stderr
