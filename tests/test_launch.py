"""The launchers against stand-ins: a gcloud and Pythons that record how they were called and run
nothing."""

import shlex
import subprocess
import tarfile
from pathlib import Path

import pytest

from tests.extras import extra, program
from tests.launchers import AWKWARD, Launcher

GCLOUD = r"""#!/bin/bash
printf '%s\0' "$@" $'\1' >>"$CALLS"
command=$4
if [ "$command" = "${FAILS:-}" ]; then echo "quota exceeded" >&2; exit 7; fi
if [ "$command" = scp ]; then cp "$5" "$CALLS.tar.gz"; fi
if [ "$command" = describe ]; then
  if [ -z "${STATE:-}" ]; then echo "ERROR: NOT_FOUND: no such node" >&2; exit 1; fi
  echo "$STATE"
fi
"""
# Beside it, queued resources that take three looks to be given.
QUEUED = GCLOUD.replace(
    "command=$4\n",
    """command=$4
if [ "$3" = queued-resources ]; then
  if [ "$4" = describe ]; then echo x >>"$CALLS.looks"; set -- $(wc -l <"$CALLS.looks")
    [ "$1" -lt 3 ] && echo WAITING_FOR_RESOURCES || echo "${QUEUE:-ACTIVE}"
  fi
  exit
fi
""",
)

# A Python that is suitable if VERSIONS names it; `-m venv` makes an environment of the same
# stand-in.
PYTHON = r"""#!/bin/bash
name=$(basename "$0")
case $1 in
  -c)
    case " $VERSIONS .venv " in *" $name "*) exit 0 ;; esac
    [ "$0" = .venv/bin/python ] && exit 0
    exit 1
    ;;
  --version) echo "Python of $name"; exit 0 ;;
esac
if [ "$2 $3" = "pip --version" ]; then exit 0; fi
printf '%s\0' "$name" "$@" $'\1' >>"$CALLS"
printf '%s %s\n' "${GLIBC_TUNABLES:-}" "${TWOTOWER_DATA:-}" >>"$CALLS.env"
if [ "$2" = venv ]; then mkdir -p "${@: -1}/bin" && cp "$0" "${@: -1}/bin/python"; fi
if [ -n "${FAILS:-}" ] && [ "$2" = "$FAILS" ]; then exit 7; fi
"""


# launch_tpu.sh


@pytest.fixture
def tpu(tmp_path) -> Launcher:
    launcher = Launcher(tmp_path)
    launcher.stand_in("gcloud", GCLOUD)
    subprocess.run(["git", "init", "--quiet", str(launcher.tree)], check=True)
    (launcher.tree / ".gitignore").write_text("runs/\n")
    (launcher.tree / "runs").mkdir()
    (launcher.tree / "runs" / "big").write_text("x")
    return launcher


NEEDED = (
    "--name=my tpu",
    "--zone=z",
    "--config=experiments/configs/quickstart.py",
    "--workdir=gs://b/a folder",
)
CREATE = ("--type=v4-16", "--version=base")


def verbs(calls: list[list[str]]) -> list[str]:
    assert all(call[:3] == ["compute", "tpus", "tpu-vm"] and "--zone=z" in call for call in calls)
    return [call[3] for call in calls]


def test_a_tpu_that_is_not_there_is_created_with_what_was_asked(tpu):
    result = tpu.run("launch_tpu.sh", *NEEDED, *CREATE, "--spot", "--project=p q")
    calls = tpu.calls()
    assert result.returncode == 0, result.stderr
    assert verbs(calls) == ["describe", "create", "scp", "ssh", "ssh"]
    assert set(calls[1][4:]) == {
        "my tpu",
        "--accelerator-type=v4-16",
        "--version=base",
        "--spot",
        "--zone=z",
        "--project=p q",
    }
    assert all("--project=p q" in call for call in calls)


@pytest.mark.parametrize(
    "state, expected",
    [
        ("READY", []),
        ("STOPPED", ["start"]),
        ("PREEMPTED", ["delete", "create"]),
        ("TERMINATED", ["delete", "create"]),
    ],
)
def test_a_tpu_that_is_there_is_reused_started_or_replaced(tpu, state, expected):
    result = tpu.run("launch_tpu.sh", *NEEDED, *CREATE, STATE=state)
    assert result.returncode == 0, result.stderr
    assert verbs(tpu.calls()) == ["describe", *expected, "scp", "ssh", "ssh"]


