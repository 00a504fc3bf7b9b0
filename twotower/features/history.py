"""The history of a user, as requests hold it and as the user tower reads it.

A history is the events of a user before a moment, the latest last. It is encoded as several arrays
of its last L events, padded at the end:

    "history/item_id"   int32 [N, L], rows of the item's table, 0 is padding; one such array for
                        each feature of the item that is read. "history" is the feature's name.
    "history gap"       int32 [N, L], bucket of the time since the event before, from 1; 0 for the
                        first event. Only with `gaps`.
    "history until"     int32 [N, L], bucket of the time to the next event, and of the latest event
                        to the request; `gaps` + 1 for a missing time. Only with `request_gap`.
    "history weight"    float32 [N, L], log of the weight of each event in a bag. Only with
                        `weights` or `half_life`.

`twotower.pipeline.histories` makes the same arrays of the rows of a log.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from twotower.core.arrow import is_list, pc
from twotower.core.errors import ConfigError
from twotower.features.base import (
    Feature,
    Fitted,
    PlainValue,
    column_of,
    join_lists,
    pad_lists,
    prefix_errors,
)
from twotower.features.inputs import (
    HISTORY_TIME_SINCE_PREVIOUS,
    HISTORY_TIME_TO_NEXT,
    HISTORY_WEIGHT,
    Input,
    id_array,
)
from twotower.features.timestamp import as_seconds
from twotower.features.vocabulary import as_strings

_SECONDS_A_DAY = 86_400


@dataclasses.dataclass(frozen=True, kw_only=True)
class HistoryFeature(Feature):
    """The items of a user's strictly earlier interactions, a feature of the user tower alone.

    A specification has at most one. Requests hold it in `column`: item ids, or mappings
    {"item_id": ..., "event": ..., "timestamp": ...}, the latest last.

    Attributes:
        max_length: Number L of events kept, the latest ones.
        reads: Item features that are read at each event, from the tables of the item tower; the
            first is the id.
        gaps: Number of buckets of the time since the event before, floor(log2(1 + seconds)); 0 if
            that time is not read.
        request_gap: Whether to read with each event the time to the next one, in as many buckets,
            and with the latest event the time to the request. A user's vector then depends on
            the moment of the request: in training and evaluation that of the row to be predicted,
            of which nothing else is known; in serving the "timestamp" of the request, by default
            the newest time of the log. Only comparable with models that know that moment: most
            published figures of sequential recommenders are of models that do not.
        weights: Event name -> its weight in a bag, above 0; an event that is not named weighs 1.
            Empty for those of `config.data.event_weights`.
        half_life: Days in which the weight of an event in a bag falls by half; 0 for never.
    """

    # The length that SASRec was published with for all but MovieLens-1M.
    max_length: int = 50
    reads: tuple[str, ...] = ("item_id",)
    gaps: int = 0
    request_gap: bool = False
    weights: Mapping[str, float] = dataclasses.field(default_factory=dict)
    half_life: float = 0.0
    embedding_size: int = 0

    is_history: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        # Who had an item before is no property of the item that a request could bring.
        self._check(self.side == "user", "side", "user: items have no history")
        self._check(
            self.embedding_size == 0,
            "embedding_size",
            "left out: vectors are rows of the item's own tables",
        )
        self._check(bool(self.reads), "reads", "one or more features of the item, its id first")
        are_weights = all(_is_weight(weight) for weight in self.weights.values())
        self._check(are_weights, "weights", "a mapping of events to numbers above 0")
        # Both times share the number of buckets; 0 of them would leave nothing to read.
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
        # The very vocabulary of the items, so that a history's ids are rows of their table.
        return Fitted(vocabulary=item_ids.vocabulary, statistics={"newest": newest or 0})

    def read_items(self, fitted: Fitted, encoded: Mapping[str, np.ndarray]) -> Fitted:
        """Returns `fitted` with the features of items that are read besides their ids.

        Args:
            fitted: State of the history.
            encoded: Item feature -> [items, ...], the features in `reads`. Of items without a row
                of their own, only the id is read.
        """
        vocabulary = fitted.require_vocabulary()
        # By row of the id, because batches look items up by the ids of events.
        first, *others = self.reads
        ids = encoded[first]
        # Items in rows for unknown values share them, so their features would overwrite each other.
        known = ids >= vocabulary.first
        reads = {}
        for name in others:
            values = encoded[name]
            by_row = np.zeros((vocabulary.size, *values.shape[1:]), values.dtype)
            by_row[ids[known]] = values[known]
            reads[name] = by_row
        return dataclasses.replace(fitted, reads=reads)

    def encode_rows(self, fitted: Fitted, rows: pa.Table) -> dict[str, np.ndarray]:
        # Only with `request_gap`: a request may have a column of that name for other uses.
        request_times = None
        if self.request_gap and "timestamp" in rows.column_names:
            request_times = rows["timestamp"]
        with prefix_errors(self.location):
            return encode_histories(self, fitted, column_of(rows, self.column), request_times)

    def encode_value(self, fitted: Fitted, value: PlainValue) -> dict[str, np.ndarray] | None:
        # Times stand in a column of their own.
        if type(self) is not HistoryFeature or isinstance(value, str) or self.request_gap:
            return None
        items = value[-self.max_length :]
        rows = np.zeros(len(items), np.int64)
        return _encode_parsed(self, fitted, 1, rows, {"item_id": items}, None)

    def inputs(self, fitted: Fitted, items: Mapping[str, Input]) -> dict[str, Input]:
        inputs = {}
        for name in self.reads:
            item_input = items[name]
            inputs[f"{self.name}/{name}"] = dataclasses.replace(
                item_input, history_length=self.max_length
            )
        # Times belong to events, not to a feature of items, so the array of ids alone has them.
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
        feature: History feature.
        fitted: State of the feature.
        column: Lists of item ids or of mappings with "item_id", "event" and "timestamp", the latest
            event last; null is an empty history.
        request_times: Time of each request; None if it is not known.

    Raises:
        ConfigError: The column holds something else.
    """
    history_of_event, fields = _parse_events(feature, column)
    return _encode_parsed(feature, fitted, len(column), history_of_event, fields, request_times)


