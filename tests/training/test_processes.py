"""Several processes of the operating system are one run: the same numbers, each with its own part
of the data."""

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from tests.launchers import RECORD, SRUN, Launcher, submit_to_slurm
from tests.training import shop, tiny_config
from tests.training.divided import differences
from tests.training.one_of_several import train_until
from twotower import api
from twotower.config import from_dict
from twotower.core.errors import ConfigError
from twotower.core.mesh import make_mesh
from twotower.pipeline.batches import Batches, InteractionExamples
from twotower.training.candidates import corpus_size
from twotower.training.init import abstract_state
from twotower.training.loop import open_checkpoints
from twotower.training.processes import check_devices, join
from twotower.training.run import load_run
from twotower.training.state import Trainer

pytestmark = pytest.mark.slow

# A Python whose compiled programs are kept.
PYTHON = [sys.executable, "-m", "tests.training.keep_programs"]
STEPS = 6
BATCH = 64
SECONDS = 240


def config_of():
    """Streamed, so that what each process loads is seen; with state of every kind to save."""
    return shop.small_config(
        features=shop.TINY_FEATURES,
        model={"user": {"layers": (8,), "dropout": 0.1}, "item": {"layers": (8,)}},
        objective={
            "negatives": {
                "queue": 128,
                "frequency": "gap",
                "mined": 2,
                "mined_ranks": (2, 8),
                "mined_refresh": 2,
            },
            "heads": {"shared": {"label": "shared", "combine": "multiply"}},
        },
        training={
            "batch_size": BATCH,
            "steps": STEPS,
            "validate_every": 2,
            "log_every": 1,
            "resident_megabytes": 0,
            "tables": {"kind": "adagrad", "initial_accumulator": 0.1},
            "optimizer": {"kind": "sgd"},
        },
    )


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def _environment(devices):
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "PYTHONPATH": os.getcwd(),
    }


