#!/usr/bin/env bash
# Submits a training to a cluster that xpk made, as a workload on one or several slices of TPUs.
set -euo pipefail

usage() {
  cat <<'END'
bash experiments/launch/xpk.sh --name=NAME --cluster=CLUSTER --tpu-type=TYPE --image=IMAGE --config=EXPERIMENT --workdir=FOLDER
  [flags of xpk] [-- flags of experiments.train]

  --name       of the workload
  --cluster    made by `xpk cluster create`
  --tpu-type   of a slice, such as v5p-64
  --image      the image of this tree: see experiments/launch/Dockerfile (EXTRAS=tpu)
  --config     the experiment, such as quickstart or experiments/configs/quickstart.py
  --workdir    the folder of the run, which all workers must see: in a bucket that `xpk storage attach` mounts, such as
               /mnt/runs/quickstart
  --restarts   how often all workers are started again; 10 by default
  --dry-run    print the command and run none
  --help       this

All other flags before -- go to xpk as they are, such as --num-slices=2, --project and --zone. Example:
  bash experiments/launch/xpk.sh --name=towers --cluster=pods --tpu-type=v5p-64 --image=registry.example/twotower:1 \
    --config=quickstart --workdir=/mnt/runs/quickstart -- --config.training.steps=5000

A worker that ends with 75 (asked to end, or another one is lost) or 134 starts again and goes on from the last checkpoint; one that
ends with 78 (a mistake in the configuration) does not.
END
}

cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source experiments/launch/common.sh
name='' cluster='' tpu_type='' image='' restarts=10
parse "name cluster tpu-type image restarts" "$@"
require name cluster tpu_type image config workdir
require_number restarts
case $workdir in
  /*) ;;
  *) fail "--workdir=$workdir must be an absolute path, of a folder that all workers see" ;;
esac

# xpk gives the command to a shell. Its workers are numbered by the cluster. Its own statuses that start again are 42 and 127 to 255.
printf -v train '%q ' python -m experiments.train "--config=$config" "--workdir=$workdir" --distributed \
  ${train_flags[@]+"${train_flags[@]}"}
command=(xpk workload create "--workload=$name" "--cluster=$cluster" "--tpu-type=$tpu_type" "--docker-image=$image"
  "--max-restarts=$restarts" --restart-on-exit-codes=75 ${scheduler_flags[@]+"${scheduler_flags[@]}"} "--command=${train% }")

if [ -n "$dry_run" ]; then
  printf '%q ' "${command[@]}"
  echo
  exit
fi
command -v xpk >/dev/null || fail "xpk is not on the PATH: install it and log in to Google Cloud"
"${command[@]}"