def _encode_parsed(
    feature: HistoryFeature,
    fitted: Fitted,
    count: int,
    history_of_event: np.ndarray,
    fields: Mapping[str, Any],
    request_times: pa.ChunkedArray | None,
) -> dict[str, np.ndarray]:
    """Returns the arrays of N histories whose events have been parsed.

    Args:
        feature: History feature.
        fitted: State of the feature.
        count: Number N of histories.
        history_of_event: Row of each event's history, [M], ascending.
        fields: Fields of the events, as `_parse_events` returns them; ids may be a list of texts.
        request_times: Time of each request; None if it is not known.
    """
    # Without `gaps` and `half_life` no time is looked at, so a log without times serves.
    known_times = None
    times = None
    if feature.reads_times:
        known_times = _event_times(feature, fields.get("timestamp"), len(history_of_event))
        # An event without a time weighs as if it were of the newest moment of the training rows.
        times = np.where(np.isnan(known_times), fitted.statistics["newest"], known_times)
    events = encode_events(feature, fitted, fields["item_id"], fields.get("event"), times)
    if feature.gaps and times is not None:
        buckets = _buckets_since_previous(feature, times, history_of_event)
        events[HISTORY_TIME_SINCE_PREVIOUS] = buckets
    if feature.request_gap and known_times is not None:
        requested = np.full(count, np.nan)
        if request_times is not None:
            requested = _seconds(feature, request_times)
        buckets = _buckets_to_next(feature, known_times, history_of_event, requested)
        events[HISTORY_TIME_TO_NEXT] = buckets

    arrays = {}
    for name, values in events.items():
        arrays[name] = pad_lists(history_of_event, values, count, feature.max_length)
    # Padding reads row 0, which is zeros in every array of features.
    ids = arrays[id_array(arrays)]
    reads = read_arrays(feature, fitted)
    return arrays | {name: values[ids] for name, values in reads.items()}


def _buckets_since_previous(
    feature: HistoryFeature, times: np.ndarray, history_of_event: np.ndarray
) -> np.ndarray:
    """Returns the bucket of the time since the event before, int32 [M]; 0 for first events."""
    # `prepend` keeps one difference for each event; the first of them is replaced below.
    buckets = time_buckets(feature, np.diff(times, prepend=times[:1]))
    # The differences run across histories; the time before the first event is not known.
    buckets[np.diff(history_of_event, prepend=-1) > 0] = 0
    return buckets


def _buckets_to_next(
    feature: HistoryFeature, times: np.ndarray, history_of_event: np.ndarray, requested: np.ndarray
) -> np.ndarray:
    """Returns the bucket of the time to the next event or, after the latest, to the request.

    Args:
        feature: History feature.
        times: Time of each event in seconds, float64 [M], NaN if it is not known.
        history_of_event: Row of each event's history, [M], ascending.
        requested: Time of each of the N requests in seconds, float64 [N], NaN if it is not known.

    Returns:
        int32 [M].
    """
    seconds = np.diff(times, append=times[-1:])
    # After the latest event of a history comes the request, not the next history.
    is_latest = np.diff(history_of_event, append=len(requested)) > 0
    seconds[is_latest] = requested[history_of_event[is_latest]] - times[is_latest]
    return time_buckets(feature, seconds)


