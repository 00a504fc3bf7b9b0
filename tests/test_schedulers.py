"""The launchers for Slurm and Kubernetes against stand-ins of sbatch, srun, scontrol and kubectl.

`tests/training/test_processes.py` starts real processes by the Slurm script.
"""

import os
import re
import shlex
import signal
import subprocess
import time

import pytest
import yaml

from tests.launchers import AWKWARD, RECORD, ROOT, SRUN, Launcher, submit_to_slurm
from tests.schemas import mistakes

# Each process ends with its own of ENDS; the first of them is in no hurry.
ENDING = (
    RECORD
    + r"""
echo "${JAX_LOCAL_DEVICE_IDS:-none}" >>"$CALLS.devices"
ends=($ENDS)
if [ "$SLURM_PROCID" = 0 ]; then until [ -s "$STATUSES" ]; do sleep 0.01; done; fi
exit "${ends[$SLURM_PROCID]}"
"""
)
KUBECTL = RECORD + 'cat >"$CALLS.yaml"\n'
RUN = ("--config=quickstart", "--workdir=runs/a")
SLURM = ("--nodes=2", "--gpus=4", *RUN)
GPUS = ("--name=towers", "--image=host/image:1", "--claim=disk", "--nodes=2", "--gpus=8", *RUN)
BUCKET = (*GPUS[:2], "--bucket=shop", "--service-account=trainer", *GPUS[3:])
XPK = ("--name=towers", "--cluster=pods", "--tpu-type=v5p-64", "--image=host/image:1")
XPK += ("--config=quickstart", "--workdir=/mnt/runs/a")
TPUS = (*GPUS[:4], "--tpus=4", "--tpu-type=tpu-v6e-slice", "--tpu-topology=2x4", *RUN)


@pytest.fixture
def launcher(tmp_path):
    found = Launcher(tmp_path)
    for name in ("sbatch", "scontrol"):
        found.stand_in(name, RECORD)
    found.stand_in("srun", SRUN)
    found.stand_in("kubectl", KUBECTL)
    return found


def test_slurm_gets_a_job_of_one_process_a_node_with_all_of_its_gpus(launcher):
    flags, job = submit_to_slurm(launcher, *SLURM, "--partition=a b", "--", *AWKWARD)
    assert {"--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=4", "--requeue"} <= set(flags)
    assert f"--chdir={launcher.tree}" in flags and "--partition=a b" in flags
    assert job[1:] == ["4", ".venv/bin/python", *RUN, *AWKWARD]
    flags, job = submit_to_slurm(launcher, *SLURM[:1], "--gpus=0", "--python=python3", *RUN)
    assert not any("gpus" in flag for flag in flags)
    assert job[1:] == ["0", "python3", *RUN]


def test_a_dry_run_submits_nothing_and_prints_what_it_would(launcher):
    printed = launcher.run("experiments/launch/slurm.sh", *SLURM, "--dry-run", "--", *AWKWARD)
    assert launcher.calls() == []
    flags, job = submit_to_slurm(launcher, *SLURM, "--", *AWKWARD)
    assert shlex.split(printed.stdout) == ["sbatch", *flags, *job]
    dry = launcher.run("experiments/launch/jobset.sh", *GPUS, "--dry-run", "--", *AWKWARD)
    assert launcher.calls() == []
    _, manifest = submitted(launcher, *GPUS, "--", *AWKWARD)
    assert yaml.safe_load(dry.stdout) == manifest


@pytest.mark.parametrize(
    "ends, status, again",
    [
        ("0 0", 0, False),
        ("75 137", 137, False),
        ("134 1", 1, False),
        ("134 78", 78, False),
        ("134 75", 75, True),
        ("75 134", 134, True),
    ],
)
def test_the_first_process_to_end_decides_what_slurm_does(launcher, ends, status, again):
    launcher.stand_in("python", ENDING)
    _, job = submit_to_slurm(launcher, "--nodes=2", "--gpus=4", "--python=python", *RUN)
    slurm = {"SLURM_JOB_ID": "77", "SLURM_NNODES": "2", "ENDS": ends}
    result = launcher.run(*job, **slurm)
    assert result.returncode == status
    calls = launcher.calls()
    train = ["python", "-m", "experiments.train", "--distributed", *RUN]
    assert sum(call == train for call in calls) == 2
    assert (["scontrol", "requeue", "77"] in calls) == again
    devices = launcher.calls_file.with_name("calls.devices").read_text()
    assert devices.split() == ["0,1,2,3"] * 2
    assert not list(launcher.tree.glob("*.statuses"))


