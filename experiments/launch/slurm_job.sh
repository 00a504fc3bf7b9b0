#!/usr/bin/env bash
# The job that slurm.sh submits: slurm_job.sh GPUS PYTHON FLAGS_OF_EXPERIMENTS_TRAIN...
# It runs on the first node, starts one process a node, and tells Slurm what their exit status means.
set -uo pipefail
gpus=$1 python=$2
shift 2

# By itself JAX gives each process of Slurm one GPU; one process a node has them all.
if [ "$gpus" -gt 0 ]; then
  JAX_LOCAL_DEVICE_IDS=$(seq -s, 0 $((gpus - 1)))
  export JAX_LOCAL_DEVICE_IDS
fi

requeue() {
  echo "slurm_job.sh: $1; the job goes back into the queue"
  scontrol requeue "$SLURM_JOB_ID"
}
trap 'requeue "its time is over"; exit 75' USR1

# Where a process fails the others end too, some seconds later and with a status of their own. The first one is the
# cause, and srun would report the highest: so each notes its own.
export STATUSES=$PWD/slurm-$SLURM_JOB_ID.statuses
rm -f "$STATUSES"
task='"$@"; status=$?; echo $status >>"$STATUSES"; exit $status'
srun --kill-on-bad-exit=0 --wait=120 bash -c "$task" task "$python" -m experiments.train --distributed "$@" &
wait $!
status=$?
first=$(grep -m1 -v '^0$' "$STATUSES" 2>/dev/null) && status=$first
rm -f "$STATUSES"

case $status in
  75 | 134) requeue "a process was lost (status $status)" ;; # 134: aborted by JAX, whose other processes are lost
  78) echo "slurm_job.sh: a mistake in the configuration, which would fail again" ;;
esac
exit "$status"
