#!/usr/bin/env bash
# The checks a change has to pass: format, lint, types, import rules, fast tests. It runs them all, then names the failed.
#   scripts/check.sh             everything
#   scripts/check.sh --static    without the tests
#   scripts/check.sh --fix       first lets ruff format and mend what it can
# shellcheck source=scripts/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$repo"

with_tests=true
fix=false
for argument in "$@"; do
  case $argument in
    --static) with_tests=false ;;
    --fix) fix=true ;;
    *)
      printf 'unknown option: %s\n' "$argument" >&2
      exit 2
      ;;
  esac
done

failed=()
check() {
  printf '\n== %s\n' "$1"
  "${@:2}" || failed+=("$1")
}

if [[ $fix == true ]]; then
  .venv/bin/ruff check --fix --quiet . || true # what is left is reported below
  .venv/bin/ruff format --quiet .
fi
check 'format' .venv/bin/ruff format --check .
check 'lint' .venv/bin/ruff check .
check 'types' .venv/bin/pyright --pythonpath .venv/bin/python
check 'import rules' .venv/bin/lint-imports --no-cache
if [[ $with_tests == true ]]; then check 'fast tests' scripts/test.sh --fast; fi

if ((${#failed[@]} > 0)); then
  printf '\nfailed: %s\n' "$(IFS=,; printf '%s' "${failed[*]}")"
  exit 1
fi
printf '\nall checks passed\n'