def test_a_job_whose_time_is_over_goes_back_into_the_queue(launcher):
    launcher.stand_in("python", RECORD + ': >"$CALLS.started"\nsleep 60\n')
    _, job = submit_to_slurm(launcher, "--nodes=1", "--gpus=0", "--python=python", *RUN)
    env = {
        "PATH": str(launcher.bin),
        "CALLS": str(launcher.calls_file),
        "SLURM_JOB_ID": "77",
        "SLURM_NNODES": "1",
    }
    command = ["bash", *job]
    with subprocess.Popen(command, cwd=launcher.tree, env=env, start_new_session=True) as process:
        started = launcher.calls_file.with_name("calls.started")
        while not started.exists():
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGUSR1)
        assert process.wait(30) == 75
        # As Slurm does with what is left of the job.
        os.killpg(process.pid, signal.SIGKILL)
    assert launcher.calls()[-1] == ["scontrol", "requeue", "77"]


def submitted(launcher, *args):
    """Submits to Kubernetes, and returns the flags of kubectl and the manifest."""
    result = launcher.run("experiments/launch/jobset.sh", *args)
    assert result.returncode == 0, result.stderr
    ((_, *flags),) = launcher.calls()
    return flags, yaml.safe_load(launcher.calls_file.with_name("calls.yaml").read_text())


def container(manifest):
    job = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
    return job, job["template"]["spec"]["containers"][0]


@pytest.mark.parametrize("args", [GPUS, TPUS, BUCKET], ids=["gpus", "tpus", "bucket"])
def test_the_manifest_fits_the_schema_of_a_jobset(launcher, args):
    flags, manifest = submitted(launcher, *args, "--namespace=n", "--", *AWKWARD)
    assert flags == ["create", "--filename=-", "--namespace=n"]
    schema = yaml.safe_load((ROOT / "tests" / "jobset_schema.yaml").read_text())
    assert mistakes(manifest, schema) == []
    # The check does see mistakes.
    manifest["spec"]["failurePolicy"]["rules"][0]["action"] = "Restart"
    manifest["spec"]["replicatedJobs"][0]["templates"] = {}
    assert len(mistakes(manifest, schema)) == 2


def test_every_gpu_machine_gets_the_command_with_its_own_number(launcher):
    _, manifest = submitted(launcher, *GPUS, "--", *AWKWARD)
    job, train = container(manifest)
    assert (job["completions"], job["parallelism"]) == (2, 2)
    assert train["image"] == "host/image:1"
    assert train["resources"] == {"limits": {"nvidia.com/gpu": 8}}
    start = ["python", "-m", "experiments.train", *RUN, "--distributed"]
    cluster = ["--coordinator=towers-train-0-0.towers:8476", "--processes=2"]
    end = ["--process=$(JOB_COMPLETION_INDEX)"]
    assert train["command"] == [*start, *cluster, *AWKWARD, *end]
    # Kubernetes would expand a name in brackets, and writes two signs as one.
    _, manifest = submitted(launcher, *GPUS, "--", "--x=$(HOME)")
    assert container(manifest)[1]["command"][-2] == "--x=$$(HOME)"


def test_a_slice_of_tpus_numbers_its_machines_itself(launcher):
    _, manifest = submitted(launcher, *TPUS)
    job, train = container(manifest)
    assert train["command"] == ["python", "-m", "experiments.train", *RUN, "--distributed"]
    assert train["resources"] == {"limits": {"google.com/tpu": 4}}
    assert job["template"]["spec"]["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v6e-slice",
        "cloud.google.com/gke-tpu-topology": "2x4",
    }


