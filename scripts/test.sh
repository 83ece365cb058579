#!/usr/bin/env bash
# Runs the tests: the fast ones, then the slow ones. Other options go to pytest:
#   scripts/test.sh                all tests
#   scripts/test.sh --fast         only the fast ones
#   scripts/test.sh -n 2 -k branch two workers, only tests with branch in their name
# shellcheck source=scripts/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$repo"

export HF_HUB_OFFLINE=1
export WANDB_MODE=offline

fast_only=false
options=()
for argument in "$@"; do
  if [[ $argument == --fast ]]; then fast_only=true; else options+=("$argument"); fi
done

nothing_ran=5 # pytest's exit status when no test was selected
run_pytest() {
  local status=0
  .venv/bin/python -m pytest "$@" ${options[@]+"${options[@]}"} || status=$?
  if ((status != 0 && status != nothing_ran)); then exit "$status"; fi
  if ((status == 0)); then something_ran=true; fi
}

something_ran=false
run_pytest -m 'not slow'
if [[ $fast_only == false ]]; then run_pytest -m slow; fi
if [[ $something_ran == false ]]; then exit "$nothing_ran"; fi
