"""The trials of a sweep: drawn by Optuna, trained with several seeds, and kept in a SQLite file.

```
SWEEP/study.db          all trials; a sweep that was killed goes on from it
SWEEP/data/HASH         prepared data, shared by the trials that read the same
SWEEP/trials/N/seed-S   the run of a seed; only the best trial keeps its checkpoints
```

A trial draws by a generator of its own number, from the trials before it: a sweep that was killed
and goes on tries what it would have tried.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import shutil
import statistics
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from absl import logging

from twotower.config import Config
from twotower.core.errors import ConfigError, TrainingError
from twotower.core.fields import differences
from twotower.core.files import exclusive
from twotower.core.install import extra
from twotower.pipeline import folder as data_folder
from twotower.sweeps.space import Choices, Space, draw, with_options
from twotower.training.loop import EndedEarly, OnValidation
from twotower.training.metrics import read_lines

if TYPE_CHECKING:  # an extra, which is not always installed
    import optuna
    from optuna.trial import TrialState

STUDY = "sweep"  # name of the study in its file
FILE = "study.db"
# Trials before any is cut short: the median of fewer says little.
UNPRUNED = 4
State = Literal["finished", "pruned", "failed"]
# By the names of Optuna's states, which can be read where Optuna is not imported.
STATES: dict[str, State] = {"COMPLETE": "finished", "PRUNED": "pruned", "FAIL": "failed"}
LEAST_FOR_IMPORTANCES = 4  # finished trials
# (configuration, folder of the run, folder of prepared data, callback) -> trains.
Train = Callable[[Config, Path, Path, OnValidation | None], None]


@dataclasses.dataclass(frozen=True)
class Tried:
    """One configuration that was tried.

    Attributes:
        number: Number of the trial, from 0.
        first: Number of the first trial of the same configuration, which alone was trained.
        options: Values of its options by name; of a choice that is no number or text, its JSON.
        state: Whether all seeds were trained, or why not.
        value: Mean over seeds of the best validation; of a pruned trial the best of its first
            seed; NaN of one that failed.
        seeds: Best validation of each seed.
        reason: What went wrong in a trial that failed.
    """

    number: int
    first: int
    options: Mapping[str, Any]
    state: State
    value: float
    seeds: Sequence[float] = ()
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class Sweep:
    """The outcome of a sweep.

    Attributes:
        workdir: Folder of the sweep.
        metric: Validation metric that was compared.
        space: What was swept.
        trials: Configurations that were tried, each once, in order.
        best: The trial with the greatest value.
        values: Its options by name.
        config: Its configuration.
        importances: Option -> share of the variance of the metric that it explains, greatest first;
            {} of fewer than four finished trials.
        test: Figures of the best on the test rows, of each seed; () without such rows.
    """

    workdir: Path
    metric: str
    space: Space
    trials: Sequence[Tried]
    best: Tried
    values: Mapping[str, Any]
    config: Config
    importances: Mapping[str, float]
    test: Sequence[Mapping[str, float]] = ()

    @property
    def runs(self) -> list[Path]:
        """Folders of the runs of the best trial, one a seed."""
        return run_folders(self.workdir, self.best.number, len(self.best.seeds))


def check_sweep() -> None:
    """Refuses, before anything is trained, a sweep without Optuna."""
    with extra("sweep", "sweep"):
        import optuna  # noqa: F401  only whether it is there


def run_folders(workdir: Path, number: int, seeds: int) -> list[Path]:
    """Returns the folders of the runs of a trial, one a seed."""
    return [workdir / "trials" / f"{number}" / f"seed-{seed}" for seed in range(seeds)]


def run_trials(
    config: Config,
    space: Space,
    workdir: Path,
    train: Train,
    *,
    trials: int,
    seeds: int = 1,
    prune: bool = True,
    seed: int = 0,
) -> Sweep:
    """Tries configurations until there are so many, going on with what the folder holds.

    A space of choices alone that has no more configurations than that is tried whole.

    Args:
        config: Configuration of which the space replaces options.
        space: Options and their values.
        workdir: Folder of the sweep.
        train: Function that trains a run.
        trials: Number of trials, with those that the folder holds.
        seeds: Number of trainings of a configuration.
        prune: Whether a training ends early whose best validation is below the median of those
            before it at the same one.
        seed: Number that the drawing of configurations depends on.

    Raises:
        ConfigError: The folder holds another sweep, Optuna or validation rows are missing, or no
            trial went well.
    """
    check_sweep()
    import optuna

    if not config.split.validation:
        raise ConfigError(
            "config.split.validation=0: a sweep compares configurations on validation rows. Set "
            "--config.split.validation=0.1."
        )
    # Trials are told by lines of our own, which name the metric.
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    # All that changes what a trial would reach: trials of other settings cannot be compared.
    settings = {
        "config": config.identity(),
        "metric": config.training.metric,
        "space": {name: dataclasses.asdict(values) for name, values in space.items()},
        "seeds": seeds,
        "prune": prune,
        "seed": seed,
    }
    # Two processes would both draw the trial of the next number, and train in its folder.
    with exclusive(workdir, "sweep"):
        study = optuna.create_study(
            storage=f"sqlite:///{workdir / FILE}",
            study_name=STUDY,
            direction="maximize",
            pruner=optuna.pruners.MedianPruner(n_startup_trials=UNPRUNED, n_warmup_steps=1),
            load_if_exists=True,
        )
        _check_same(study, settings, workdir)
        _give_up_killed(study)
        while len(_kept(study)) < trials:
            number = len(_kept(study))
            # A new one for each trial: the state of a generator is not kept in the file, its seed
            # is known.
            study.sampler = optuna.samplers.TPESampler(seed=seed + number)
            left = _untried(study, space, trials)
            # The whole space is tried before the number of trials is reached.
            if left == []:
                break
            if left is not None:
                study.sampler = _fixed_sampler(left[0], study.sampler)
            _Trial(study, workdir, config, space, prune=prune).run(train, seeds)
        found = [_tried(trial) for trial in _kept(study)]
        importances = _importances(study)
    best = _best(found)
    if best is None:
        raise ConfigError(f"No trial of {len(found)} went well; the last: {found[-1].reason}")
    values = _values(space, best.options)
    return Sweep(
        workdir=workdir,
        metric=config.training.metric,
        space=space,
        # Of equal configurations the first alone was trained: others would be counted as tries.
        trials=[one for one in found if one.first == one.number],
        best=best,
        values=values,
        # The seed of the first of its runs, so that training the configuration repeats that one.
        config=with_options(config, {**values, "training.seed": 0}),
        importances=importances,
    )


def validations(workdir: Path, metric: str) -> list[float]:
    """Returns a metric at each validation of a run, in order."""
    name = f"validation/{metric}"
    return [line[name] for line in read_lines(workdir) if name in line]


class _Trial:
    """One trial in progress, drawn when it is made."""

    def __init__(
        self,
        study: optuna.Study,
        workdir: Path,
        config: Config,
        space: Space,
        *,
        prune: bool,
    ) -> None:
        self._study = study
        self._workdir = workdir
        self._config = config
        self._metric = config.training.metric
        self._prune = prune
        # Not Optuna's number, which counts killed trials too: these are drawn again under their
        # own.
        self._number = len(_kept(study))
        self._trial = study.ask()
        self._options = draw(space, self._trial)
        self._reported = 0

    def run(self, train: Train, seeds: int) -> None:
        """Trains all seeds, and keeps what came of it."""
        from optuna.trial import TrialState

        trial = self._trial
        # At once: everything that is kept is found by it later.
        trial.set_user_attr("number", self._number)
        equal = self._equal()
        # Draws of few choices repeat themselves; trained again, the same seeds reach the same.
        if equal is not None:
            self._take(equal)
            return
        folders = run_folders(self._workdir, self._number, seeds)
        shown = ", ".join(f"{name}={value}" for name, value in trial.params.items())
        logging.info("Trial %d: %s", self._number, shown)
        try:
            values = self._train(train, folders)
        # Of the seeds only the first was trained.
        except EndedEarly:
            best = max(validations(folders[0], self._metric))
            self._end(TrialState.PRUNED, values=[best])
            logging.info("Trial %d is pruned: %s %.4f.", self._number, self._metric, best)
        except (ConfigError, TrainingError) as error:
            # Nothing has gone well yet: the reason may hold for every trial.
            if isinstance(error, ConfigError) and _best(map(_tried, _kept(self._study))) is None:
                raise
            self._end(TrialState.FAIL, reason=str(error))
            logging.warning("Trial %d failed: %s", self._number, error)
        else:
            self._end(TrialState.COMPLETE, values=values)
            value = statistics.mean(values)
            logging.info("Trial %d: %s %.4f.", self._number, self._metric, value)
        self._drop_checkpoints()

    def _train(self, train: Train, folders: Sequence[Path]) -> list[float]:
        """Returns the best validation of each seed.

        Raises:
            EndedEarly: The first seed promises nothing.
        """
        config = with_options(self._config, self._options)
        # By what the data depends on alone, so that trials that differ in their training share it.
        data = self._workdir / "data" / data_folder.digest_of(config)[:12]
        values = []
        for seed, folder in enumerate(folders):
            training = dataclasses.replace(config.training, seed=seed)
            # The first seed decides: the others' curves would be compared with those of a first.
            watch = None
            if seed == 0:
                watch = self._watch(folder)
            train(dataclasses.replace(config, training=training), folder, data, watch)
            if seed == 0:
                self._report(folder)
            curve = validations(folder, self._metric)
            # Without a figure there is nothing to compare by, and `max` would not say why.
            if not curve:
                raise ConfigError(f"{folder} was never validated: there are no validation rows.")
            values.append(max(curve))
        return values

    def _watch(self, folder: Path) -> OnValidation:
        def on_validation(step: int, values: Mapping[str, float]) -> None:
            self._report(folder)
            if self._prune and self._trial.should_prune():
                # Through the training loop, which closes what it holds and ends as at any other
                # error.
                raise EndedEarly

        return on_validation

    def _report(self, folder: Path) -> None:
        """Tells the study of the validations that it does not know of."""
        # From the file: some may be of before a kill, when another process was told of them.
        curve = validations(folder, self._metric)
        for number in range(self._reported, len(curve)):
            self._trial.report(curve[number], number)
        self._reported = len(curve)

    def _end(self, state: TrialState, **facts: Any) -> None:
        for name, fact in facts.items():
            self._trial.set_user_attr(name, fact)
        value = None
        if state.name == "COMPLETE":
            value = statistics.mean(facts["values"])
        # Last: until then a kill leaves a running trial, which is drawn again.
        self._study.tell(self._trial, value, state=state)

    def _equal(self) -> optuna.trial.FrozenTrial | None:
        """Returns an earlier trial of the same configuration, which would end alike."""
        for other in _kept(self._study):
            if other.params == self._trial.params:
                return other
        return None

    def _take(self, equal: optuna.trial.FrozenTrial) -> None:
        """Takes the outcome of an equal trial."""
        facts = dict(equal.user_attrs)
        # The first of its kind, not the last: an equal trial may itself have taken what another
        # had.
        facts |= {"number": self._number, "first": _tried(equal).first}
        self._end(equal.state, **facts)

    def _drop_checkpoints(self) -> None:
        """Removes the checkpoints of all trials but the best: of many trials they fill a disk."""
        best = _best(map(_tried, _kept(self._study)))
        for folder in (self._workdir / "trials").iterdir():
            if best is not None and folder.name == str(best.number):
                continue
            for checkpoints in folder.glob("seed-*/checkpoints"):
                shutil.rmtree(checkpoints)


def _check_same(study: optuna.Study, settings: Mapping[str, Any], workdir: Path) -> None:
    """Refuses to go on with the trials of another sweep.

    Raises:
        ConfigError: Settings differ; the message names them.
    """
    # As the file gives them back: tuples come as lists, and would differ from themselves.
    now = json.loads(json.dumps(settings))
    before = study.user_attrs.get("settings", now)
    changed = differences(before, now, "sweep")
    # Without a trial there is nothing to be mixed with.
    if changed and _kept(study):
        raise ConfigError(
            f"--workdir={workdir} holds another sweep: {'; '.join(changed)}. Name a new folder."
        )
    study.set_user_attr("settings", now)


def _give_up_killed(study: optuna.Study) -> None:
    """Ends the trials that a killed sweep left: they are drawn again, and their runs go on."""
    from optuna.trial import TrialState

    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        study.tell(trial.number, state=TrialState.FAIL)


def _fixed_sampler(
    options: dict[str, Any], sampler: optuna.samplers.BaseSampler
) -> optuna.samplers.BaseSampler:
    """Returns the sampler that draws these options and no others."""
    import optuna

    with warnings.catch_warnings():
        # Optuna calls it experimental, of which a user who sweeps need not hear.
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.samplers.PartialFixedSampler(options, sampler)


def _kept(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    """Returns the trials that came to an end, which are not those that were killed."""
    kept = []
    for trial in study.get_trials(deepcopy=False):
        # A failure of its own has a reason; without one the trial was killed and given up.
        has_ended = trial.state.is_finished() and trial.state.name != "FAIL"
        if has_ended or "reason" in trial.user_attrs:
            kept.append(trial)
    return kept


def _untried(study: optuna.Study, space: Space, trials: int) -> list[dict[str, Any]] | None:
    """Returns the configurations that are left of a space that is tried whole.

    None of one that has ranges, or more configurations than there are trials.
    """
    labels = []
    for values in space.values():
        if not isinstance(values, Choices):
            return None
        labels.append(list(values.values))
    # Too many to try them all, so that TPE chooses which.
    if math.prod(map(len, labels)) > trials:
        return None
    whole = [dict(zip(space, chosen)) for chosen in itertools.product(*labels)]
    tried = [trial.params for trial in _kept(study)]
    return [options for options in whole if options not in tried]


def _tried(trial: optuna.trial.FrozenTrial) -> Tried:
    facts = trial.user_attrs
    values = tuple(facts.get("values", ()))
    return Tried(
        number=facts["number"],
        first=facts.get("first", facts["number"]),
        options=dict(trial.params),
        state=STATES[trial.state.name],
        value=statistics.mean(values) if values else math.nan,
        seeds=values,
        reason=facts.get("reason", ""),
    )


def _best(trials: Iterable[Tried]) -> Tried | None:
    """Returns the first of the greatest value; None where no trial was finished."""
    # A pruned trial has the value of one seed and part of a curve: it is no rival.
    finished = [trial for trial in trials if trial.state == "finished"]
    return max(finished, key=lambda trial: trial.value, default=None)


def _values(space: Space, labels: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the values that labels of choices stand for."""
    options = {}
    for name, entry in space.items():
        value = labels[name]
        if isinstance(entry, Choices):
            value = entry.values[value]
        options[name] = value
    return options


def _importances(study: optuna.Study) -> dict[str, float]:
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

    finished = [trial for trial in _kept(study) if trial.state.name == "COMPLETE"]
    if len(finished) < LEAST_FOR_IMPORTANCES:
        return {}
    return get_param_importances(study, evaluator=PedAnovaImportanceEvaluator())
