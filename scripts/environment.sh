# shellcheck shell=bash disable=SC2154
# Functions of the scripts that make Python environments; to be sourced, with `repo` and `venv` set.
#
#   ADAGRPO_PYTHON       the Python to use (default: the newest of python3.13, 3.12, 3.11 and python3)
#   ADAGRPO_TORCH_INDEX  one more package index to take torch from; empty: only the index pip is set to.
#                        Default: on Linux without an NVIDIA GPU the public index of CPU builds, if pip's own has none.

say() { printf '[setup] %s\n' "$*" >&2; }

find_python() {
  local candidate
  for candidate in ${ADAGRPO_PYTHON:+"$ADAGRPO_PYTHON"} python3.13 python3.12 python3.11 python3; do
    # Run it: a name on PATH may be a stub, too old, or lack the venv module.
    if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
      printf '%s\n' "$candidate"
      return
    fi
  done
  say 'no Python 3.11 or newer with the venv module was found.'
  say 'Install one (Debian and Ubuntu: apt install python3 python3-venv), or name it in ADAGRPO_PYTHON.'
  return 1
}

pip_install() { "$venv/bin/python" -m pip install -qq --disable-pip-version-check --no-input "$@"; }

install_torch() {
  local torch cpu_index=https://download.pytorch.org/whl/cpu
  torch=$(grep '^torch==' "$repo/constraints.txt")
  if [[ -n ${ADAGRPO_TORCH_INDEX:-} ]]; then
    pip_install --extra-index-url "$ADAGRPO_TORCH_INDEX" "$torch"
  elif [[ -n ${ADAGRPO_TORCH_INDEX+set} || $(uname -s) != Linux ]] || nvidia-smi -L >/dev/null 2>&1; then
    pip_install "$torch"
  # Linux without a GPU: the default build would bring gigabytes of CUDA libraries, so ask for the CPU build by name.
  elif ! pip_install "$torch+cpu" 2>/dev/null &&
    ! pip_install --retries 1 --timeout 20 --extra-index-url "$cpu_index" "$torch+cpu" 2>/dev/null; then
    say 'no CPU build of torch within reach: taking the default build, which may bring several GB of CUDA libraries'
    pip_install "$torch"
  fi
}

# Makes the environment unless it is there. What an interrupted installation left is removed: a package without a
# RECORD yet would pass for installed.
make_venv() {
  local python
  if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    python=$(find_python)
    say "creating ${venv#"$repo/"} with $("$python" --version)"
    "$python" -m venv --clear "$venv"
  fi
  find "$venv"/lib/python3*/site-packages -maxdepth 1 -name '*.dist-info' ! -exec test -e '{}/RECORD' \; \
    -exec rm -rf '{}' +
}
