r"""Trains an experiment, or goes on with it, on all devices of this machine or of several.

    twotower train --config=quickstart --workdir=runs/quickstart [--config.training.steps=500]

    twotower train --config=my_log --workdir=runs/mine --dry_run

    twotower train --workdir=runs/quickstart --refit [--on_top]

    twotower train --config=quickstart --experiment_name=shop --run_name=a

A run keeps its configuration and its data: without --config it goes on as it was begun. --refit
then trains on all of its rows, the held-out ones too, for as many passes, into WORKDIR/refit: the
model to export.

--experiment_name logs to MLflow while it trains, by default to sqlite:///mlflow.db; the folder is
then runs/EXPERIMENT/RUN where no --workdir is given. A server that is away costs one warning, and
what it missed follows. At its end such a training exports its bundle, measures the validation rows
and logs both, with a report where the extra plots is installed.

WORKDIR/heartbeat.json says where a training is and where its time goes; `twotower inspect WORKDIR`
shows it. --profile_steps=20-40 profiles these steps.

Several processes: the same command on every machine with a folder that all of them see, and
--distributed where the cluster numbers them (Cloud TPU, Slurm, Kubernetes); elsewhere
--coordinator=HOST:PORT --processes=N --process=0 … N-1.

The exit status tells a scheduler what to do. 75: start all processes again; the run goes on from
its last checkpoint. Another process has ended or has not come, another training holds the folder,
or SIGTERM asked for the end: then the run was saved at the step where it was. 134 (SIGABRT) is how
JAX itself ends a process whose others are lost: the same as 75. 78: a mistake in the configuration,
which would fail again. 130: interrupted. Anything else is an error of this process.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

from absl import flags

from twotower import dry_run
from twotower.commands import launch, mlflow_flags

FLAGS = flags.FlagValues()
_CONFIG = launch.define_config(FLAGS, required=False)
_WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "The folder of the run; by default runs/EXPERIMENT/RUN, where these are named.",
    flag_values=FLAGS,
)
_TRACKING = mlflow_flags.define_tracking(FLAGS)
_DEVICES = flags.DEFINE_integer(
    "devices", 0, "Devices to train on; 0: all.", lower_bound=0, flag_values=FLAGS
)
_DISTRIBUTED = flags.DEFINE_bool(
    "distributed",
    False,
    "Train in several processes, which the cluster numbers.",
    flag_values=FLAGS,
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator", "", "HOST:PORT of process 0, where no cluster numbers them.", flag_values=FLAGS
)
_PROCESSES = flags.DEFINE_integer(
    "processes", 0, "Number of processes, with --coordinator.", lower_bound=0, flag_values=FLAGS
)
_PROCESS = flags.DEFINE_integer(
    "process", -1, "Number of this process, from 0 on, with --coordinator.", flag_values=FLAGS
)
_INIT_TIMEOUT = flags.DEFINE_integer(
    "init_timeout",
    60,
    "Seconds to wait for the other processes at the start.",
    lower_bound=1,
    flag_values=FLAGS,
)
_HEARTBEAT_TIMEOUT = flags.DEFINE_integer(
    "heartbeat_timeout",
    20,
    "Seconds of silence after which another process counts as lost.",
    lower_bound=1,
    flag_values=FLAGS,
)
_DATA = flags.DEFINE_string(
    "data",
    None,
    "Folder of prepared data to share with other runs, written by the first; by default the run "
    "keeps its own.",
    flag_values=FLAGS,
)
_REFIT = flags.DEFINE_bool(
    "refit",
    False,
    "Then train on all rows, for as many passes as the best checkpoint took, into WORKDIR/refit.",
    flag_values=FLAGS,
)
_ON_TOP = flags.DEFINE_bool(
    "on_top", False, "Refit the best checkpoint, not fresh weights.", flag_values=FLAGS
)
_PROFILE_STEPS = flags.DEFINE_string(
    "profile_steps",
    "",
    "First and last step to profile, such as 20-40, into WORKDIR/profile.",
    flag_values=FLAGS,
)
_KIND = flags.DEFINE_string(
    "kind",
    "",
    "Kind of the devices whose peaks the training is compared with, as in `twotower plan`; by "
    "default what they are, if that is known.",
    flag_values=FLAGS,
)
_DRY_RUN = dry_run.define(FLAGS)


def find_workdir() -> str:
    """Returns the folder of the run that the flags name."""
    from twotower.core.errors import ConfigError

    if _WORKDIR.value is not None:
        return _WORKDIR.value
    experiment = _TRACKING.experiment_name.value
    name = _TRACKING.run_name.value
    # Both, as a run without a name of its own could meet the folder of another one.
    if experiment and name:
        return f"runs/{experiment}/{name}"
    raise ConfigError(
        "--workdir=... is required. In its place --experiment_name=... and --run_name=... together "
        "name the folder runs/EXPERIMENT/RUN."
    )


def main() -> None:
    from twotower import api
    from twotower.config import from_dict
    from twotower.core.errors import ConfigError
    from twotower.plugins import load_config
    from twotower.refitting import REFIT
    from twotower.training.monitoring.monitor import Monitoring
    from twotower.training.monitoring.profile import parse_steps
    from twotower.training.monitoring.rates import find_kind
    from twotower.training.processes import join

    # Before anything is read: the training alone would succeed, and the wish be forgotten.
    if _ON_TOP.value and not _REFIT.value:
        raise ConfigError("--on_top says how to refit: give --refit too.")
    find_kind("", _KIND.value)
    monitoring = Monitoring(kind=_KIND.value, profile_steps=parse_steps(_PROFILE_STEPS.value))
    workdir = find_workdir()
    # A run has its configuration: the command that began it, or a shorter one, takes it on.
    if _CONFIG.value is None:
        config = load_config(workdir)
    else:
        config = from_dict(_CONFIG.value)
    if _DRY_RUN.value:
        print(dry_run.describe_training(config, workdir, devices=_DEVICES.value))
        return
    # Until the training itself listens there is nothing to save.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(os.EX_TEMPFAIL))
    # Before JAX sees its devices: it could not join other processes afterwards.
    join(
        _COORDINATOR.value,
        _PROCESSES.value,
        _PROCESS.value,
        cluster=_DISTRIBUTED.value,
        init_timeout=_INIT_TIMEOUT.value,
        heartbeat_timeout=_HEARTBEAT_TIMEOUT.value,
    )
    # Without loading the run after it, which several processes would do at once for nothing.
    api.train_in_folder(
        config,
        workdir,
        devices=_DEVICES.value,
        data=_DATA.value,
        tracking=_TRACKING.destination(),
        conclude=True,
        monitoring=monitoring,
    )
    # In the same processes: they know each other already, and the devices are theirs.
    if _REFIT.value:
        api.refit_in_folder(workdir, on_top=_ON_TOP.value, devices=_DEVICES.value)
        workdir = f"{workdir}/{REFIT}"
    _print_next(workdir)


def _print_next(workdir: str) -> None:
    """Prints what somebody does next, once for all processes."""
    import jax

    from twotower.core.install import command
    from twotower.retrieval.bundle import BUNDLE

    if jax.process_index() != 0:
        return
    folder = f"--workdir={workdir}"
    lines = []
    # A training that is logged has exported its bundle itself, unless that was refused.
    if _TRACKING.destination() is None or not (Path(workdir) / BUNDLE).exists():
        lines.append(command("export", folder))
    # A refit has no rows left that it was not trained on.
    if not _REFIT.value:
        lines.append(command("evaluate", folder, "--baselines"))
    print("Next: " + "\n      ".join(lines))
