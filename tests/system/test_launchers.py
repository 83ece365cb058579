"""Launchers from outside: accelerate with our files, torchrun on two machines, SLURM by stand-ins."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from adagrpo_train.runtime import checkpoint

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
RUN = ["debug=smoke", "iterations=1", "group_size=2", "model.num_steps=2", "evaluation.images=2"]


def environment(**variables: str) -> dict[str, str]:
    """Without what another launcher may have left."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "FSDP_", "SLURM_", "TORCHELASTIC"))}
    return kept | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)} | variables


def test_accelerate_launches_what_its_file_names(tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "configs/accelerate/zero3.yaml"]
    done = subprocess.run(
        [*launch, "-m", "adagrpo_train", *RUN, "engine=zero3", f"hydra.run.dir={tmp_path / 'run'}"],
        env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    saved = checkpoint.load(checkpoint.find(tmp_path / "run"))
    assert len(saved.per_rank) == 2
    assert saved.config["engine"]["stage"] == 3
    assert (tmp_path / "run/export").is_dir()


def test_a_slurm_job_starts_one_launcher_per_machine_which_find_each_other(tmp_path: Path) -> None:
    """Two launchers of torchrun meet on this machine and train with DeepSpeed, without accelerate's launcher."""
    stand_ins = tmp_path / "bin"
    stand_ins.mkdir()
    (stand_ins / "scontrol").write_text('#!/bin/bash\n[[ "$*" == "show hostnames localhost,localhost" ]] || exit 9\n'
                                        'printf "localhost\\nlocalhost\\n"\n')  # fmt: skip
    (stand_ins / "srun").write_text(
        '#!/bin/bash\nwhile [[ $1 == --* ]]; do echo "$1" >>"$SRUN_OPTIONS"; shift; done\n'
        'pids=()\nfor node in 0 1; do "$@" & pids+=($!); done\n'
        'for pid in "${pids[@]}"; do wait "$pid" || exit 1; done\n'
    )
    for path in stand_ins.iterdir():
        path.chmod(0o755)
    job = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "localhost,localhost", "SLURM_JOB_NUM_NODES": "2"}
    job |= {"SLURM_GPUS_ON_NODE": "1", "SLURM_SUBMIT_DIR": str(ROOT), "SRUN_OPTIONS": str(tmp_path / "options")}
    script = tmp_path / "slurm_script"  # SLURM runs a copy
    script.write_text((ROOT / "scripts/slurm.sh").read_text())
    done = subprocess.run(
        ["bash", str(script), *RUN, "engine=zero2", f"hydra.run.dir={tmp_path / 'run'}"],
        env=environment(PATH=f"{stand_ins}:{os.environ['PATH']}", **job),
        cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert "--ntasks-per-node=1" in (tmp_path / "options").read_text().split()
    saved = checkpoint.load(checkpoint.find(tmp_path / "run"))
    assert len(saved.per_rank) == 2
    assert saved.config["engine"]["stage"] == 2
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["policy/updates"] for row in rows if "policy/updates" in row] == [1]
