#!/usr/bin/env bash
# Trains on a TPU VM or pod slice: creates or reuses it, installs this tree, and runs
# experiments.train on every worker.
set -euo pipefail

usage() {
  cat <<'END'
bash launch_tpu.sh --name=NAME --zone=ZONE --config=FILE --workdir=FOLDER [options] [-- flags of experiments.train]

  --name      of the TPU, created if there is none of this name
  --zone      where it is, such as us-central2-b
  --config    the experiment, such as experiments/configs/quickstart.py
  --workdir   the folder of the run on the worker, such as runs/quickstart; of several workers, a folder that all of them see
  --type      accelerator type, such as v4-8 or v5litepod-16; needed to create it
  --version   runtime version, such as tpu-ubuntu2204-base; needed to create it
  --project   Google Cloud project; by default that of gcloud
  --spot      create a spot TPU: cheaper, and taken away at any time
  --queued    create it by a queued resource of this name: Google Cloud gives it when there is one, and this waits for that
  --wait      how long a queued request stands, such as 6h; without it, for ever
  --bucket    a bucket that is mounted at runs/ on each worker, by gcsfuse
  --ref       git commit, branch or tag to run; by default the tree as it lies here
  --dry-run   print each command and run none
  --help      this

Example: bash launch_tpu.sh --name=towers --zone=us-central2-b --type=v4-8 --version=tpu-ubuntu2204-base \
           --config=experiments/configs/quickstart.py --workdir=runs/quickstart -- --config.training.steps=5000

The workers of a slice train one run together, each on its own part of every batch. All of them must see the folder of the run:
name one in a bucket or an NFS share that is mounted at the same place on each, such as --workdir=/mnt/share/runs/quickstart.
--bucket mounts one for --workdir=runs/NAME.

Run again, it reuses the TPU and the run goes on from its last checkpoint. The TPU is left running; fetch the run, delete it:
  gcloud compute tpus tpu-vm scp --recurse NAME:twotower/runs/quickstart runs/ --zone=ZONE
  gcloud compute tpus tpu-vm delete NAME --zone=ZONE
END
}

fail() {
  echo "launch_tpu.sh: $*" >&2
  exit 1
}

# Empty values, so that `set -u` accepts a flag that is not given; `parse` sets them by name.
name='' zone='' type='' version='' project='' spot='' queued='' wait='' bucket='' config='' workdir='' ref='' dry_run=''
train_flags=()

parse() {
  local flag value
  while [ $# -gt 0 ]; do
    case $1 in
      --) shift && train_flags=("$@") && return ;;
      --help | -h) usage && exit 0 ;;
      --spot) spot=yes && shift && continue ;;
      --queued) queued=yes && shift && continue ;;
      --dry-run) dry_run=yes && shift && continue ;;
      --name=* | --zone=* | --type=* | --version=* | --project=* | --config=* | --workdir=* | --ref=* | --wait=* | --bucket=*)
        flag=${1%%=*} value=${1#*=} && shift
        ;;
      --name | --zone | --type | --version | --project | --config | --workdir | --ref | --wait | --bucket)
        [ $# -gt 1 ] || fail "$1 needs a value"
        flag=$1 value=$2 && shift 2
        ;;
      *) fail "unknown flag '$1' (flags of experiments.train go after --); see --help" ;;
    esac
    printf -v "${flag#--}" %s "$value"
  done
}