def test_a_bucket_is_mounted_where_a_claim_would_be(launcher):
    _, manifest = submitted(launcher, *BUCKET)
    pod = container(manifest)[0]["template"]
    (volume,) = pod["spec"]["volumes"]
    assert volume["csi"]["driver"] == "gcsfuse.csi.storage.gke.io"
    assert volume["csi"]["volumeAttributes"]["bucketName"] == "shop"
    # Checkpoints are renamed when they are whole.
    assert "rename-dir-limit=" in volume["csi"]["volumeAttributes"]["mountOptions"]
    assert pod["metadata"]["annotations"] == {"gke-gcsfuse/volumes": "true"}
    assert pod["spec"]["serviceAccountName"] == "trainer"
    _, manifest = submitted(launcher, *GPUS)
    (volume,) = container(manifest)[0]["template"]["spec"]["volumes"]
    assert volume == {"name": "runs", "persistentVolumeClaim": {"claimName": "disk"}}


def test_xpk_gets_a_workload_whose_workers_start_again_where_that_helps(launcher):
    launcher.stand_in("xpk", RECORD)
    flags = ("--num-slices=2", "--zone=us-east5-a")
    args = (*XPK, *flags, "--", *AWKWARD)
    assert launcher.run("experiments/launch/xpk.sh", *args).returncode == 0
    ((_, *call),) = launcher.calls()
    assert call[:2] == ["workload", "create"] and set(flags) <= set(call)
    assert {"--workload=towers", "--tpu-type=v5p-64", "--docker-image=host/image:1"} <= set(call)
    # 134 is among those that xpk starts again by itself; 78 is not.
    assert "--restart-on-exit-codes=75" in call and "--max-restarts=10" in call
    (command,) = [arg.partition("=")[2] for arg in call if arg.startswith("--command=")]
    start = ["python", "-m", "experiments.train", *XPK[4:], "--distributed"]
    assert shlex.split(command) == [*start, *AWKWARD]
    printed = launcher.run("experiments/launch/xpk.sh", *args[:-3], "--dry-run", *args[-3:])
    assert shlex.split(printed.stdout)[1:] == call and launcher.calls() == []


def controller_action(manifest, code, *, evicted=False):
    """What Kubernetes and the JobSet controller do when a pod has failed, by their documentation:
    the first rule that fits decides."""
    job, _ = container(manifest)
    reason = "BackoffLimitExceeded"
    message = "Job has reached the specified backoff limit"
    pod = "default/towers-train-0-1"
    for number, rule in enumerate(job["podFailurePolicy"]["rules"]):
        end = f"matching FailJob rule at index {number}"
        if evicted and "onPodConditions" in rule:
            message = f"Pod {pod} has condition DisruptionTarget {end}"
        elif code in rule.get("onExitCodes", {}).get("values", []):
            message = f"Container train for pod {pod} failed with exit code {code} {end}"
        else:
            continue
        reason = "PodFailurePolicy"
        break
    for rule in manifest["spec"]["failurePolicy"]["rules"]:
        patterns = rule.get("onJobFailureMessagePatterns", [""])
        fits = any(re.search(pattern, message) for pattern in patterns)
        if reason in rule["onJobFailureReasons"] and fits:
            return rule["action"]
    return "RestartJobSet"


@pytest.mark.parametrize("args", [GPUS, TPUS], ids=["gpus", "tpus"])
def test_exit_statuses_tell_a_jobset_what_to_do(launcher, args):
    _, manifest = submitted(launcher, *args)
    for code in (75, 134):
        assert controller_action(manifest, code) == "RestartJobSetAndIgnoreMaxRestarts"
    assert controller_action(manifest, 143, evicted=True) == "RestartJobSetAndIgnoreMaxRestarts"
    assert controller_action(manifest, 78) == "FailJobSet"
    # Counted, up to maxRestarts.
    assert [controller_action(manifest, code) for code in (1, 137, 178)] == ["RestartJobSet"] * 3