def test_a_queued_resource_is_asked_for_and_waited_for(tpu):
    tpu.stand_in("gcloud", QUEUED)
    asked = (*NEEDED[:3], "--workdir=runs/a", *CREATE, "--queued", "--spot", "--wait=6h")
    result = tpu.run("launch_tpu.sh", *asked, QUEUE_SECONDS="0")
    assert result.returncode == 0, result.stderr
    calls = tpu.calls()
    assert [call[3] for call in calls[:2]] == ["describe", "create"]
    assert calls[1][2] == "queued-resources"
    assert {"--node-id=my tpu", "--runtime-version=base", "--spot"} <= set(calls[1])
    assert "--valid-until-duration=6h" in calls[1]
    assert [call[3] for call in calls[2:5]] == ["describe"] * 3
    assert verbs(calls[5:]) == ["scp", "ssh", "ssh"]
    # One that was taken away goes with its request, and one that is refused ends the launch.
    result = tpu.run("launch_tpu.sh", *asked, STATE="PREEMPTED", QUEUE="FAILED", QUEUE_SECONDS="0")
    assert result.returncode == 1 and "is in state FAILED" in result.stderr
    assert [call[3] for call in tpu.calls()[1:3]] == ["delete", "create"]


def test_a_bucket_is_mounted_on_every_worker_before_it_trains(tpu):
    asked = (*NEEDED[:3], "--workdir=runs/a", "--bucket=a b")
    assert tpu.run("launch_tpu.sh", *asked, STATE="READY").returncode == 0
    *_, mount, train = tpu.calls()
    assert "--worker=all" in mount and "--workdir=runs/a" in " ".join(train)
    (command,) = [arg for arg in mount if arg.startswith("--command=")]
    assert "gcsfuse --implicit-dirs --rename-dir-limit=100000 'a b' twotower/runs" in command
    syntax = ["bash", "-n", "-c", command.removeprefix("--command=")]
    assert subprocess.run(syntax).returncode == 0


def test_every_worker_gets_the_tree_the_installation_and_the_command(tpu):
    assert tpu.run("launch_tpu.sh", *NEEDED, STATE="READY").returncode == 0
    *_, copy, install, train = tpu.calls()
    assert all("--worker=all" in call for call in (copy, install, train))
    assert copy[5] == "my tpu:twotower.tar.gz"
    assert "launch_local.sh install" in install[-2] and "tpu" in install[-2]
    with tarfile.open(f"{tpu.calls_file}.tar.gz") as tar:
        names = tar.getnames()
    assert (
        "launch_local.sh" in names
        and "setup.py" in names
        and not any("runs" in name or ".git/" in name for name in names)
    )


def test_the_workers_of_a_slice_train_one_run_and_are_told_to_share_its_folder(tpu):
    assert tpu.run("launch_tpu.sh", *NEEDED, "--", "--nodistributed", STATE="READY").returncode == 0
    train = tpu.calls()[-1]
    assert (
        "--worker=all" in train
    )  # each of them runs the same command and learns from the TPU which one it is
    command = shlex.split(
        next(arg for arg in train if arg.startswith("--command=")).removeprefix("--command=")
    )
    assert command.index("--distributed") < command.index("--nodistributed")  # the last one counts
    text = " ".join(tpu.run("launch_tpu.sh", "--help").stdout.split())
    assert "All of them must see the folder of the run" in text and "bucket or an NFS share" in text


