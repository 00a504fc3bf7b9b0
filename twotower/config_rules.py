"""Rules across the sections of a configuration; run once, when a `Config` is made.

Rules within one section are in `twotower.config`; rules that need registries, devices or data are
in `twotower.training.checks`.
"""

from __future__ import annotations

import math
from typing import Any

from twotower.core.errors import ConfigError

# A `twotower.config.Config`. That module imports this one, so its name cannot be had here.
Config = Any
# Kinds of histories whose positions know earlier ones alone.
_CAUSAL_HISTORIES = ("causal", "gru")


def check_rules(config: Config) -> None:
    """Refuses options that do not go with those of another section.

    Args:
        config: The whole configuration, each section of which has checked itself.

    Raises:
        ConfigError: The first such option, with its value and the right ones.
    """
    # The order of the checks is the order of the messages: the kind of example first.
    if config.training.examples == "sequences":
        _check_sequences(config)
    _check_fixed_split(config)
    _check_dispatches(config)
    _check_queue(config)
    _check_mined(config)


def _check_sequences(config: Config) -> None:
    """Refuses options that a batch of packed sequences cannot be trained with."""
    negatives = config.objective.negatives
    training = config.training
    model = config.model
    # Rows of packed sequences end in padding, which statistics of a batch would count.
    has_padding = ", whose batches have empty places"
    # (field, its value, the value it must have, the reason that follows in the message)
    rules = (
        (
            "objective.negatives.queue",
            negatives.queue,
            0,
            ", whose batches have another number of positives each time",
        ),
        (
            "training.accumulate",
            training.accumulate,
            1,
            ", whose batches are computed at once",
        ),
        (
            "model.history.empty_rate",
            model.history.empty_rate,
            0.0,
            ", whose first positions have no history as it is",
        ),
        ("model.user.batch_norm", model.user.batch_norm, False, has_padding),
        ("model.item.batch_norm", model.item.batch_norm, False, has_padding),
    )
    for field, value, needed, reason in rules:
        right = f"{needed!r} with config.training.examples='sequences'{reason}"
        _check(value == needed, field, value, right)
    known = " or ".join(map(repr, _CAUSAL_HISTORIES))
    _check(
        model.history.kind in _CAUSAL_HISTORIES,
        "model.history.kind",
        model.history.kind,
        f"{known} with config.training.examples='sequences': in other kinds a position knows what "
        "is after it",
    )


def _check_fixed_split(config: Config) -> None:
    """Refuses tables of held-out rows that the split would mix with the training rows."""
    data = config.data
    for name, table in (("validation", data.validation), ("test", data.test)):
        source = table.path or table.query or table.event_files
        _check(
            not source or config.split.kind == "fixed",
            f"data.{name}",
            source,
            f"empty with config.split.kind={config.split.kind!r}, which divides all rows anew: set "
            "config.split.kind='fixed' to keep its rows apart",
        )


def _check_dispatches(config: Config) -> None:
    """Refuses dispatches that end between two events of the loop."""
    training = config.training
    negatives = config.objective.negatives
    # Validations, rankings and the last step happen on the host, so a dispatch must end there.
    periods = [training.validate_every, training.steps]
    # Those of passes are made of whole dispatches; see `TrainingConfig.scaled_to`.
    if training.passes:
        periods = []
    if negatives.mined:
        periods.append(negatives.mined_refresh)
    # A dispatch that divides all periods ends at each of these steps.
    divisor = math.gcd(*periods)
    _check(
        # 0, where there is no period, is a multiple of every dispatch.
        # So is everything one of dispatches that end where they must.
        divisor % max(1, training.steps_per_dispatch) == 0,
        "training.steps_per_dispatch",
        training.steps_per_dispatch,
        f"a divisor of {divisor}, so that validations (every {training.validate_every} steps), the "
        f"last step ({training.steps}) and rankings of hard negatives fall between two dispatches",
    )


def _check_queue(config: Config) -> None:
    """Refuses a queue that does not hold whole batches, or that is never used.

    The steps of passes are known, and checked, once the examples are counted.
    """
    training = config.training
    negatives = config.objective.negatives
    _check(
        # Each step writes one batch over the oldest entries; 0 is a multiple too.
        negatives.queue % training.batch_size == 0,
        "objective.negatives.queue",
        negatives.queue,
        f"a multiple of config.training.batch_size={training.batch_size}",
    )
    _check(
        # A queue that starts after the last step would be an option without an effect.
        not negatives.queue or training.passes > 0 or negatives.queue_warmup < training.steps,
        "objective.negatives.queue_warmup",
        negatives.queue_warmup,
        f"below config.training.steps={training.steps}",
    )


def _check_mined(config: Config) -> None:
    """Refuses hard negatives that are never ranked; with passes, once the examples are counted."""
    training = config.training
    negatives = config.objective.negatives
    _check(
        # The first ranking is made after `mined_refresh` steps, not before the first one.
        not negatives.mined or training.passes > 0 or negatives.mined_refresh < training.steps,
        "objective.negatives.mined_refresh",
        negatives.mined_refresh,
        f"below config.training.steps={training.steps}: before the first ranking there is nothing "
        "to draw from",
    )


def _check(ok: bool, field: str, value: Any, right: str) -> None:
    if not ok:
        raise ConfigError(f"config.{field}={value!r} must be {right}.")