class Group:
    """Processes started together; none outlives it."""

    def __init__(self, commands, environment):
        self._commands = commands
        self._environment = environment

    def __enter__(self):
        self.processes = []
        for command in self._commands:
            self.processes.append(
                subprocess.Popen(
                    command,
                    env=self._environment,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
        return self

    def __exit__(self, *exception):
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.communicate()

    def wait(self):
        """Their exit statuses and what they said, all of them within one time limit."""
        end = time.monotonic() + SECONDS
        said = [
            process.communicate(timeout=max(end - time.monotonic(), 1))[1]
            for process in self.processes
        ]
        return [process.returncode for process in self.processes], said


def _train_in_two(workdir, validations):
    """Trains in two processes of two devices until so many validations; their reports."""
    address = f"127.0.0.1:{_free_port()}"
    program = [*PYTHON, "-m", "tests.training.one_of_several", str(workdir)]
    commands = [[*program, str(validations), address, "2", str(i)] for i in range(2)]
    with Group(commands, _environment(2)) as group:
        statuses, said = group.wait()
    assert statuses == [0, 0], "\n".join(text[-3000:] for text in said)
    paths = [workdir.with_name(f"{workdir.name}.{i}.json") for i in range(2)]
    return [json.loads(path.read_text()) for path in paths]


def _lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def _losses(workdir):
    return np.array(
        [[x["loss"], x["grad_norm"], x["temperature"]] for x in _lines(workdir) if "loss" in x]
    )


def _state(workdir, step=STEPS):
    run = load_run(workdir, checkpoint="latest")
    trainer = Trainer.build(run.config, run.model, corpus_size(run.prepared))
    abstract = abstract_state(trainer, make_mesh(1))
    with open_checkpoints(workdir, run.config, read_only=True) as checkpoints:
        return jax.device_get(checkpoints.restore(step, abstract)[0])


def _assert_close(got, expected):
    far = differences(got, expected)
    assert not far or max(far.values()) < 1e-5, max(far, key=far.get)


def _expected_rows(prepared):
    examples = InteractionExamples(prepared.train, prepared.features)
    batches = Batches(examples, batch_size=BATCH, seed=0, resident_megabytes=0)
    return np.stack([batches.indices(step) for step in range(STEPS)])


def test_one_process_two_and_one_again_are_one_run_and_each_reads_its_part(prepared, tmp_path):
    alone = tmp_path / "alone"
    train_until(config_of(), alone, -1, devices=4)
    workdir = tmp_path / "run"
    # The first validation is before the first step; what follows the last one seen is lost.
    begun = train_until(config_of(), workdir, 2, devices=4)
    reports = _train_in_two(workdir, 1)
    ended = train_until(config_of(), workdir, -1, devices=4)
    assert begun["stopped"] and not ended["stopped"]
    assert {(report["processes"], report["devices"]) for report in reports} == {(2, 4)}
    assert all(report["stopped"] for report in reports)
    expected = _expected_rows(prepared)
    # The two halves of each batch, and no row more.
    halves = [np.array(report["loaded"]) for report in reports]
    assert all(half.shape == (STEPS - 2, BATCH // 2) for half in halves)
    np.testing.assert_array_equal(np.concatenate(halves, axis=1), expected[2:])
    np.testing.assert_array_equal(ended["loaded"], expected[4:])
    np.testing.assert_allclose(_losses(workdir), _losses(alone), rtol=1e-5)
    validations = [
        [line for line in _lines(path) if "validation/recall@10" in line]
        for path in (workdir, alone)
    ]
    assert "validation/shared/auc" in validations[0][0]
    assert len(validations[0]) == STEPS // 2 and [x.keys() for x in validations[0]] == [
        x.keys() for x in validations[1]
    ]
    _assert_close(_state(workdir), _state(alone))
    # One process alone wrote the files of the run, at each of three starts.
    assert len(list((workdir / "tensorboard").iterdir())) == 3
    assert [line["step"] for line in _lines(workdir) if "loss" in line] == list(range(1, STEPS + 1))


def _real_commands(workdir, port, *flags, processes=2):
    command = [
        *PYTHON,
        "-m",
        "experiments.train",
        "--config=tests/training/tiny_config.py",
        f"--workdir={workdir}",
        f"--coordinator=127.0.0.1:{port}",
        f"--processes={processes}",
        *flags,
    ]
    return [[*command, f"--process={i}"] for i in range(processes)]


def _wait_for(path, group):
    end = time.monotonic() + SECONDS
    while not path.exists():
        assert time.monotonic() < end
        assert all(process.poll() is None for process in group.processes)
        time.sleep(0.01)


def _train_by_slurm(folder, workdir, flags):
    """Trains in two processes that the Slurm script starts; only sbatch and srun are stand-ins."""
    launcher = Launcher(folder)
    launcher.stand_in("sbatch", RECORD)
    launcher.stand_in("srun", SRUN)
    launcher.stand_in("python", f'#!/bin/sh\nexec {shlex.join(PYTHON)} "$@"\n')
    job = ("--nodes=2", "--gpus=0", f"--python={launcher.bin / 'python'}")
    run = ("--config=tests/training/tiny_config.py", f"--workdir={workdir}")
    _, (script, *words) = submit_to_slurm(launcher, *job, *run, "--", *flags)
    cluster = {
        "CALLS": str(launcher.calls_file),
        "PATH": f"{launcher.bin}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "77",
        "SLURM_NNODES": "2",
        # By itself JAX takes a port that the number of the job decides.
        "JAX_COORDINATOR_PORT": str(_free_port()),
    }
    command = ["bash", str(launcher.tree / script), *words]
    with Group([command], _environment(1) | cluster) as group:
        (status,), (said,) = group.wait()
    assert status == 0, said[-3000:]


def test_two_processes_of_which_one_is_asked_to_end_both_stop_at_one_step_and_lose_no_bit(tmp_path):
    """Two processes that Slurm starts go on; the whole run is one process with two devices."""
    # Streamed: the records are written by both, and the place in them is restored.
    training = {"steps": 40, "validate_every": 20, "input": "stream"}
    flags = [f"--config.training.{name}={value}" for name, value in training.items()]
    workdir = tmp_path / "ended"
    with Group(_real_commands(workdir, _free_port(), *flags), _environment(1)) as group:
        _wait_for(workdir / "metrics.jsonl", group)
        group.processes[1].send_signal(signal.SIGTERM)
        statuses, said = group.wait()
    assert statuses == [os.EX_TEMPFAIL] * 2, "\n".join(text[-3000:] for text in said)
    (saved,) = (path.name for path in (workdir / "checkpoints").iterdir())
    assert 0 < int(saved) < 40 and all(f"saved at step {saved}" in text for text in said)
    (tmp_path / "slurm").mkdir()
    _train_by_slurm(tmp_path / "slurm", workdir, flags)
    config = tiny_config.get_config()
    config.training.update(training)
    api.train_in_folder(from_dict(config), tmp_path / "whole", devices=2)
    assert not differences(_state(workdir, 40), _state(tmp_path / "whole", 40))


def test_a_process_that_dies_ends_the_others_with_a_status_that_asks_to_start_again(tmp_path):
    flags = (
        "--config.training.steps=100000",
        "--config.training.validate_every=50000",
        "--config.training.log_every=1",
        "--heartbeat_timeout=10",
    )
    commands = _real_commands(tmp_path / "run", _free_port(), *flags)
    with Group(commands, _environment(1)) as group:
        _wait_for(tmp_path / "run" / "heartbeat.1.json", group)
        group.processes[1].send_signal(signal.SIGKILL)
        statuses, said = group.wait()
    assert statuses == [os.EX_TEMPFAIL, -signal.SIGKILL], said[0][-3000:]
    assert "another process of the run has ended" in said[0]
    # By name, and not itself.
    assert f"Process 1 on {socket.gethostname()} has ended, at step" in said[0]
    assert "Process 0 on" not in said[0]


def test_processes_that_do_not_come_are_named_in_seconds():
    def command(port, process):
        call = f"join('127.0.0.1:{port}', 2, {process}, init_timeout=2)"
        return [
            sys.executable,
            "-c",
            f"from twotower.training.processes import check_devices, join; {call}",
        ]

    port = _free_port()
    with Group([command(port, 0), command(_free_port(), 1)], _environment(1)) as group:
        statuses, said = group.wait()
    assert statuses == [os.EX_TEMPFAIL] * 2
    assert f"--coordinator=127.0.0.1:{port} answers, but some of --processes=2" in said[0]
    assert "does not answer" in said[1] and "Connection refused" in said[1]


def test_a_port_that_is_in_use_is_refused():
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port} of this machine cannot be used"):
            join(f"127.0.0.1:{port}", 2, 0)


@pytest.mark.parametrize(
    "given, words",
    [
        (("", 2, -1), "--processes=2 --process=-1 need --coordinator=HOST:PORT"),
        (("", 0, 1), "need --coordinator"),
        (("10.0.0.2:8476", 2, 2), "--process=2 must be from 0 to --processes=2 less 1"),
        (("10.0.0.2:8476", 2, -1), "--process=-1 must be from 0"),
        (("10.0.0.2", 2, 0), "--coordinator=10.0.0.2 must be HOST:PORT"),
    ],
)
def test_who_is_who_is_asked_for_before_anyone_waits(given, words):
    with pytest.raises(ConfigError, match=words):
        join(*given)


def test_processes_with_different_numbers_of_devices_are_refused_by_name():
    check_devices({0: 4, 1: 4})
    with pytest.raises(ConfigError, match=r"numbers of devices \(process 0: 2, process 1: 1\)"):
        check_devices({1: 1, 0: 2})
