#!/usr/bin/env bash
# Trains the tiny demo on this machine's CPU and says where its report lies. Arguments go to the training command:
#   scripts/demo.sh seed=1
# shellcheck source=scripts/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$repo"

export HF_HUB_OFFLINE=1
export WANDB_MODE=${WANDB_MODE:-offline}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

# `accelerate launch --cpu` starts a single process whatever --num_processes says; --multi_gpu is its name for
# "start several here", and ACCELERATE_USE_CPU=true keeps them on the CPU (gloo).
export ACCELERATE_USE_CPU=true
if (($(getconf _NPROCESSORS_ONLN) >= 2)); then
  processes=(--multi_gpu --num_processes 2 --main_process_port 0)
else
  processes=(--cpu --num_processes 1)
fi

started=$(mktemp)
trap 'rm -f "$started"' EXIT
.venv/bin/accelerate launch "${processes[@]}" --num_machines 1 --mixed_precision no --dynamo_backend no \
  -m adagrpo_train experiment=tiny_demo "$@"

report=$(find outputs -name report.html -newer "$started" 2>/dev/null | sort | tail -n 1)
if [[ -n $report ]]; then
  printf '\nReport: %s\n' "$repo/$report"
fi
