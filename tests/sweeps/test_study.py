"""Sweeps of trainings that only write down what they would have reached: what is tried, what is
pruned, and that a sweep which was killed ends as one that was not."""

import dataclasses
import json
import math
from unittest import mock

import pytest

from twotower.config import Config
from twotower.core.errors import ConfigError, TrainingError
from twotower.experiment import load_config
from twotower.sweeps import study
from twotower.sweeps.best import write_best
from twotower.sweeps.page import write_page
from twotower.sweeps.space import read_space
from twotower.sweeps.study import run_trials
from twotower.sweeps.text import format_sweep

RATE = "training.tables.learning_rate"
CONFIG = Config()
SPACE = {RATE: {"low": 1e-3, "high": 1.0, "log": True}, "training.batch_size": [256, 512]}
METRIC = CONFIG.training.metric


class Trainer:
    """Stands for training: the nearer the rate is to 0.1, the better, each validation a bit more.

    Attributes:
        runs: Folders that were trained in, in order.
        dies_in: Number of the call that is killed after its second validation.
    """

    def __init__(self, dies_in=None):
        self.runs = []
        self.data = set()
        self.dies_in = dies_in

    def __call__(self, config, folder, data, on_validation):
        self.runs.append("/".join(folder.parts[-2:]))
        self.data.add(data)
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        distance = abs(math.log10(config.training.tables.learning_rate) + 1)
        if distance > 1.7:
            raise TrainingError("the loss is not finite")
        path = folder / "metrics.jsonl"
        done = len(path.read_text().splitlines()) if path.exists() else 0
        for step in range(done, 5):
            value = (1 - distance / 2) * (step + 1) / 5 + config.training.seed / 100
            with path.open("a") as file:
                file.write(json.dumps({"step": step, f"validation/{METRIC}": value}) + "\n")
            if on_validation is not None:
                on_validation(step, {METRIC: value})
            if step == 1 and self.dies_in == len(self.runs):
                raise KeyboardInterrupt


def sweep(folder, trainer, space=SPACE):
    """A sweep without importances, for which Optuna imports scikit-learn for seconds."""
    read = read_space(space, CONFIG)
    with mock.patch.object(study, "LEAST_FOR_IMPORTANCES", math.inf):
        return run_trials(CONFIG, read, folder, trainer, trials=12, seeds=2)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A sweep that ran to its end, and its trainer."""
    trainer = Trainer()
    return sweep(tmp_path_factory.mktemp("whole"), trainer), trainer


def test_the_best_is_the_greatest_mean_of_its_seeds(whole):
    found, trainer = whole
    finished = [one for one in found.trials if one.state == "finished"]
    assert found.best == max(finished, key=lambda one: sum(one.seeds))
    expected = 1 - abs(math.log10(found.values[RATE]) + 1) / 2
    assert found.best.seeds == pytest.approx((expected, expected + 0.01))
    assert found.config.training.tables.learning_rate == found.values[RATE]
    # What was tried differs in nothing of its data.
    assert len(trainer.data) == 1
    # Of many trials the checkpoints would fill a disk.
    kept = {path.parent.parent.name for path in found.workdir.glob("trials/*/*/checkpoints")}
    assert kept == {str(found.best.number)}


def test_a_trial_behind_the_median_is_ended_in_its_first_seed(whole):
    found, trainer = whole
    states = {one.number: one.state for one in found.trials}
    pruned = [number for number, state in states.items() if state == "pruned"]
    assert pruned and min(pruned) >= 4
    for number in pruned:
        assert f"{number}/seed-0" in trainer.runs and f"{number}/seed-1" not in trainer.runs
    for one in found.trials:
        if one.state == "failed":
            assert one.reason == "the loss is not finite"


def test_a_sweep_that_was_killed_goes_on_to_the_same_end(whole, tmp_path):
    finished = [one.number for one in whole[0].trials if one.state == "finished"]
    dying = next(number for number in finished if number > 4)
    call = whole[1].runs.index(f"{dying}/seed-0")
    with pytest.raises(KeyboardInterrupt):
        sweep(tmp_path, Trainer(dies_in=call + 1))
    trainer = Trainer()
    found = sweep(tmp_path, trainer)
    assert trainer.runs == whole[1].runs[call:]
    # By their text: the value of a trial that failed is no number, which equals nothing.
    assert repr(found.trials) == repr(whole[0].trials) and found.best == whole[0].best
    # One that ended has nothing left to do, and takes on more.
    again = Trainer()
    assert repr(sweep(tmp_path, again).trials) == repr(found.trials) and not again.runs
    with pytest.raises(ConfigError, match="another sweep: sweep.space.training.batch_size"):
        sweep(tmp_path, again, {"training.batch_size": [256]})


def test_a_space_of_few_choices_is_tried_whole_each_once(tmp_path):
    space = {RATE: [0.01, 0.1], "training.batch_size": [256, 512]}
    with pytest.raises(KeyboardInterrupt):
        sweep(tmp_path, Trainer(dies_in=3), space)
    trainer = Trainer()
    found = sweep(tmp_path, trainer, space)
    tried = [tuple(one.options.values()) for one in found.trials]
    assert sorted(tried) == [(0.01, 256), (0.01, 512), (0.1, 256), (0.1, 512)]
    assert found.values[RATE] == 0.1


def test_what_fails_for_every_trial_is_said_at_once(tmp_path):
    def refuse(*arguments):
        raise ConfigError("config.data.path is missing")

    with pytest.raises(ConfigError, match="data.path is missing"):
        sweep(tmp_path, refuse)


def test_the_best_is_written_as_an_experiment(whole, tmp_path):
    path = write_best(whole[0])
    assert load_config(path) == whole[0].config
    text = path.read_text()
    assert f"best of {len(whole[0].trials)} configurations tried" in text
    swept = [line for line in text.splitlines() if line.endswith("# swept")]
    assert any(RATE in line for line in swept) and len(swept) <= 2


def test_every_tuned_figure_says_of_how_many_it_is_the_best(whole):
    found = dataclasses.replace(whole[0], importances={RATE: 0.9, "training.batch_size": 0.1})
    number = len(found.trials)
    text = format_sweep(found, found.workdir / "best.py", found.workdir)
    assert f"{number} configurations tried" in text.splitlines()[0]
    assert f"the best of {number} configurations tried" in text
    page = write_page(found).read_text()
    assert f"the best of {number} configurations tried" in page
    for one in found.trials:
        assert f'<bdi dir="auto">{one.state}</bdi></td>' in page
    assert page.count("<svg") == 3 + len(SPACE)
