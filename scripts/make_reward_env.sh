#!/usr/bin/env bash
# Makes .venvs/EXTRA, an environment for one kind of reward: this package without its trainer, and the requirements of
# that extra in pyproject.toml. A second run starts at once; an interrupted one is completed by the next.
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
    unified_reward | vlm_judge) printf 'judge' ;;
    jpeg_size) printf 'serve' ;;
    *) printf '%s' "$1" ;;
  esac
}

# The requirements of an extra, one a line, from its line or lines in pyproject.toml. Installing "adagrpo-train[EXTRA]"
# itself would bring the trainer.
requirements() {
  awk -v extra="$1" '
    /^\[/ { inside = $0 == "[project.optional-dependencies]" }
    inside && index($0, extra " = [") == 1 { found = 1 }
    found { sub(/ #.*/, ""); print }
    found && /\]$/ { exit }
  ' "$repo/pyproject.toml" | grep -o '"[^"]*"' | tr -d '"'
}

case ${1:---help} in
  -h | --help)
    sed -n '2,8s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
    exit $(($# == 0 ? 2 : 0))
    ;;
esac
extra=$(extra_of "$1")
shift
if ! needed=$(requirements "$extra"); then
  say "no reward or extra of that name ($extra); extras are listed in pyproject.toml"
  exit 2
fi
venv=$repo/.venvs/$extra
stamp=$venv/.adagrpo-setup
wanted=$(printf '%s ' "$@" | cat - "$repo/pyproject.toml" "$repo/constraints.txt" "$repo/scripts/environment.sh" "${BASH_SOURCE[0]}" | cksum)

if [[ ! -f $stamp || $(<"$stamp") != "$wanted" ]]; then
  rm -f "$stamp"
  make_venv
  if grep -q '^torch' <<<"$needed"; then
    say 'installing PyTorch'
    install_torch
  fi
  say "installing the extras $extra and serve"
  packages=()
  while IFS= read -r requirement; do packages+=("$requirement"); done < <(requirements "$extra" && requirements serve)
  pip_install --constraint "$repo/constraints.txt" "${packages[@]}" "$@"
  pip_install --no-deps --editable "$repo"
  printf '%s\n' "$wanted" >"$stamp"
  say 'ready'
fi
printf '%s\n' "$venv/bin/python"
