#!/usr/bin/env bash
# Makes .venv with everything the scripts need. Run it, or source it: it then leaves `repo` and `venv` behind.
# A second run starts at once; an interrupted one is completed by the next. environment.sh says what it can be told.
set -euo pipefail

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$repo/.venv
stamp=$venv/.adagrpo-setup
# shellcheck source=scripts/environment.sh
source "$repo/scripts/environment.sh"

set_up() {
  rm -f "$stamp"
  make_venv
  say 'installing PyTorch (1/2, a minute or two the first time)'
  install_torch
  say 'installing AdaGRPO-Train and its tools (2/2, a minute or two the first time)'
  pip_install --constraint "$repo/constraints.txt" --editable "${repo}[dev]"
  printf '%s\n' "$wanted" >"$stamp"
  say 'ready'
}

wanted=$(cd "$repo" && cat pyproject.toml constraints.txt scripts/setup.sh scripts/environment.sh | cksum)
if [[ ! -x $venv/bin/python || ! -f $stamp || $(<"$stamp") != "$wanted" ]]; then
  set_up
fi
