"""The space of a sweep: options by their dotted names, each with the values that it may take.

A JSON file, or a Python file with `SPACE`:

    {
      "training.tables.learning_rate": {"low": 1e-3, "high": 0.3, "log": true},
      "training.batch_size": [512, 1024, 2048],
      "model.user": [{"layers": []}, {"layers": [64], "dropout": 0.2}]
    }

Options that only go together are choices of their section, as in the last line.
"""

from __future__ import annotations

import dataclasses
import json
import math
import runpy
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ml_collections import ConfigDict

from twotower.config import Config, from_dict
from twotower.core.errors import ConfigError, did_you_mean, echo
from twotower.experiment import change

if TYPE_CHECKING:  # an extra, which is not always installed
    from optuna import Trial

# Values that a storage of Optuna keeps as they are.
Scalar = None | bool | int | float | str
# Beginnings of options that a sweep must leave alone -> why.
FIXED = {
    "training.seed": "--seeds=N trains each configuration with several",
    "training.metric": "values of two metrics cannot be compared",
    "split": "figures of other rows cannot be compared",
    "evaluation": "figures of other protocols cannot be compared",
    "retrieval": "the index is made after training: `export` tunes it",
}
EDGE = 0.02  # share of a range, at either end of it, in which the best value is no answer


@dataclasses.dataclass(frozen=True)
class Range:
    """Numbers between two ends, which belong to it.

    Attributes:
        low: Least value.
        high: Greatest value.
        log: Whether they are drawn by their logarithms.
        step: Distance between values; None for whole numbers one apart, and for any others.
        whole: Whether all are whole numbers.
    """

    low: float
    high: float
    log: bool = False
    step: float | None = None
    whole: bool = False

    def share(self, value: float) -> float:
        """Returns where a value lies, from 0 at the low end to 1 at the high one."""
        ends = (self.low, self.high, value)
        if self.log:
            ends = tuple(math.log(end) for end in ends)
        low, high, at = ends
        return (at - low) / (high - low)

    def draw(self, trial: Trial, name: str) -> float:
        """Returns the value of a trial."""
        # Optuna gives back the type that it was asked for, and a batch size of 512.0 is refused.
        if self.whole:
            step = int(self.step or 1)
            return trial.suggest_int(name, int(self.low), int(self.high), step=step, log=self.log)
        return trial.suggest_float(name, self.low, self.high, step=self.step, log=self.log)


@dataclasses.dataclass(frozen=True)
class Choices:
    """Values to choose from.

    Attributes:
        values: Label of each, as it is kept and shown -> the value itself.
    """

    # By labels, since a storage keeps scalars alone and a choice may be a whole section.
    values: Mapping[Scalar, Any]

    def draw(self, trial: Trial, name: str) -> Any:
        """Returns the value of a trial."""
        return self.values[trial.suggest_categorical(name, list(self.values))]


# Dotted name of an option -> what it may be.
Space = Mapping[str, Range | Choices]


def read_space(source: Path | str | Mapping[str, Any], config: Config) -> Space:
    """Returns the space of a file or a mapping, checked against the configuration that it changes.

    Args:
        source: JSON file, Python file with `SPACE`, or the mapping itself.
        config: Configuration of which the space replaces options.

    Raises:
        ConfigError: The file cannot be read, an option is unknown (the nearest is named), or a
            value cannot be used.
    """
    # A mapping was given in Python: there is no flag or file to name.
    location = "space"
    if not isinstance(source, Mapping):
        location = f"--space={source}"
        source = _read_file(Path(source), location)
    if not source:
        raise ConfigError(
            f'{location} names no option, such as {{"training.batch_size": [512, 1024]}}.'
        )
    space: dict[str, Range | Choices] = {}
    # As the flags of every command write them, "config." may stand before the names.
    source = {str(name).removeprefix("config."): values for name, values in source.items()}
    for name, values in source.items():
        # Before its values: what may not be swept needs no valid range.
        _check_name(name, list(source), location)
        space[name] = _read_entry(name, values, f"{location}: {name}", config)
    return space


def with_options(config: Config, options: Mapping[str, Any]) -> Config:
    """Returns a configuration with some options replaced.

    Args:
        config: Whole configuration.
        options: Dotted names and values.

    Raises:
        ConfigError: An option is unknown, or does not go with its value or with another.
    """
    # The way of a flag of the command line, so that names and types are checked by the same rules.
    values = ConfigDict(dataclasses.asdict(config))
    change(values, options)
    return from_dict(values)


def draw(space: Space, trial: Trial) -> dict[str, Any]:
    """Returns the options of a trial."""
    return {name: values.draw(trial, name) for name, values in space.items()}


def describe_space(space: Space) -> dict[str, str]:
    """Returns each option with what it may be, as text.

    >>> describe_space({"training.steps": Range(10, 90, whole=True), "model.dim": Choices({1: 1})})
    {'training.steps': '10 to 90', 'model.dim': '1'}
    """
    described = {}
    for name, values in space.items():
        if isinstance(values, Range):
            described[name] = f"{values.low:g} to {values.high:g}"
            if values.log:
                described[name] += " (log scale)"
        else:
            described[name] = ", ".join(str(label) for label in values.values)
    return described


