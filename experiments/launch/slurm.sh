#!/usr/bin/env bash
# Submits a training to Slurm: one process a node, which drives all GPUs of its node.
set -euo pipefail

usage() {
  cat <<'END'
bash experiments/launch/slurm.sh --nodes=N --gpus=N --config=EXPERIMENT --workdir=FOLDER [flags of sbatch] [-- flags of experiments.train]

  --nodes     number of machines
  --gpus      number of GPUs of each; 0 trains on CPUs
  --config    the experiment, such as experiments/configs/quickstart.py
  --workdir   the folder of the run, which all nodes see
  --python    the Python that has twotower; by default .venv/bin/python, as `bash launch_local.sh install` makes it
  --dry-run   print the command and submit nothing
  --help      this

All other flags before -- go to sbatch as they are. Example:
  bash experiments/launch/slurm.sh --nodes=2 --gpus=8 --partition=gpu --time=12:00:00 \
    --config=experiments/configs/quickstart.py --workdir=runs/quickstart -- --config.training.steps=5000

This tree and the folder of the run must lie where all nodes see them. The job is put into the queue again when a node
or a process is lost and when its time is over; the run then goes on from its last checkpoint.
END
}

cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source experiments/launch/common.sh
nodes='' gpus='' python=.venv/bin/python
parse "nodes gpus python" "$@"
require nodes gpus config workdir
require_number nodes gpus
[ -n "$dry_run" ] || command -v sbatch >/dev/null || fail "sbatch is not on the PATH: run this on a login node of Slurm"

command=(sbatch "--nodes=$nodes" --ntasks-per-node=1)
# Asking for no GPUs is an error where Slurm knows none.
[ "$gpus" = 0 ] || command+=("--gpus-per-node=$gpus")
# The job may be put into the queue again, and then goes on writing its log. Slurm tells the script (B) by USR1 that
# its time is over in two minutes.
command+=(--requeue --open-mode=append --signal=B:USR1@120 "--chdir=$PWD")
command+=(${scheduler_flags[@]+"${scheduler_flags[@]}"} experiments/launch/slurm_job.sh "$gpus" "$python")
command+=("--config=$config" "--workdir=$workdir" ${train_flags[@]+"${train_flags[@]}"})

printf '%q ' "${command[@]}" && echo
[ -n "$dry_run" ] || "${command[@]}"