check() {
  local flag
  for flag in name zone config workdir; do
    [ -n "${!flag}" ] || fail "--$flag is missing; see --help"
  done
  case $workdir in # a launch deletes all but runs/ and .venv in the worker's copy of the tree
    /* | runs/* | *://*) ;;
    *) fail "--workdir=$workdir must be under runs/, or an absolute path" ;;
  esac
  case $bucket:$workdir in
    :* | *:runs/*) ;;
    *) fail "--bucket=$bucket is mounted at runs/: --workdir=$workdir must be under runs/" ;;
  esac
  case $wait:$queued in ?*:) fail "--wait=$wait needs --queued" ;; esac
  [ -f "${config%%:*}" ] || fail "--config=$config: there is no such file in $PWD"
  [ -n "$dry_run" ] || command -v gcloud >/dev/null || fail "gcloud is not on the PATH: install the Google Cloud CLI and log in"
}

quoted() { # the arguments as a shell reads them
  local word escape="'\\''" space=''
  for word in "$@"; do
    case $word in
      '' | *[!A-Za-z0-9_./:=@%+,-]*) word="'${word//\'/$escape}'" ;;
    esac
    printf '%s%s' "$space" "$word"
    space=' '
  done
}

run() { # prints the command (on 3: its output may be captured) and, but for a dry run, runs it
  { quoted "$@" && echo; } >&3
  [ -n "$dry_run" ] || "$@"
}

tpu() { # tpu COMMAND ARGUMENTS...
  run gcloud compute tpus tpu-vm "$@" "--zone=$zone" ${project:+"--project=$project"}
}

queue() { # queue COMMAND ARGUMENTS...
  run gcloud compute tpus queued-resources "$@" "--zone=$zone" ${project:+"--project=$project"}
}

await_queued() { # until the TPU of a queued resource is there
  local state
  while true; do
    state=$(queue describe "$name" '--format=value(state.state)')
    [ -z "$dry_run" ] || return 0
    case $state in
      ACTIVE) return ;;
      FAILED | SUSPENDING | SUSPENDED) fail "the queued resource '$name' is in state $state; delete it (gcloud compute tpus queued-resources delete $name --force --zone=$zone) and try again" ;;
    esac
    echo "# the queued resource '$name' is in state $state: asking again in ${QUEUE_SECONDS:-60} seconds" >&3
    sleep "${QUEUE_SECONDS:-60}"
  done
}

create() {
  [ -n "$type" ] || fail "--type is missing: there may be no TPU '$name' in $zone, and creating it needs a type; see --help"
  [ -n "$version" ] || fail "--version is missing: there may be no TPU '$name' in $zone, and creating it needs one; see --help"
  if [ -z "$queued" ]; then
    tpu create "$name" "--accelerator-type=$type" "--version=$version" ${spot:+--spot}
    return
  fi
  queue create "$name" "--node-id=$name" "--accelerator-type=$type" "--runtime-version=$version" ${spot:+--spot} \
    ${wait:+"--valid-until-duration=$wait"}
  await_queued
}

delete() { # a TPU that was taken away, with its queued resource, if it had one
  if [ -n "$queued" ]; then queue delete "$name" --force --quiet; else tpu delete "$name" --quiet; fi
}

ensure() { # a TPU of this name that is ready
  local state
  if ! state=$(tpu describe "$name" '--format=value(state)' 2>"$scratch/error"); then
    grep -qiE 'NOT_FOUND|not found' "$scratch/error" || fail "gcloud cannot describe '$name': $(cat "$scratch/error")"
    create
    return
  fi
  if [ -n "$dry_run" ]; then
    echo "# only if there is none of this name (which needs --type and --version):" >&3
    if [ -n "$type$version" ]; then create; fi # without them `create` would end the dry run
    return
  fi
  case $state in
    READY) echo "# there is a TPU '$name': reusing it" >&3 ;;
    STOPPED) tpu start "$name" ;;
    # A spot TPU that was taken away cannot be started again.
    PREEMPTED | TERMINATED) delete && create ;;
    *) fail "the TPU '$name' is in state $state; try again when it is READY" ;;
  esac
}

pack() { # the tree into $archive: a commit, or what git tracks or does not ignore
  if [ -n "$ref" ]; then
    run git archive --format=tar.gz "--output=$archive" "$ref"
    return
  fi
  echo "# packing the files of $PWD that git does not ignore" >&3
  [ -z "$dry_run" ] || return 0
  git ls-files -z --cached --others --exclude-standard |
    # A tracked file may be deleted here, which tar would refuse.
    while IFS= read -r -d '' file; do [ ! -e "$file" ] || printf '%s\0' "$file"; done |
    tar -czf "$archive" --null -T -
}

# On each worker: the tree is replaced, except the environment and the runs; a Python of at least
# 3.11 is installed where the runtime image lacks it; and the installation follows, which is quick
# while setup.py is the same. apt-get waits for the lock, which a new VM's own updates may hold.
remote_install='mkdir -p twotower && cd twotower'
remote_install+=' && find . -mindepth 1 -maxdepth 1 ! -name .venv ! -name runs -exec rm -rf {} +'
remote_install+=' && tar -xzf ../twotower.tar.gz'
remote_install+=' && { bash launch_local.sh python >/dev/null 2>&1'
remote_install+=' || { sudo apt-get -qq -o DPkg::Lock::Timeout=600 update'
remote_install+=' && sudo apt-get -qq -o DPkg::Lock::Timeout=600 install -y python3.11-venv; }; }'
remote_install+=' && EXTRAS=tpu bash launch_local.sh install'

# The bucket is mounted as a folder. Orbax renames the folder of a checkpoint when it is whole, which a bucket without folders does
# object by object: the limit is that of objects in one.
mount_command() {
  printf 'mountpoint -q twotower/runs || { command -v gcsfuse >/dev/null || { echo "gcsfuse is not installed" >&2; exit 1; }; '
  printf 'mkdir -p twotower/runs && '
  quoted gcsfuse --implicit-dirs --rename-dir-limit=100000 "$bucket" twotower/runs
  printf '; }'
}

train_command() {
  printf 'cd twotower && '
  # Always --distributed: the TPU knows the number of workers and of this one, also of a single one.
  quoted .venv/bin/python -m experiments.train "--config=$config" "--workdir=$workdir" --distributed \
    ${train_flags[@]+"${train_flags[@]}"}
}

main() {
  parse "$@"
  cd "$(dirname "${BASH_SOURCE[0]}")"
  check
  scratch=$(mktemp -d)
  trap 'rm -rf "$scratch"' EXIT
  archive=$scratch/twotower.tar.gz
  exec 3>&1
  ensure
  pack
  tpu scp "$archive" "$name:twotower.tar.gz" --worker=all
  tpu ssh "$name" --worker=all "--command=$remote_install"
  [ -z "$bucket" ] || tpu ssh "$name" --worker=all "--command=$(mount_command)"
  tpu ssh "$name" --worker=all "--command=$(train_command)"
}

main "$@"
