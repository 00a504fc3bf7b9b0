"""Weights of rows: those of a column, times those of the kinds of their events."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import pyarrow as pa

from twotower.config import Config, DataConfig
from twotower.core.arrow import pc
from twotower.core.errors import ConfigError, did_you_mean
from twotower.features.spec import FeatureSpec

# Readers of a history that weigh no event beside others.
_UNWEIGHTED_HISTORIES = ("causal", "bidirectional")
# Kinds that a message lists.
_LISTED_KINDS = 5


def with_event_weights(spec: FeatureSpec, config: Config) -> FeatureSpec:
    """Returns the features with `config.data.event_weights` as the weights of the user's history.

    A history that has weights of its own keeps them, and Transformers read none.
    """
    history = spec.history
    weights = config.data.weight_by_event()
    if history is None or history.weights or not weights:
        return spec
    # Weights would be read, and kept in each batch, for nothing.
    if config.model.history.kind in _UNWEIGHTED_HISTORIES:
        return spec
    weighted = dataclasses.replace(history, weights=weights)
    return dataclasses.replace(spec, user={**spec.user, history.name: weighted})


def check_event_weights(rows: pa.Table, data: DataConfig) -> list[str]:
    """Returns sentences on kinds of events without a weight, and on weights of no event.

    Args:
        rows: All interactions that the filters keep.
        data: Options `config.data`.

    Raises:
        ConfigError: The rows have no kinds, or most of them are of a kind that is not named.
    """
    field = "config.data.event_weights"
    weights = data.weight_by_event()
    if not weights:
        return []
    if "event" not in rows.column_names:
        known = ", ".join(rows.column_names)
        raise ConfigError(
            f"{field}={dict(data.event_weights)} needs a column 'event' of the interactions: name "
            f"it by config.data.interactions.columns={{'event': ...}}. There are: {known}."
        )
    counts = pc.value_counts(rows["event"])
    kinds = counts.field("values").to_pylist()
    return check_kinds(dict(zip(kinds, counts.field("counts").to_pylist())), data)


def check_kinds(count_by_kind: Mapping[str | None, int], data: DataConfig) -> list[str]:
    """Returns what `check_event_weights` does, by the number of rows of each kind.

    Args:
        count_by_kind: Kind of event -> its rows, in order of first appearance.
        data: Options `config.data`, with weights of events.

    Raises:
        ConfigError: Most rows are of a kind that is not named.
    """
    field = "config.data.event_weights"
    weights = data.weight_by_event()
    warnings = []
    known = [kind for kind in count_by_kind if kind is not None]
    # Kinds are compared as the weights will be looked up.
    folded = {kind.lower() for kind in known if data.fold_events}
    for name in data.event_weights:
        if name not in known and name.lower() not in folded:
            hint = did_you_mean(name, known)
            warnings.append(f"{field}: no row has the event {name!r}{hint}")
    others = {kind: count for kind, count in count_by_kind.items() if kind not in weights}
    if not others:
        return warnings
    total = sum(count_by_kind.values())
    share = sum(others.values()) / total
    listed = _list_kinds(others, total)
    # Where most rows have no weight, names are more likely misspelt than left out.
    if share > 0.5:
        raise ConfigError(
            f"{field}={dict(data.event_weights)} leaves {share:.1%} of the rows without a weight: "
            f"{listed}. Name these kinds too; a kind whose weight is 1 counts as without it."
            f"{_describe_cases(others, weights)}"
        )
    cases = _describe_cases(others, weights)
    return [*warnings, f"{field}: events without a weight count as 1: {listed}.{cases}"]


def _describe_cases(others: Mapping[str | None, int], weights: Mapping[str, float]) -> str:
    """Returns a sentence on a kind that differs from one with a weight by its case, or nothing."""
    folded = {event.lower(): event for event in weights}
    for kind in others:
        if kind is not None and kind.lower() in folded:
            event = folded[kind.lower()]
            return (
                f" {kind!r} differs from {event!r} by its case alone: "
                "config.data.fold_events=True gives it that weight."
            )
    return ""


def read_weights(rows: pa.Table, event_weights: Mapping[str, float]) -> np.ndarray:
    """Returns the weight of each row, float32 [N], 1 where nothing says otherwise.

    Args:
        rows: Interactions.
        event_weights: Weight by kind of event; {} for rows that weigh alike.

    Raises:
        ConfigError: A value of the column `weight` is negative or not finite.
    """
    weights = np.ones(len(rows), np.float32)
    if "weight" in rows.column_names:
        # A row without a weight counts like any row of a log that has no weights.
        filled = pc.fill_null(rows["weight"], 1.0)
        weights = filled.to_numpy().astype(np.float32)
        is_good = np.isfinite(weights) & (weights >= 0)
        # Tables were checked as they were read; a log in memory was not.
        bad_rows = np.flatnonzero(~is_good)
        if bad_rows.size:
            row = bad_rows[0]
            raise ConfigError(
                f"weight={weights[row]} in row {row + 1} of the interactions must be finite and "
                "at least 0."
            )
    if not event_weights:
        return weights
    kinds = pa.array(list(event_weights), pa.string())
    # One more weight behind the named ones, for events that are not named.
    weight_of_kind = np.append(list(event_weights.values()), 1.0).astype(np.float32)
    indices = pc.index_in(rows["event"], value_set=kinds)
    return weights * weight_of_kind[pc.fill_null(indices, len(kinds)).to_numpy()]


def check_any_weight(has_weight: bool) -> None:
    """Refuses training rows none of which has a weight above 0."""
    # A loss of 0 has no gradient, and would train without an error.
    if not has_weight:
        raise ConfigError(
            "weight is 0 in every training row: nothing would be learned. At least one must be "
            "above 0."
        )


def _list_kinds(counts: Mapping[str | None, int], total: int) -> str:
    """Returns the most frequent kinds with their shares, for a message."""
    frequent = sorted(counts, key=counts.__getitem__, reverse=True)
    parts = []
    for kind in frequent[:_LISTED_KINDS]:
        name = "none at all" if kind is None else repr(kind)
        parts.append(f"{name} ({counts[kind] / total:.1%})")
    if len(frequent) > _LISTED_KINDS:
        parts.append(f"{len(frequent) - _LISTED_KINDS} more")
    return ", ".join(parts)
