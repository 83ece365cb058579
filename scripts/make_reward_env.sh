#!/usr/bin/env bash
# Makes .venvs/ENVIRONMENT, an environment for one kind of reward: torch, this package without its trainer, and the
# extra of that name. A second run starts at once; an interrupted one is completed by the next.
#   scripts/make_reward_env.sh REWARD|EXTRA [PACKAGE...]
#   scripts/make_reward_env.sh hpsv2            the same environment as for clip and tiny_clip: open-clip
#   scripts/make_reward_env.sh open-clip pytest pytest too, for tests/vision
# Prints the path of the environment's Python: what a reward's `python` setting takes.
# environment.sh says what else it can be told.
set -euo pipefail

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=scripts/environment.sh
source "$repo/scripts/environment.sh"

extra_of() {
  case $1 in
    hpsv2 | clip | tiny_clip | open-clip) printf 'open-clip' ;;
    pickscore | aesthetic | image_reward | transformers) printf 'transformers' ;;
    *) printf '%s' "$1" ;;
  esac
}

if (($# == 0)); then
  sed -n '2,8s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
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
wanted=$(printf '%s ' "$@" | cat - "$repo/pyproject.toml" "$repo/constraints.txt" "$repo/scripts/environment.sh" "${BASH_SOURCE[0]}" | cksum)

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
  rm -f "$stamp"
  make_venv
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