def describe_edges(space: Space, options: Mapping[str, Any]) -> list[str]:
    """Returns a sentence for each best value that lies at an end of its range."""
    sentences = []
    for name, values in space.items():
        # Choices have no order, and so no end.
        if isinstance(values, Choices):
            continue
        share = values.share(options[name])
        if EDGE < share < 1 - EDGE:
            continue
        end = "lower"
        if share > 0.5:
            end = "upper"
        sentences.append(
            f"{name}={options[name]:g} lies at the {end} end of its range, {values.low:g} to "
            f"{values.high:g}: better values may lie beyond. Widen it and sweep again."
        )
    return sentences


def _read_file(path: Path, location: str) -> Mapping[str, Any]:
    if not path.is_file():
        raise ConfigError(f"{location}: there is no such file. Give a JSON file or a Python one.")
    # Run by its path and not imported: a space lies beside its sweep and in no package.
    if path.suffix == ".py":
        found = runpy.run_path(str(path)).get("SPACE")
    else:
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ConfigError(f"{location} is no JSON: {error}.") from None
    if not isinstance(found, Mapping):
        what = "SPACE" if path.suffix == ".py" else "the file"
        raise ConfigError(
            f"{location}: {what} must be a mapping of options to ranges or lists, "
            f"not {echo(found)}."
        )
    return found


def _check_name(name: str, names: Sequence[str], location: str) -> None:
    for fixed, why in FIXED.items():
        if name == fixed or name.startswith(f"{fixed}."):
            raise ConfigError(f"{location}: {name} cannot be swept: {why}.")
    # Whichever was set last would win, and the trial would say that both were.
    for other in names:
        if other.startswith(f"{name}."):
            raise ConfigError(
                f"{location}: {other} is an option of {name}, which is swept too. Name one of them."
            )


def _read_entry(name: str, values: Any, location: str, config: Config) -> Range | Choices:
    # A mapping is always a range: a choice that is a mapping stands in a list.
    if isinstance(values, Mapping):
        entry: Range | Choices = _read_range(name, values, location)
        # What holds for both ends holds between them: options are bounded, if at all, by an
        # interval.
        tried = [entry.low, entry.high]
        if entry.whole:
            tried = [int(end) for end in tried]
    elif isinstance(values, (list, tuple)):
        if not values:
            raise ConfigError(f"{location} has no choice.")
        entry = Choices({_label(value): value for value in values})
        tried = list(values)
    else:
        raise ConfigError(
            f"{location}={echo(values)} must be a list of choices, or a range such as "
            '{"low": 1e-4, "high": 0.1, "log": true}.'
        )
    # A value that the configuration refuses is said now, not by the trial that draws it hours
    # later.
    for value in tried:
        try:
            with_options(config, {name: value})
        except ConfigError as error:
            raise ConfigError(f"{location}: {error}") from None
    return entry


def _read_range(name: str, values: Mapping[str, Any], location: str) -> Range:
    known = ("low", "high", "log", "step")
    for key in values:
        if key not in known:
            raise ConfigError(f"{location} has no {key!r}{did_you_mean(key, known)}")
    for key in ("low", "high"):
        if not _is_number(values.get(key)):
            raise ConfigError(f"{location}: {key}={echo(values.get(key))} must be a number.")
    low = values["low"]
    high = values["high"]
    log = values.get("log", False)
    step = values.get("step")
    # Of equal ends nothing is drawn, and a share of their distance divides by 0.
    if not low < high:
        raise ConfigError(f"{location}: low={low} must be below high={high}.")
    if not isinstance(log, bool):
        raise ConfigError(f"{location}: log={echo(log)} must be true or false.")
    if log and low <= 0:
        raise ConfigError(f"{location}: low={low} must be above 0 where log is true.")
    # Optuna takes no step of values that it draws by their logarithms.
    if step is not None and (log or not _is_number(step) or step <= 0):
        raise ConfigError(f"{location}: step={echo(step)} must be above 0, and goes without log.")
    # Of an option that takes any number, 1 to 10 are no ten numbers.
    whole = isinstance(low, int) and isinstance(high, int) and _type_of(name) is not float
    return Range(low, high, log, step, whole)


def _is_number(value: Any) -> bool:
    # In Python True is an int, and JSON as Python reads it has NaN and Infinity.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _type_of(name: str) -> Any:
    """Returns the type of an option; None of one that is not known or lies in a user's mapping."""
    cls: Any = Config
    for part in name.split("."):
        if not dataclasses.is_dataclass(cls):
            return None
        # Annotations are text here; this reads them as the types they name.
        cls = typing.get_type_hints(cls).get(part)
    return cls


def _label(value: Any) -> Scalar:
    """Returns a choice as a storage can keep it."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return json.dumps(value)
