"""The history of a user, as a request brings it and as the user tower reads it.

A history is what a user had done before a moment, the latest event last. It is several arrays of
its last L events, padded behind the last one:

    "history/item_id"   int32 [N, L], rows of the item's table, 0 is padding; one such array for
                        each feature of the item that is read. "history" is the feature's name.
    "history gap"       int32 [N, L], bucket of the time since the event before, from 1; 0 for the
                        first event. Only with `gaps`.
    "history until"     int32 [N, L], bucket of the time to the next event, and of the latest event
                        to the request; `gaps` + 1 where a time is missing. Only with `request_gap`.
    "history weight"    float32 [N, L], log of the weight of each event in a bag. Only with
                        `weights` or `half_life`.

`twotower.pipeline.histories` makes the same arrays of the rows of a log.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from twotower.core.arrow import pc
from twotower.core.errors import ConfigError
from twotower.features.base import (
    HISTORY_TIME_SINCE_PREVIOUS,
    HISTORY_TIME_TO_NEXT,
    HISTORY_WEIGHT,
    Feature,
    Fitted,
    Input,
    column_of,
    id_array,
    is_list,
    join_lists,
    pad_lists,
    prefix_errors,
)
from twotower.features.timestamp import as_seconds
from twotower.features.vocabulary import as_strings

_SECONDS_A_DAY = 86_400


@dataclasses.dataclass(frozen=True, kw_only=True)
class HistoryFeature(Feature):
    """The items of a user's strictly earlier interactions: a feature of the user tower, at most
    one.

    Requests bring it in `column`: item ids, or {"item_id": ..., "event": ..., "timestamp": ...},
    the latest last.

    Attributes:
        max_length: Events L kept, the latest ones.
        reads: Item features that are read at each event, from the tables of the item tower; the
            first is the id.
        gaps: Buckets of the time since the event before, floor(log2(1 + seconds)); 0: not read.
        request_gap: Whether to read beside each event the time to the one that follows, in as many
            buckets, and beside the latest the time to the request. A user's vector then depends on
            the moment of the request: in training and evaluation that of the row to be predicted,
            of which nothing else is known; in serving the "timestamp" of the request, by default
            the newest time of the log. Only comparable with models that know that moment: most
            published figures of sequential recommenders are of models that do not.
        weights: Event name -> its weight in a bag, above 0; an event that is not named weighs 1.
        half_life: Days in which the weight of an event in a bag falls by half; 0: never.
    """

    max_length: int = 50
    reads: tuple[str, ...] = ("item_id",)
    gaps: int = 0
    request_gap: bool = False
    weights: Mapping[str, float] = dataclasses.field(default_factory=dict)
    half_life: float = 0.0
    embedding_size: int = 0

    def __post_init__(self):
        super().__post_init__()
        self._check(self.side == "user", "side", "user: items have no history")
        self._check(
            self.embedding_size == 0,
            "embedding_size",
            "left out: vectors are rows of the item's own tables",
        )
        self._check(bool(self.reads), "reads", "one or more features of the item, its id first")
        are_weights = all(_is_weight(weight) for weight in self.weights.values())
        self._check(are_weights, "weights", "a mapping of events to numbers above 0")
        has_buckets = bool(self.gaps) or not self.request_gap
        self._check(has_buckets, "gaps", "how many buckets request_gap has")
        self._check_at_least(1, "max_length")
        self._check_at_least(0, "gaps", "half_life")

    @property
    def has_table(self) -> bool:
        return False

    @property
    def is_weighted(self) -> bool:
        """Whether events differ in weight."""
        return bool(self.weights or self.half_life)

    @property
    def reads_times(self) -> bool:
        """Whether the times of events are read."""
        return bool(self.gaps or self.half_life)

    def fit_to_items(self, item_ids: Fitted, newest: int | None) -> Fitted:
        """Fits the history: the ids of items, and the moment that ages are counted from.

        Args:
            item_ids: The state of the item feature that `reads` begins with.
            newest: Latest training timestamp in seconds; None in a log without times.
        """
        return Fitted(vocabulary=item_ids.vocabulary, statistics={"newest": newest or 0})

    def read_items(self, fitted: Fitted, encoded: Mapping[str, np.ndarray]) -> Fitted:
        """Returns `fitted` with the features of items that are read beside their ids.

        Args:
            fitted: The state of the history.
            encoded: Item feature -> [items, ...], the features in `reads`. Items without a row of
                their own are read by their id alone.
        """
        vocabulary = fitted.require_vocabulary()
        # By row of the id, because batches look items up by the ids of events.
        first, *others = self.reads
        ids = encoded[first]
        known = ids >= vocabulary.first
        reads = {}
        for name in others:
            values = encoded[name]
            by_row = np.zeros((vocabulary.size, *values.shape[1:]), values.dtype)
            by_row[ids[known]] = values[known]
            reads[name] = by_row
        return dataclasses.replace(fitted, reads=reads)

    def encode_rows(self, fitted: Fitted, rows: pa.Table) -> dict[str, np.ndarray]:
        # Read only where it counts: a request may bring a column of that name for other uses.
        request_times = None
        if self.request_gap and "timestamp" in rows.column_names:
            request_times = rows["timestamp"]
        with prefix_errors(self.location):
            return encode_histories(self, fitted, column_of(rows, self.column), request_times)

    def inputs(self, fitted: Fitted, items: Mapping[str, Input]) -> dict[str, Input]:
        inputs = {
            f"{self.name}/{name}": dataclasses.replace(items[name], history_length=self.max_length)
            for name in self.reads
        }
        # What stands beside the items is said once, by the array of ids.
        ids = f"{self.name}/{self.reads[0]}"
        inputs[ids] = dataclasses.replace(
            inputs[ids], time_buckets=self.gaps, time_to_next=self.request_gap
        )
        return inputs


def encode_histories(
    feature: HistoryFeature,
    fitted: Fitted,
    column: pa.ChunkedArray,
    request_times: pa.ChunkedArray | None = None,
) -> dict[str, np.ndarray]:
    """Returns the arrays [N, L, ...] of the raw histories of requests.

    Args:
        feature: The history feature.
        fitted: The state that the encoder fitted for it.
        column: Lists of item ids or of mappings with "item_id", "event" and "timestamp", the latest
            event last; null is an empty history.
        request_times: The time of each request; None where it is not known.

    Raises:
        ConfigError: The column holds something else.
    """
    count = len(column)
    owners, fields = _parse_events(feature, column)
    known_times = times = None
    if feature.reads_times:
        known_times = _event_times(fields.get("timestamp"), len(owners))
        # An event without a time weighs as if it were of the newest moment of the training rows.
        times = np.where(np.isnan(known_times), fitted.statistics["newest"], known_times)
    items = pa.chunked_array([fields["item_id"]])
    events = encode_events(feature, fitted, items, fields.get("event"), times)
    if feature.gaps and times is not None:
        seconds = np.diff(times, prepend=times[:1])
        buckets = time_buckets(feature, seconds)
        # The differences run across histories; what was before the first event is not known.
        buckets[np.diff(owners, prepend=-1) > 0] = 0
        events[HISTORY_TIME_SINCE_PREVIOUS] = buckets
    if feature.request_gap and known_times is not None:
        seconds = np.diff(known_times, append=known_times[-1:])
        # After the latest event of a history comes the request, not the next history.
        latest = np.diff(owners, append=count) > 0
        requested = np.full(count, np.nan)
        if request_times is not None:
            requested = _seconds(feature, request_times)
        seconds[latest] = requested[owners[latest]] - known_times[latest]
        events[HISTORY_TIME_TO_NEXT] = time_buckets(feature, seconds)

    arrays = {
        name: pad_lists(owners, values, count, feature.max_length)
        for name, values in events.items()
    }
    ids = arrays[id_array(arrays)]
    reads = read_arrays(feature, fitted)
    return arrays | {name: values[ids] for name, values in reads.items()}


def encode_events(
    feature: HistoryFeature,
    fitted: Fitted,
    items: pa.ChunkedArray,
    event_names: pa.Array | pa.ChunkedArray | None,
    times: np.ndarray | None,
) -> dict[str, np.ndarray]:
    """Returns the arrays [M] of single events: the row of the item and, where events differ in
    weight, its logarithm.

    Args:
        feature: The history feature.
        fitted: The state that the encoder fitted for it.
        items: Item ids [M].
        event_names: Names [M] of what happened, such as "view"; None where they are not known.
        times: Times [M] in seconds; only a `half_life` reads them.
    """
    ids = fitted.require_vocabulary().rows(items)
    arrays = {f"{feature.name}/{feature.reads[0]}": ids}
    if not feature.is_weighted:
        return arrays
    logs = np.zeros(len(items))
    if feature.weights and event_names is not None:
        names = pa.array(list(feature.weights), pa.large_string())
        # One more weight behind the named ones: an event that is not named weighs 1.
        weights = np.append(list(feature.weights.values()), 1.0)
        indices = pc.index_in(as_strings(event_names), value_set=names)
        logs = np.log(weights)[pc.fill_null(indices, len(names)).to_numpy()]
    if feature.half_life and times is not None:
        half_life = _SECONDS_A_DAY * feature.half_life
        # Ages are counted from a fixed moment: in a bag only the differences of logs matter.
        logs = logs + np.log(2) * (times - fitted.statistics["newest"]) / half_life
    return arrays | {HISTORY_WEIGHT: logs.astype(np.float32)}


def time_buckets(feature: HistoryFeature, seconds: np.ndarray) -> np.ndarray:
    """Returns the buckets int32 of times: from 1 to `gaps`, and `gaps` + 1 for NaN."""
    # Clocks of different machines disagree: an event before its predecessor is one at once.
    known = np.maximum(np.nan_to_num(seconds), 0)
    buckets = np.minimum(np.log2(1 + known), feature.gaps - 1).astype(np.int32)
    return np.where(np.isnan(seconds), feature.gaps + 1, 1 + buckets).astype(np.int32)


def read_arrays(feature: HistoryFeature, fitted: Fitted) -> dict[str, np.ndarray]:
    """Returns array name -> [V, ...], the features of an item that are read beside its id."""
    return {f"{feature.name}/{name}": values for name, values in fitted.reads.items()}


def _is_weight(value: Any) -> bool:
    return isinstance(value, (int, float)) and 0 < value < math.inf


def _parse_events(
    feature: HistoryFeature, column: pa.ChunkedArray
) -> tuple[np.ndarray, dict[str, Any]]:
    """Reads the events that histories keep.

    Returns:
        The row [M] of each event's history, ascending, and the fields of the events: "item_id" and,
        where the column has them, "event" and "timestamp".
    """
    lists = _as_lists(feature, column)
    owners = pc.list_parent_indices(lists).to_numpy()
    fields = _event_fields(feature, pc.list_flatten(lists))
    # Cut before anything is looked up: requests may bring years of events.
    kept = _latest_events(fields["item_id"], owners, len(column), feature.max_length)
    fields = {name: values.filter(pa.array(kept)) for name, values in fields.items()}
    return owners[kept], fields


def _event_times(timestamps: Any, count: int) -> np.ndarray:
    """Returns the times float64 [M] of events in seconds, NaN where missing."""
    if timestamps is None:
        return np.full(count, np.nan)
    seconds = timestamps.cast(pa.int64()).cast(pa.float64(), safe=False)
    return pc.fill_null(seconds, np.nan).to_numpy()


def _as_lists(feature: HistoryFeature, column: pa.ChunkedArray) -> pa.LargeListArray:
    if pa.types.is_null(column.type):
        return pa.array([None] * len(column), pa.large_list(pa.string()))
    if not is_list(column.type):
        raise ConfigError(
            f"{feature.location}: column {feature.column!r} holds {column.type}; a history is a "
            "list of item ids, or of mappings with an item_id, the latest last."
        )
    return join_lists(column)


def _event_fields(feature: HistoryFeature, events: Any) -> dict[str, Any]:
    """Returns the fields of events: "item_id" and, where they are mappings that have them, "event"
    and "timestamp"."""
    kind = events.type
    if not pa.types.is_struct(kind):
        return {"item_id": events}
    names = ("item_id", "event", "timestamp")
    fields = {name: events.field(name) for name in names if kind.get_field_index(name) >= 0}
    if "item_id" not in fields or pa.types.is_struct(fields["item_id"].type):
        raise ConfigError(
            f"{feature.location}: the events of a history must have an item_id; these have {kind}."
        )
    return fields


def _latest_events(items: Any, owners: np.ndarray, count: int, length: int) -> np.ndarray:
    """Returns a mask bool [M] of the last `length` events of each history that name an item."""
    valid = pc.is_valid(items).to_numpy(zero_copy_only=False)
    valid_of_owner = np.bincount(owners[valid], minlength=count)
    running = np.cumsum(valid)
    first = np.searchsorted(owners, owners, side="left")
    running_within = running - np.append(0, running)[first]
    # Counted from the end, because the latest events are kept.
    following = valid_of_owner[owners] - running_within
    return valid & (following < length)


def _seconds(feature: HistoryFeature, column: pa.ChunkedArray) -> np.ndarray:
    """Returns seconds since the epoch, NaN where missing."""
    seconds, missing = as_seconds(column, f"{feature.location}, column 'timestamp'")
    return np.where(missing, np.nan, seconds)
