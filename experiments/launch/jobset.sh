#!/usr/bin/env bash
# Submits a training to Kubernetes as a JobSet, on GPUs or on a slice of TPUs: it fills in jobset.yaml.
set -euo pipefail

usage() {
  cat <<'END'
bash experiments/launch/jobset.sh --name=NAME --image=IMAGE (--claim=CLAIM | --bucket=BUCKET) --nodes=N (--gpus=N | --tpus=N --tpu-type=TYPE --tpu-topology=AxB)
  --config=EXPERIMENT --workdir=runs/NAME [flags of kubectl] [-- flags of experiments.train]

  --name           of the JobSet
  --image          the image of this tree: see experiments/launch/Dockerfile
  --claim          claim of a volume that all nodes can write (ReadWriteMany), mounted at runs/
  --bucket         in its place, a bucket that the Cloud Storage FUSE driver of GKE mounts at runs/
  --service-account  service account of the pods, one that may write to the bucket
  --nodes          number of machines
  --gpus           number of GPUs of each
  --tpus           number of TPU chips of each, whose number of machines is that of the slice
  --tpu-type       label cloud.google.com/gke-tpu-accelerator of the machines, such as tpu-v6e-slice
  --tpu-topology   label cloud.google.com/gke-tpu-topology, such as 4x4
  --config         the experiment, such as quickstart or experiments/configs/quickstart.py
  --workdir        the folder of the run, under runs/
  --dry-run        print the manifest and submit nothing
  --help           this

All other flags before -- go to kubectl as they are. Example:
  bash experiments/launch/jobset.sh --name=towers --image=registry.example/twotower:1 --claim=runs --nodes=2 --gpus=8 \
    --namespace=research --config=quickstart --workdir=runs/quickstart -- --config.training.steps=5000

The JobSet controller (0.10 or later) must be installed in the cluster. A JobSet of this name must not exist:
  kubectl delete jobset NAME
END
}

cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source experiments/launch/common.sh
name='' image='' claim='' bucket='' service_account='' nodes='' gpus='' tpus='' tpu_type='' tpu_topology=''
parse "name image claim bucket service-account nodes gpus tpus tpu-type tpu-topology" "$@"
require name image nodes config workdir
require_number nodes
case $workdir in
  runs/?*) ;;
  *) fail "--workdir=$workdir must be under runs/, where the volume is mounted" ;;
esac

pod_annotations='{}'
case ${claim:+claim}${bucket:+bucket} in
  claim) volume="persistentVolumeClaim: {claimName: $claim}" ;;
  bucket)
    # Without folders in the bucket, renaming one renames each object in it.
    options='implicit-dirs,rename-dir-limit=100000,uid=1000,gid=1000'
    volume="csi: {driver: gcsfuse.csi.storage.gke.io, volumeAttributes: {bucketName: $bucket, mountOptions: '$options'}}"
    pod_annotations='{gke-gcsfuse/volumes: "true"}'
    ;;
  *) fail "one of --claim and --bucket must be given; see --help" ;;
esac
service_account=${service_account:-default}

command=(python -m experiments.train "--config=$config" "--workdir=$workdir" --distributed)
case ${gpus:+gpu}${tpus:+tpu} in
  gpu)
    require_number gpus
    annotations='{}' node_selector='{}' resources="{nvidia.com/gpu: $gpus}"
    pod_security='{runAsNonRoot: true, runAsUser: 1000, fsGroup: 1000}'
    container_security='{allowPrivilegeEscalation: false}'
    # The address that JobSet gives to its first pod. JAX could ask Kubernetes itself, but would need a service account
    # that may read pods.
    command+=("--coordinator=$name-train-0-0.$name:8476" "--processes=$nodes")
    ;;
  tpu)
    require_number tpus
    require tpu_type tpu_topology
    # All pods on the machines of one slice.
    annotations='{alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool}'
    node_selector="{cloud.google.com/gke-tpu-accelerator: $tpu_type, cloud.google.com/gke-tpu-topology: $tpu_topology}"
    resources="{google.com/tpu: $tpus}"
    # A container reaches the chips only like this.
    pod_security='{runAsUser: 0}' container_security='{privileged: true}'
    ;;
  *) fail "one of --gpus and --tpus must be given; see --help" ;;
esac
command+=(${train_flags[@]+"${train_flags[@]}"})

json() { # the arguments as a list of JSON, in which Kubernetes expands no $(NAME)
  local word list=''
  for word in "$@"; do
    word=${word//\\/\\\\}
    word=${word//\"/\\\"}
    word=${word//\$(/\$\$(}
    list+="${list:+, }\"$word\""
  done
  printf %s "$list"
}

list=$(json "${command[@]}")
# Each pod is told its number by Kubernetes, when it starts.
if [ -n "$gpus" ]; then list+=', "--process=$(JOB_COMPLETION_INDEX)"'; fi
command="[$list]"

manifest=$(<experiments/launch/jobset.yaml)
for key in name annotations nodes pod_security node_selector image command container_security resources volume pod_annotations service_account; do
  manifest=${manifest//"\${$key}"/"${!key}"}
done

if [ -n "$dry_run" ]; then
  printf '%s\n' "$manifest"
  exit
fi
command -v kubectl >/dev/null || fail "kubectl is not on the PATH: install it and log in to the cluster"
kubectl create --filename=- ${scheduler_flags[@]+"${scheduler_flags[@]}"} <<<"$manifest"