@pytest.mark.parametrize(
    "script, args, words",
    [
        ("slurm.sh", SLURM[1:], "--nodes is missing"),
        ("slurm.sh", ("--nodes=two", *SLURM[1:]), "--nodes=two must be a whole number"),
        ("slurm.sh", (*SLURM, "stray"), "'stray' is no flag"),
        ("jobset.sh", GPUS[1:], "--name is missing"),
        ("jobset.sh", (*GPUS[:4], *RUN), "one of --gpus and --tpus must be given"),
        ("jobset.sh", (*GPUS, "--bucket=b"), "one of --claim and --bucket must be given"),
        ("xpk.sh", XPK[1:], "--name is missing"),
        ("xpk.sh", (*XPK, "--workdir=runs/a"), "--workdir=runs/a must be an absolute path"),
        ("jobset.sh", (*GPUS, "--tpus=4"), "one of --gpus and --tpus must be given"),
        ("jobset.sh", (*GPUS[:4], "--tpus=4", *RUN), "--tpu-type is missing"),
        ("jobset.sh", (*GPUS, "--workdir=/mnt/run"), "--workdir=/mnt/run must be under runs/"),
    ],
)
def test_a_wrong_command_line_is_refused_and_submits_nothing(launcher, script, args, words):
    result = launcher.run(f"experiments/launch/{script}", *args)
    assert result.returncode == 1 and words in result.stderr
    assert launcher.calls() == []


@pytest.mark.parametrize(
    "script, args, tool",
    [("slurm.sh", SLURM, "sbatch"), ("jobset.sh", GPUS, "kubectl"), ("xpk.sh", XPK, "xpk")],
)
def test_without_the_scheduler_only_a_dry_run_works(launcher, script, args, tool):
    (launcher.bin / tool).unlink(missing_ok=True)
    result = launcher.run(f"experiments/launch/{script}", *args)
    assert result.returncode == 1 and f"{tool} is not on the PATH" in result.stderr
    assert launcher.run(f"experiments/launch/{script}", *args, "--dry-run").returncode == 0


@pytest.mark.parametrize("script", ["slurm.sh", "jobset.sh", "xpk.sh"])
def test_help_names_every_flag_of_its_own(launcher, script):
    text = (ROOT / "experiments" / "launch" / script).read_text()
    names = re.search(r'^parse "(.*?)"', text, re.MULTILINE)[1].split()
    shown = launcher.run(f"experiments/launch/{script}", "--help").stdout
    missing = [name for name in (*names, "config", "dry-run") if f"  --{name} " not in shown]
    assert missing == []


def test_the_image_holds_what_a_training_needs_and_runs_as_no_root():
    lines = (ROOT / "experiments" / "launch" / "Dockerfile").read_text().splitlines()
    words = [line.split() for line in lines if line and not line.startswith("#")]
    copied = [name for line in words if line[0] == "COPY" for name in line[1:-1]]
    assert {"setup.py", "twotower", "experiments"} <= set(copied)
    assert all((ROOT / name).exists() for name in copied)
    instructions = [line[0] for line in words]
    assert instructions.index("USER") < instructions.index("CMD")
    assert ["USER", "twotower"] in words and ["ARG", 'EXTRAS=""'] in words


@pytest.mark.parametrize("extras, project", [("", "."), ("cuda", ".[cuda]")])
def test_the_image_installs_the_extras_that_are_asked_for(launcher, extras, project):
    text = (ROOT / "experiments" / "launch" / "Dockerfile").read_text()
    install = re.search(r"^RUN (pip .*)$", text, re.MULTILINE)[1]
    launcher.stand_in("pip", RECORD)
    env = {"PATH": str(launcher.bin), "CALLS": str(launcher.calls_file), "EXTRAS": extras}
    # As Docker runs it: by the shell, with the build arguments in the environment.
    subprocess.run(["/bin/sh", "-c", install], env=env, check=True)
    assert launcher.calls()[0][-2:] == ["--editable", project]
