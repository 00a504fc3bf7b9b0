# Shared by the launchers of this folder, which source it: their flags, and the commands they give.

# All launchers have these; `set -u` needs a value of each flag that is not given.
config='' workdir='' dry_run=''
train_flags=()
scheduler_flags=()

fail() {
  echo "$(basename "$0"): $*" >&2
  exit 1
}

parse() { # parse "NAMES OF FLAGS" ARGUMENTS...: sets a variable for each flag, with _ for -
  local names=" $1 config workdir " flag
  shift
  while [ $# -gt 0 ]; do
    case $1 in
      --) shift && train_flags=("$@") && return ;;
      --help | -h) usage && exit 0 ;;
      --dry-run) dry_run=yes ;;
      --*=*)
        flag=${1%%=*} && flag=${flag#--}
        case $names in
          *" $flag "*) printf -v "${flag//-/_}" %s "${1#*=}" ;;
          *) scheduler_flags+=("$1") ;;
        esac
        ;;
      *) fail "'$1' is no flag of the form --name=value; flags of experiments.train go after --; see --help" ;;
    esac
    shift
  done
}

require() { # require NAMES...: of flags that must have been given
  local flag
  for flag in "$@"; do
    [ -n "${!flag}" ] || fail "--${flag//_/-} is missing; see --help"
  done
}

require_number() { # require_number NAMES...: of flags that are whole numbers
  local flag
  for flag in "$@"; do
    case ${!flag} in
      '' | *[!0-9]*) fail "--${flag//_/-}=${!flag} must be a whole number" ;;
    esac
  done
}
