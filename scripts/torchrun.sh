#!/usr/bin/env bash
# Starts this machine's processes of a training run on one or several machines: the same command on each of them.
#   scripts/torchrun.sh [options] [key=value ...]
#
#   --nodes N        machines of the run (default 1)
#   --first HOST     one of the machines, reachable from all; needed with --nodes
#   --port PORT      free on that machine (default 29500)
#   --id NAME        tells runs with the same HOST and PORT apart (default adagrpo-train)
#   --processes K    processes on this machine (default: one per NVIDIA GPU, one without any)
#
# On each of two machines with 8 GPUs:
#   scripts/torchrun.sh --nodes 2 --first node0 experiment=flow_grpo_sd35
# Files of the model, prompts and checkpoints must be at the same place on every machine; only the first process writes.
# On SIGTERM processes have 10 minutes to finish their iteration and save (TORCH_ELASTIC_SHUTDOWN_TIMEOUT).
set -euo pipefail

usage() { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }
fail() {
  printf 'torchrun.sh: %s\n' "$1" >&2
  exit 2
}

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
nodes=1 first='' port=29500 id=adagrpo-train processes='' settings=()
while (($# > 0)); do
  case $1 in
    -h | --help)
      usage
      exit
      ;;
    --nodes | --first | --port | --id | --processes)
      if (($# < 2)); then fail "$1 needs a value; see --help"; fi
      printf -v "${1#--}" '%s' "$2"
      shift 2
      ;;
    -*) fail "unknown option $1; see --help" ;;
    *)
      settings+=("$1")
      shift
      ;;
  esac
done

python=$repo/.venv/bin/python
if [[ ! -x $python ]]; then fail "no $python; run scripts/setup.sh first"; fi
if ((nodes > 1)) && [[ -z $first ]]; then fail '--nodes needs --first HOST'; fi
if [[ -z $processes ]]; then
  processes=$({ nvidia-smi -L 2>/dev/null || true; } | grep -c '^GPU' || true)
  if ((processes == 0)); then processes=1; fi
fi

export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
meeting=(--standalone)
if ((nodes > 1)); then meeting=(--nnodes "$nodes" --rdzv_backend c10d --rdzv_endpoint "$first:$port" --rdzv_id "$id"); fi
exec "$python" -m torch.distributed.run "${meeting[@]}" --nproc_per_node "$processes" -m adagrpo_train "${settings[@]}"
