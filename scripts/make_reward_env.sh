#!/usr/bin/env bash
# Makes .venvs/ENVIRONMENT, an environment for one kind of reward: torch, this package without its trainer, and the
# extra of that name. A second run starts at once; an interrupted one is completed by the next.
#   scripts/make_reward_env.sh REWARD|EXTRA [PACKAGE...]
#   scripts/make_reward_env.sh hpsv2            the same environment as for clip and tiny_clip: open-clip
#   scripts/make_reward_env.sh open-clip pytest pytest too, for tests/vision
# Prints the path of the environment's Python: what a reward's `python` setting takes.
#
#   ADAGRPO_PYTHON, ADAGRPO_TORCH_INDEX  as in scripts/setup.sh
set -euo pipefail

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

say() { printf '[reward env] %s\n' "$*" >&2; }

extra_of() {
  case $1 in
    hpsv2 | clip | tiny_clip | open-clip) printf 'open-clip' ;;
    pickscore | aesthetic | image_reward | transformers) printf 'transformers' ;;
    *) printf '%s' "$1" ;;
  esac
}

if (($# == 0)); then
  sed -n '2,9s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
  exit 2
fi
extra=$(extra_of "$1")
shift
if ! grep -Eq "^$extra = \[" "$repo/pyproject.toml"; then
  say "no reward or extra of that name ($extra); extras are listed in pyproject.toml"
  exit 2
fi
venv=$repo/.venvs/$extra
stamp=$venv/.adagrpo-setup
wanted=$(printf '%s ' "$@" | cat - "$repo/pyproject.toml" "$repo/constraints.txt" "${BASH_SOURCE[0]}" | cksum)

pip_install() { "$venv/bin/python" -m pip install -qq --disable-pip-version-check --no-input "$@"; }

find_python() {
  local candidate
  for candidate in ${ADAGRPO_PYTHON:+"$ADAGRPO_PYTHON"} python3.13 python3.12 python3.11 python3; do
    if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
      printf '%s\n' "$candidate"
      return
    fi
  done
  say 'no Python 3.11 or newer with the venv module was found; name one in ADAGRPO_PYTHON'
  return 1
}

# torch before anything that asks for it, so that pip does not choose another build (see scripts/setup.sh).
install_torch() {
  local torch index=https://download.pytorch.org/whl/cpu
  torch=$(grep '^torch==' "$repo/constraints.txt")
  if [[ -n ${ADAGRPO_TORCH_INDEX:-} ]]; then
    pip_install --extra-index-url "$ADAGRPO_TORCH_INDEX" "$torch"
  elif [[ -n ${ADAGRPO_TORCH_INDEX+set} || $(uname -s) != Linux ]] || nvidia-smi -L >/dev/null 2>&1; then
    pip_install "$torch"
  elif ! pip_install "$torch+cpu" 2>/dev/null &&
    ! pip_install --retries 1 --timeout 20 --extra-index-url "$index" "$torch+cpu" 2>/dev/null; then
    say 'no CPU build of torch within reach: taking the default build, which may bring several GB of CUDA libraries'
    pip_install "$torch"
  fi
}

# The requirements of an extra, one a line. Installing "adagrpo-train[EXTRA]" itself would bring the trainer.
requirements() {
  "$venv/bin/python" - "$repo/pyproject.toml" "$@" <<'PYTHON'
import sys, tomllib

path, *extras = sys.argv[1:]
with open(path, "rb") as file:
    known = tomllib.load(file)["project"]["optional-dependencies"]
print("\n".join(requirement for extra in extras for requirement in known[extra]))
PYTHON
}

if [[ ! -f $stamp || $(<"$stamp") != "$wanted" ]]; then
  if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    python=$(find_python)
    say "creating .venvs/$extra with $("$python" --version)"
    "$python" -m venv --clear "$venv"
  fi
  rm -f "$stamp"
  # A package whose installation was cut short has no RECORD yet, and pip would take it for installed.
  find "$venv"/lib/python3*/site-packages -maxdepth 1 -name '*.dist-info' ! -exec test -e '{}/RECORD' \; \
    -exec rm -rf '{}' +
  say 'installing PyTorch (1/2)'
  install_torch
  say "installing the extras $extra and serve (2/2)"
  needed=()
  while IFS= read -r requirement; do needed+=("$requirement"); done < <(requirements "$extra" serve)
  pip_install --constraint "$repo/constraints.txt" "${needed[@]}" "$@"
  pip_install --no-deps --editable "$repo"
  printf '%s\n' "$wanted" >"$stamp"
  say 'ready'
fi
printf '%s\n' "$venv/bin/python"
