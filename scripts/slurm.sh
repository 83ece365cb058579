#!/usr/bin/env bash
#SBATCH --job-name=adagrpo-train
#SBATCH --ntasks-per-node=1
#SBATCH --signal=TERM@600
# A training run as a SLURM job, one launcher per machine. Submit it from the repository:
#   sbatch --nodes 2 --gpus-per-node 8 --time 24:00:00 scripts/slurm.sh experiment=flow_grpo_sd35
#
# Ten minutes before its time is over the job is asked to stop: it finishes the iteration and saves, and
#   sbatch ... scripts/slurm.sh experiment=flow_grpo_sd35 resume=RUN
# goes on from there. A machine whose launcher fails ends the job. The repository, .venv included, and all files of the
# run must be on a file system that the machines share.
set -euo pipefail

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
  sed -n '5,/^[^#]/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
  exit
fi
if [[ -z ${SLURM_JOB_ID:-} ]]; then
  printf 'slurm.sh: not inside a job; submit it with sbatch, see --help\n' >&2
  exit 2
fi

# SLURM runs a copy of this file, so its place says nothing about the repository's.
cd "$SLURM_SUBMIT_DIR"
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST") # all of them: whoever is not read to its end may end by SIGPIPE
first=${hosts%%$'\n'*}
processes=()
if [[ -n ${SLURM_GPUS_ON_NODE:-} ]]; then processes=(--processes "$SLURM_GPUS_ON_NODE"); fi

exec srun --ntasks-per-node=1 --kill-on-bad-exit=1 bash scripts/torchrun.sh \
  --nodes "$SLURM_JOB_NUM_NODES" --first "$first" --port "$((20000 + SLURM_JOB_ID % 20000))" --id "$SLURM_JOB_ID" \
  "${processes[@]}" "$@"