def encode_events(
    feature: HistoryFeature,
    fitted: Fitted,
    items: pa.Array | pa.ChunkedArray | list[str],
    event_names: pa.Array | pa.ChunkedArray | None,
    times: np.ndarray | None,
) -> dict[str, np.ndarray]:
    """Returns the arrays [M] of single events: the row of the item and the log of the weight.

    Without weights and half-life there is no array of weights.

    Args:
        feature: History feature.
        fitted: State of the feature.
        items: Item ids [M], as texts where they are few.
        event_names: Kind of each event [M], such as "view"; None if it is not known.
        times: Time of each event [M] in seconds; only a `half_life` reads it.
    """
    vocabulary = fitted.require_vocabulary()
    if isinstance(items, list):
        ids = vocabulary.rows_of_texts(items)
    else:
        ids = vocabulary.rows(items)
    arrays = {f"{feature.name}/{feature.reads[0]}": ids}
    if feature.is_weighted:
        arrays[HISTORY_WEIGHT] = log_weights(feature, fitted, len(items), event_names, times)
    return arrays


def log_weights(
    feature: HistoryFeature,
    fitted: Fitted,
    count: int,
    event_names: pa.Array | pa.ChunkedArray | None,
    times: np.ndarray | None,
) -> np.ndarray:
    """Returns the logs of the weights of single events, float32 [M].

    Args:
        feature: History feature.
        fitted: State of the feature.
        count: Number M of events.
        event_names: Kind of each event [M], such as "view"; None if it is not known.
        times: Time of each event [M] in seconds; only a `half_life` reads it.
    """
    # float64 until the end: ages in seconds are large beside the logs of weights.
    logs = np.zeros(count)
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
    return logs.astype(np.float32)


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
) -> tuple[np.ndarray, dict[str, pa.Array]]:
    """Returns the events that histories keep.

    Returns:
        The row of each event's history [M], ascending, and the fields of the events: "item_id" and,
        if the column has them, "event" and "timestamp".
    """
    # Requests need not bring one.
    if pa.types.is_null(column.type):
        return np.zeros(0, np.int64), {"item_id": pa.array([], pa.string())}
    lists = _as_lists(feature, column)
    members = lists.flatten()
    fields = _event_fields(feature, members)
    # A single request with no event to leave out in the middle: the end of its list is kept.
    if len(lists) == 1 and not fields["item_id"].null_count:
        start = max(0, len(members) - feature.max_length)
        latest = {name: values.slice(start) for name, values in fields.items()}
        return np.zeros(len(members) - start, np.int64), latest
    history_of_event = pc.list_parent_indices(lists).to_numpy()
    # Cut before anything is looked up: requests may bring years of events.
    kept = _latest_events(fields["item_id"], history_of_event, len(column), feature.max_length)
    fields = {name: values.filter(pa.array(kept)) for name, values in fields.items()}
    return history_of_event[kept], fields


def _event_times(feature: HistoryFeature, timestamps: pa.Array | None, count: int) -> np.ndarray:
    """Returns the times of events in seconds, float64 [M], NaN for missing ones."""
    if timestamps is None:
        return np.full(count, np.nan)
    return _seconds(feature, pa.chunked_array([timestamps]))


def _as_lists(feature: HistoryFeature, column: pa.ChunkedArray) -> pa.ListArray | pa.LargeListArray:
    if not is_list(column.type):
        raise ConfigError(
            f"{feature.location}: column {feature.column!r} holds {column.type}; a history is a "
            "list of item ids, or of mappings with an item_id, the latest last."
        )
    # A request has one chunk, which is read as it is.
    if column.num_chunks == 1 and pa.types.is_list(column.type):
        return column.chunk(0)
    return join_lists(column)


def _event_fields(feature: HistoryFeature, events: pa.Array) -> dict[str, pa.Array]:
    """Returns the fields of events: "item_id", and of mappings also "event" and "timestamp"."""
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


def _latest_events(
    items: pa.Array, history_of_event: np.ndarray, count: int, length: int
) -> np.ndarray:
    """Returns a mask of the last `length` events with an item of each history, bool [M]."""
    valid = pc.is_valid(items).to_numpy(zero_copy_only=False)
    valid_in_history = np.bincount(history_of_event[valid], minlength=count)
    # Counts within a history are differences of running counts, without a loop over histories.
    running = np.cumsum(valid)
    # Position of the first event of each event's history.
    first = np.searchsorted(history_of_event, history_of_event, side="left")
    running_within = running - np.append(0, running)[first]
    # Counted from the end, because the latest events are kept.
    following = valid_in_history[history_of_event] - running_within
    return valid & (following < length)


def _seconds(feature: HistoryFeature, column: pa.ChunkedArray) -> np.ndarray:
    """Returns seconds since the epoch, NaN for missing times."""
    seconds, missing = as_seconds(column, f"{feature.location}: column 'timestamp'")
    return np.where(missing, np.nan, seconds)
