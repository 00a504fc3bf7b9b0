#!/usr/bin/env bash
# Sets up .venv beside this file and runs twotower in it: see usage below.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
VENV=${VENV:-.venv}

usage() {
  cat <<'END'
bash launch_local.sh [--flag=value ...]   install, then the quick start: train, export, evaluate, query
bash launch_local.sh test [pytest args]   install, then the whole test suite
bash launch_local.sh test --quick         the same without the slow tests: for the desk, under two minutes
bash launch_local.sh install              install only
bash launch_local.sh python               print the Python that would be used

The quick start learns a generated shop in runs/quickstart; DATA=movielens learns MovieLens (through TFDS, which downloads
it) in runs/movielens. Further flags go to experiments.train: --config.training.steps=500. A run that was stopped goes on.
.venv is made once; a later run reuses it as long as setup.py is the same.

Environment: PYTHON  the Python to use (3.11 or later); by default the first found of python3.13, 3.12, 3.11, python3
             EXTRAS  extras of setup.py to install, separated by commas; tests of those that are missing are skipped
             VENV    the folder of the environment; .venv by default
END
}

fail() {
  echo "launch_local.sh: $*" >&2
  exit 1
}

suitable() { # a Python of at least 3.11 that can make environments
  command -v "$1" >/dev/null && "$1" -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

find_python() {
  local candidate
  if [ -n "${PYTHON:-}" ]; then
    suitable "$PYTHON" || fail "PYTHON=$PYTHON is not a Python of 3.11 or later with the module venv."
    echo "$PYTHON"
    return
  fi
  for candidate in python3.13 python3.12 python3.11 python3 python; do
    if suitable "$candidate"; then
      echo "$candidate"
      return
    fi
  done
  fail "no Python of 3.11 or later with the module venv on the PATH. Install one (on Debian and Ubuntu the package" \
    "python3-venv as well), or name one: PYTHON=/path/to/python bash launch_local.sh"
}

stamp() { # what an installation was made from: it holds while none of this changes
  printf '%s %s %s\n' "$(cksum <setup.py)" "$PWD" "$1"
}

install() { # install EXTRAS, unless .venv has just these already, with or without those of the tests
  local extras=$1 had python
  if "$VENV/bin/python" -c '' 2>/dev/null; then
    had=$(cat "$VENV/installed" 2>/dev/null) || had=
    if [ "$had" = "$(stamp "$extras")" ] || [ "$had" = "$(stamp "${extras:+$extras,}dev")" ]; then return; fi
  fi
  if ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
    python=$(find_python)
    echo "Making $VENV with $("$python" --version) ..."
    "$python" -m venv --clear "$VENV"
  fi
  echo "Installing twotower${extras:+[$extras]} into $VENV (some minutes the first time) ..."
  rm -f "$VENV/installed"
  "$VENV/bin/python" -m pip install --quiet --editable ".${extras:+[$extras]}"
  stamp "$extras" >"$VENV/installed"
}

run() {
  echo
  echo "\$ python $*"
  "$VENV/bin/python" "$@"
}

quick_start() {
  local config workdir
  case ${DATA:-shop} in
    shop) config=experiments/configs/quickstart.py workdir=runs/quickstart ;;
    movielens) config=experiments/configs/movielens_small.py workdir=runs/movielens ;;
    *) fail "DATA=$DATA is not known; DATA=shop (the default) or DATA=movielens" ;;
  esac
  # The report of the evaluation is drawn, and the page of the server opened.
  install "plots,serve${EXTRAS:+,$EXTRAS}"
  run -m experiments.train "--config=$config" "--workdir=$workdir" "$@"
  run -m experiments.export "--workdir=$workdir"
  run -m experiments.evaluate "--workdir=$workdir" --baselines --report
  run -m experiments.query "--workdir=$workdir" --user=42 --k=10
  echo
  echo "To look at it: $VENV/bin/twotower serve --workdir=$workdir, and open http://127.0.0.1:8000."
}

# Huge pages for the buffers of a step, which a running process cannot ask for; see experiments/guides/devices.md.
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}

case ${1:-} in
  test)
    shift
    install "${EXTRAS:+$EXTRAS,}dev"
    if [ "${1:-}" = --quick ]; then
      shift
      set -- -m "not slow" "$@"
    fi
    # Neighbouring tests share what they train and build: each of the two workers takes files whole.
    exec "$VENV/bin/python" -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
    ;;
  install) install "${EXTRAS:-}" ;;
  python) find_python ;;
  -h | --help) usage ;;
  "" | --*) quick_start "$@" ;;
  *)
    usage >&2
    fail "unknown command '$1'"
    ;;
esac