def test_flags_reach_the_remote_program_as_they_were_given(tpu):
    assert tpu.run("launch_tpu.sh", *NEEDED, "--", *AWKWARD, STATE="READY").returncode == 0
    command = next(arg for arg in tpu.calls()[-1] if arg.startswith("--command=")).removeprefix(
        "--command="
    )
    assert command.startswith("cd twotower && ")
    program = [".venv/bin/python", "-m", "experiments.train"]
    expected = ["cd", "twotower", "&&", *program, *NEEDED[2:], "--distributed", *AWKWARD]
    assert shlex.split(command) == expected
    shown = subprocess.run(
        ["bash", "-c", command.replace("cd twotower && .venv/bin/python", "printf '%s\\0'")],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert shown.split("\0")[:-1] == expected[4:]


def test_values_may_be_given_after_a_space(tpu):
    args = [word for flag in NEEDED for word in flag.split("=", 1)]
    assert tpu.run("launch_tpu.sh", *args, STATE="READY").returncode == 0
    by_space = tpu.calls()
    assert tpu.run("launch_tpu.sh", *NEEDED, STATE="READY").returncode == 0
    assert by_space[-1] == tpu.calls()[-1]


def test_a_dry_run_prints_each_command_as_a_shell_reads_it_and_runs_none(tpu):
    dry = tpu.run("launch_tpu.sh", *NEEDED, *CREATE, "--dry-run", "--", *AWKWARD)
    assert dry.returncode == 0 and tpu.calls() == []
    printed = [
        shlex.split(line)[1:] for line in dry.stdout.splitlines() if not line.startswith("#")
    ]
    assert tpu.run("launch_tpu.sh", *NEEDED, *CREATE, "--", *AWKWARD).returncode == 0

    def without_archive(calls):
        return [[arg for arg in call if "/twotower.tar.gz" not in arg] for call in calls]

    assert without_archive(printed) == without_archive(tpu.calls())


def test_a_dry_run_needs_no_gcloud(tpu):
    (tpu.bin / "gcloud").unlink()
    assert tpu.run("launch_tpu.sh", *NEEDED, "--dry-run").returncode == 0
    result = tpu.run("launch_tpu.sh", *NEEDED)
    assert result.returncode == 1 and "gcloud is not on the PATH" in result.stderr


@pytest.mark.parametrize("command", ["describe", "create", "scp", "ssh"])
def test_a_failure_of_gcloud_ends_the_launch_and_is_shown(tpu, command):
    result = tpu.run("launch_tpu.sh", *NEEDED, *CREATE, FAILS=command)
    assert result.returncode != 0 and "quota exceeded" in result.stderr
    called = verbs(tpu.calls())
    assert called[-1] == command and called.count(command) == 1


def test_a_commit_can_be_run_instead_of_the_tree(tpu):
    git = ["git", "-C", str(tpu.tree), "-c", "user.name=n", "-c", "user.email=e"]
    for command in (["add", "setup.py", "launch_local.sh"], ["commit", "--quiet", "-m", "why"]):
        subprocess.run([*git, *command], check=True)
    assert tpu.run("launch_tpu.sh", *NEEDED, "--ref=HEAD", STATE="READY").returncode == 0
    with tarfile.open(f"{tpu.calls_file}.tar.gz") as tar:
        assert sorted(tar.getnames()) == ["launch_local.sh", "setup.py"]
    result = tpu.run("launch_tpu.sh", *NEEDED, "--ref=nowhere", STATE="READY")
    assert result.returncode != 0 and "nowhere" in result.stderr


@pytest.mark.parametrize(
    "args, words",
    [
        (NEEDED[1:], "--name is missing"),
        ((NEEDED[0], *NEEDED[2:]), "--zone is missing"),
        (NEEDED[:2], "--config is missing"),
        (NEEDED[:3], "--workdir is missing"),
        (NEEDED, "--type is missing"),
        ((*NEEDED, "--type=v4-8"), "--version is missing"),
        ((*NEEDED, "--zome=z"), "unknown flag '--zome=z'"),
        ((*NEEDED, "--type"), "--type needs a value"),
        ((*NEEDED, "--bucket=b"), "--bucket=b is mounted at runs/"),
        ((*NEEDED, "--wait=6h"), "--wait=6h needs --queued"),
        (
            (*NEEDED[:2], "--config=configs/none.py", NEEDED[3]),
            "configs/none.py: there is no such file",
        ),
    ],
)
def test_a_wrong_command_line_says_what_is_missing_and_changes_nothing(tpu, args, words):
    result = tpu.run("launch_tpu.sh", *args)
    assert result.returncode == 1 and words in result.stderr
    assert set(verbs(tpu.calls())) <= {"describe"}


def test_help_names_every_flag(tpu):
    text = tpu.run("launch_tpu.sh", "--help").stdout
    flags = (
        "name",
        "zone",
        "type",
        "version",
        "project",
        "spot",
        "queued",
        "wait",
        "bucket",
        "config",
        "workdir",
        "ref",
        "dry-run",
    )
    assert all(f"--{flag} " in text for flag in flags)


# launch_local.sh


@pytest.fixture
def local(tmp_path) -> Launcher:
    launcher = Launcher(tmp_path)
    for name in ("python3", "python3.11", "python3.12", "python3.13"):
        launcher.stand_in(name, PYTHON)
    return launcher


@pytest.mark.parametrize(
    "versions, chosen",
    [
        ("python3.11 python3.12 python3.13 python3", "python3.13"),
        ("python3.11 python3", "python3.11"),
        ("python3", "python3"),
    ],
)
def test_the_first_python_that_works_is_taken(local, versions, chosen):
    assert local.run("launch_local.sh", "python", VERSIONS=versions).stdout.strip() == chosen


def test_a_python_can_be_named_and_is_checked(local):
    versions = "python3.11 python3.13"
    assert (
        local.run(
            "launch_local.sh", "python", VERSIONS=versions, PYTHON="python3.11"
        ).stdout.strip()
        == "python3.11"
    )
    result = local.run("launch_local.sh", "python", VERSIONS=versions, PYTHON="python3.12")
    assert result.returncode == 1 and "PYTHON=python3.12" in result.stderr


def test_no_suitable_python_is_an_error_that_says_what_to_do(local):
    result = local.run("launch_local.sh", "test", VERSIONS="")
    assert (
        result.returncode == 1 and "3.11 or later" in result.stderr and "PYTHON=" in result.stderr
    )
    assert local.calls() == [] and not (local.tree / ".venv").exists()


def install(extras: str) -> list[str]:
    return ["python", "-m", "pip", "install", "--quiet", "--editable", extras]


MAKE = ["python3.13", "-m", "venv", "--clear", ".venv"]


def test_the_environment_is_made_once_and_reused_until_setup_py_changes(local):
    def run(*args: str) -> list[list[str]]:
        assert local.run("launch_local.sh", *args, VERSIONS="python3.13").returncode == 0
        return [call for call in local.calls() if call[2] in ("venv", "pip")]

    assert run("install") == [MAKE, install(".")]
    assert run("install") == []
    assert run("test") == [install(".[dev]")]
    assert run("test") == run("install") == []
    # The quick start draws a report.
    assert run() == [install(".[plots,serve]")]
    assert run() == []
    with open(local.tree / "setup.py", "a") as file:
        file.write("# another dependency\n")
    assert run("test") == [install(".[dev]")]
    assert run("test") == []
    local.tree = local.tree.rename(local.tree.with_name("moved"))
    assert run("install") == [install(".")]


def test_an_installation_that_failed_or_broke_is_done_again(local):
    result = local.run("launch_local.sh", "install", VERSIONS="python3.13", FAILS="pip")
    assert result.returncode == 7
    local.calls()
    assert local.run("launch_local.sh", "install", VERSIONS="python3.13").returncode == 0
    assert local.calls() == [install(".")]
    setup = (local.tree / "setup.py").read_text()
    (local.tree / "setup.py").write_text(setup + "# another dependency")
    assert (
        local.run("launch_local.sh", "install", VERSIONS="python3.13", FAILS="pip").returncode == 7
    )
    (local.tree / "setup.py").write_text(setup)  # and now half of the other one may be installed
    assert local.run("launch_local.sh", "install", VERSIONS="python3.13").returncode == 0
    assert local.calls() == [install(".")] * 2
    (local.tree / ".venv/bin/python").unlink()  # its interpreter was removed
    assert local.run("launch_local.sh", "install", VERSIONS="python3.13").returncode == 0
    assert local.calls() == [MAKE, install(".")]


def test_extras_are_installed_beside_those_of_the_tests(local):
    assert (
        local.run("launch_local.sh", "install", VERSIONS="python3.13", EXTRAS="tpu").returncode == 0
    )
    assert local.calls() == [MAKE, install(".[tpu]")]
    assert local.run("launch_local.sh", "test", VERSIONS="python3.13", EXTRAS="tpu").returncode == 0
    assert local.calls()[0] == install(".[tpu,dev]")


def test_the_tests_run_with_further_arguments_tuned_malloc_and_their_own_status(local, tmp_path):
    assert (
        local.run(
            "launch_local.sh", "test", "-k", "a b", cwd=tmp_path, VERSIONS="python3.13"
        ).returncode
        == 0
    )
    assert (local.tree / ".venv").exists() and not (tmp_path / ".venv").exists()
    suite = ["python", "-m", "pytest", "-n", "2", "--dist", "loadfile", "--no-loadscope-reorder"]
    assert local.calls()[-1] == [*suite, "-k", "a b"]
    quick = local.run("launch_local.sh", "test", "--quick", "-x", VERSIONS="python3.13")
    assert quick.returncode == 0
    assert local.calls()[-1] == [*suite, "-m", "not slow", "-x"]
    local.run("launch_local.sh", "test", VERSIONS="python3.13")
    assert (
        Path(f"{local.calls_file}.env").read_text().splitlines()[-1].split()[0]
        == "glibc.malloc.hugetlb=1"
    )
    assert (
        local.run("launch_local.sh", "test", VERSIONS="python3.13", FAILS="pytest").returncode == 7
    )


@pytest.mark.parametrize(
    "data, config, workdir",
    [
        ("", "quickstart", "runs/quickstart"),
        ("movielens", "movielens_small", "runs/movielens"),
    ],
)
def test_the_quick_start_trains_exports_evaluates_and_queries_one_folder(
    local, tmp_path, data, config, workdir
):
    result = local.run(
        "launch_local.sh",
        "--config.training.steps=5",
        cwd=tmp_path,
        VERSIONS="python3.13",
        DATA=data,
    )
    assert result.returncode == 0, result.stderr
    at = f"--workdir={workdir}"
    assert [call[2:] for call in local.calls()[2:]] == [
        [
            "experiments.train",
            f"--config=experiments/configs/{config}.py",
            at,
            "--config.training.steps=5",
        ],
        ["experiments.export", at],
        ["experiments.evaluate", at, "--baselines", "--report"],
        ["experiments.query", at, "--user=42", "--k=10"],
    ]


def test_a_stage_that_fails_ends_the_quick_start(local):
    assert (
        local.run("launch_local.sh", VERSIONS="python3.13", FAILS="experiments.export").returncode
        == 7
    )
    assert local.calls()[-1][2] == "experiments.export"


@pytest.mark.parametrize(
    "args, env, words",
    [
        (["tset"], {}, "unknown command 'tset'"),
        ([], {"DATA": "movielenz"}, "DATA=movielenz is not known"),
    ],
)
def test_a_wrong_command_is_refused_before_anything_is_installed(local, args, env, words):
    result = local.run("launch_local.sh", *args, VERSIONS="python3.13", **env)
    assert result.returncode == 1 and words in result.stderr and local.calls() == []


def test_continuous_integration_runs_the_tests_on_the_data_beside_the_project(local):
    def run() -> str:
        assert local.run(".ci/run", cwd=local.bin, VERSIONS="python3.13").returncode == 0
        assert local.calls()[-1][:5] == ["python", "-m", "pytest", "-n", "2"]
        return Path(f"{local.calls_file}.env").read_text().splitlines()[-1].partition(" ")[2]

    assert run() == ""
    data = local.tree.parent / "shared" / "data"
    data.mkdir(parents=True)
    assert run() == str(data)
    assert local.run(".ci/run", VERSIONS="python3.13", FAILS="pytest").returncode == 7


APT = """#!/bin/bash
echo "$@" >>"$CALLS.apt"
if [ -n "${NO_APT:-}" ]; then exit 100; fi
"""


def test_continuous_integration_skips_no_extra_and_installs_programs_that_are_missing(local):
    for command in ("apt-get", "sudo"):
        local.stand_in(command, APT if command == "apt-get" else '#!/bin/bash\nshift\nexec "$@"\n')
    apt = Path(f"{local.calls_file}.apt")
    for env in ({}, {"NO_APT": "1"}):
        result = local.run(".ci/run", VERSIONS="python3.13", **env)
        assert result.returncode == 0 and ("its tests will fail" in result.stderr) == bool(env)
    assert apt.read_text().splitlines() == [
        "update -qq",
        "install -y -qq redis-server chromium",
        "update -qq",
    ]
    calls = local.calls()
    everything = install(".[bigquery,mlflow,plots,redis,serve,stream,text,dev]")
    assert everything in calls
    # Style and types before the tests; those of the newest Python before the long ones. Its
    # installation runs beside the checks.
    later = calls[calls.index(everything) + 1 :]
    checks = [tuple(call[2:5]) for call in later if call[2] in ("ruff", "pyright", "pytest")]
    assert checks[:3] == [("ruff", "format", "--check"), ("ruff", "check", "."), ("pyright",)]
    suites = [call for call in calls if call[2] == "pytest"]
    assert calls.index(install(".[beam,dev]")) < calls.index(suites[0])
    assert ["not slow" in suite for suite in suites[:2]] == [True, False]
    apt.unlink()
    for name in ("redis-server", "chromium"):
        local.stand_in(name, "#!/bin/bash\n")
    assert local.run(".ci/run", VERSIONS="python3.13").returncode == 0 and not apt.exists()


@pytest.mark.parametrize(
    "complete, outcome", [("", pytest.skip.Exception), ("1", pytest.fail.Exception)]
)
def test_a_test_of_what_is_missing_is_skipped_but_fails_in_continuous_integration(
    monkeypatch, complete, outcome
):
    monkeypatch.setenv("TWOTOWER_COMPLETE", complete)
    with pytest.raises(
        outcome, match="nowhere is not installed: EXTRAS=redis bash launch_local.sh test"
    ):
        extra("nowhere", "redis")
    with pytest.raises(outcome, match="no-such-server is not installed: apt-get install it"):
        program("no-such-server", "it")
