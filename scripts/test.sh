#!/usr/bin/env bash
# Runs the tests: the fast ones, then the slow ones, then those that need open_clip in its own environment
# (.venvs/open-clip, made on the first run) or bitsandbytes (.venvs/adamw-8bit). Other options go to pytest:
#   scripts/test.sh                all tests
#   scripts/test.sh --fast         only the fast ones
#   scripts/test.sh tests/stages   tests of a folder, in the trainer's environment only
#   scripts/test.sh -n 2 -k branch two workers, only tests with branch in their name
# shellcheck source=scripts/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$repo"

export HF_HUB_OFFLINE=1
export WANDB_MODE=offline

fast_only=false
paths_given=false
cores=$(getconf _NPROCESSORS_ONLN)
# A worker holds 0.5 GB; -n among the arguments comes later and counts. Neighbouring tests share what they start, and so
# each worker gets one stretch of them, and then helps the slowest.
options=(-n "$((cores < 4 ? cores : 4))" --dist worksteal)
for argument in "$@"; do
  if [[ $argument == --fast ]]; then fast_only=true; else options+=("$argument"); fi
  if [[ -e ${argument%%::*} ]]; then paths_given=true; fi
done

nothing_ran=5 # pytest's exit status when no test was selected
run_pytest() {
  local python=$1 status=0
  shift
  "$python" -m pytest "$@" "${options[@]}" || status=$?
  if ((status != 0 && status != nothing_ran)); then exit "$status"; fi
  if ((status == 0)); then something_ran=true; fi
}

something_ran=false
run_pytest .venv/bin/python -m 'not slow'
if [[ $fast_only == false ]]; then
  # Before the slow tests: one of them starts a server there.
  open_clip=$(bash scripts/make_reward_env.sh open-clip pytest pytest-xdist)
  run_pytest .venv/bin/python -m slow
  if [[ $paths_given == false ]]; then
    run_pytest "$open_clip" --confcutdir=tests/vision tests/vision
    # Beside the trainer's environment: inside it, every start of peft would import it.
    eight_bit=$repo/.venvs/adamw-8bit
    if [[ ! -d $eight_bit/bitsandbytes ]]; then pip_install --no-deps --target "$eight_bit" 'bitsandbytes>=0.50'; fi
    PYTHONPATH=$eight_bit run_pytest .venv/bin/python tests/stages/test_optimizers.py
  fi
fi
if [[ $something_ran == false ]]; then exit "$nothing_ran"; fi
