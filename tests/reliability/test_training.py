"""A training that is ended at any moment ends in the same bits when the same command is given
again; a folder has one training at a time; a growth that was ended begins again."""

import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from tests.reliability.faults import Faults, Killed
from tests.training import tiny_config
from tests.training.conftest import shared_programs  # noqa: F401  pytest finds it by name
from twotower import api
from twotower.config import from_dict
from twotower.core.errors import BusyError, ConfigError, PreemptedError
from twotower.core.files import exclusive
from twotower.core.mesh import make_mesh
from twotower.training import metrics, run
from twotower.training.candidates import corpus_size
from twotower.training.grow import grow
from twotower.training.init import abstract_state
from twotower.training.loop import open_checkpoints
from twotower.training.metrics import MetricWriter, read_lines
from twotower.training.run import load_config, load_run
from twotower.training.state import Trainer

pytestmark = pytest.mark.slow

OPTIONS = {"steps": 80, "validate_every": 20, "log_every": 5}


@pytest.fixture(scope="module")
def config():
    options = tiny_config.get_config()
    options.training.update(OPTIONS)
    return from_dict(options)


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """The folder of a run that nobody ended."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    api.train_in_folder(config, workdir, devices=1)
    return workdir


def end_of(workdir):
    loaded = load_run(workdir, checkpoint="latest")
    trainer = Trainer.build(loaded.config, loaded.model, corpus_size(loaded.prepared))
    abstract = abstract_state(trainer, make_mesh(1))
    with open_checkpoints(workdir, loaded.config, read_only=True) as checkpoints:
        return checkpoints.restore(OPTIONS["steps"], abstract), checkpoints.best()


def check_same_end(workdir, whole, note=""):
    (state, record), best = end_of(workdir)
    (expected, expected_record), expected_best = end_of(whole)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b, err_msg=note), state, expected)
    assert (record, best) == (expected_record, expected_best), note
    steps = [line["step"] for line in read_lines(workdir)]
    assert steps == sorted(steps) and steps[-1] == OPTIONS["steps"]


def terminate_at(monkeypatch, step):
    """Lets this process be asked to end when it has read the metrics of a step."""
    advance = MetricWriter.advance
    count = 0

    def counted(writer):
        nonlocal count
        count += 1
        if count == step:
            os.kill(os.getpid(), signal.SIGTERM)
        advance(writer)

    monkeypatch.setattr(metrics.MetricWriter, "advance", counted)


def test_sigterm_saves_where_it_is_and_asks_to_be_started_again(
    config, whole, tmp_path, monkeypatch
):
    workdir = tmp_path / "run"
    handler = signal.getsignal(signal.SIGTERM)
    for step in (20, 31):  # at a validation, and between two
        with monkeypatch.context() as patch, pytest.raises(PreemptedError) as caught:
            terminate_at(patch, step)
            api.train_in_folder(config, workdir, devices=1)
        assert caught.value.code == os.EX_TEMPFAIL
        saved = int(str(caught.value).split("at step ")[1].split(",")[0])
        assert (workdir / "checkpoints" / str(saved)).is_dir()
        assert signal.getsignal(signal.SIGTERM) == handler
    # A damaged history of metrics is read past, too.
    path = workdir / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    spoilt = [b"garbage\n", b'{"loss": 1.0}\n', b"\xff\xfe\n", b"[]\n", b"[" * 10**5 + b"\n"]
    path.write_bytes(b"".join([lines[0], *spoilt, *lines[1:], b'{"step": 3', b"\x00" * 9]))
    assert api.read_history(workdir)["step"].to_pylist()
    api.train_in_folder(config, workdir, devices=1)
    check_same_end(workdir, whole)
    for line in path.read_text().splitlines():
        assert json.loads(line)["step"] > 0


COMMAND = [
    sys.executable,
    "-m",
    "experiments.train",
    "--config=tests/training/tiny_config.py",
    *(f"--config.training.{name}={value}" for name, value in OPTIONS.items()),
]


def test_killed_by_force_it_ends_in_the_same_bits(config, whole, tmp_path):
    seed = random.randrange(10**6)
    rng = random.Random(seed)
    workdir = tmp_path / "run"
    process = subprocess.Popen(
        [*COMMAND, f"--workdir={workdir}"], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
    )
    try:
        step = rng.randrange(1, 60)
        while (
            process.poll() is None
            and not (read_lines(workdir) or [{"step": 0}])[-1]["step"] >= step
        ):
            time.sleep(0.005)
    finally:
        process.kill()
        _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, errors.decode()[-2000:]
    api.train_in_folder(config, workdir, devices=1)
    check_same_end(workdir, whole, f"seed {seed}")


def test_a_second_training_in_one_folder_is_refused_by_name(config, whole, tmp_path):
    with exclusive(whole, "train"):
        with pytest.raises(
            BusyError, match=r"run is in use by `train` \(process \d+ on .*, since 2"
        ):
            api.train_in_folder(config, whole, devices=1)
    # Reading goes on.
    with exclusive(whole, "train"):
        load_run(whole)


@pytest.mark.parametrize("document", ["[]", "null", "5", "[" * 10**5, "\x00", '{"data": []}'])
def test_a_configuration_that_is_none_is_a_line(config, whole, tmp_path, document):
    workdir = tmp_path / "run"
    workdir.mkdir()
    (workdir / "checkpoints" / "20").mkdir(parents=True)
    (workdir / "config.json").write_text(document)
    for use in (load_config, lambda path: run.train(config, path)):
        with pytest.raises(ConfigError) as caught:
            use(workdir)
        assert "\n" not in str(caught.value)


def test_a_growth_that_was_ended_begins_again_by_the_same_command(
    config, whole, tmp_path, monkeypatch
):
    longer = dataclasses.replace(config.training, steps=100)
    config = dataclasses.replace(config, training=longer)
    workdir = tmp_path / "grown"

    def grow_it():
        grow(config, whole, workdir, new_rows="oov")

    counted = Faults(10**9, is_kill=True)
    with counted.installed(monkeypatch):
        grow_it()
    for number in (3, counted.writes - 1, counted.writes):
        shutil.rmtree(workdir)
        faults = Faults(number, is_kill=True)
        with faults.installed(monkeypatch), pytest.raises(Killed):
            grow_it()
        if not (workdir / "config.json").exists():
            with pytest.raises(ConfigError, match="left unfinished by `grow`. Give that command"):
                run.train(config, workdir, devices=1)
            grow_it()
        assert load_run(workdir, checkpoint="latest").step == OPTIONS["steps"]
    # A folder of anything else is left alone, as is a run that was grown.
    with pytest.raises(ConfigError, match="new or empty"):
        grow_it()
