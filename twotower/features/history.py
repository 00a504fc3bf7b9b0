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
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from twotower.core.arrow import pc
from twotower.core.errors import ConfigError
from twotower.features.encodings import Fitted
from twotower.features.kinds import HistoryFeature
from twotower.features.numeric import as_seconds
from twotower.features.text import pad_lists
from twotower.features.vocabulary import as_strings

# Names of the arrays that stand beside the items of a history.
HISTORY_TIME_SINCE_PREVIOUS = "history gap"
HISTORY_TIME_TO_NEXT = "history until"
HISTORY_WEIGHT = "history weight"
# Two more where whole sequences are packed into rows [B, S].
HISTORY_SEGMENT = "history segment"
HISTORY_POSITION = "history position"

_BESIDE_ITEMS = (HISTORY_TIME_SINCE_PREVIOUS, HISTORY_TIME_TO_NEXT, HISTORY_WEIGHT)
_SECONDS_A_DAY = 86_400


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
    lists = _as_lists(feature, column)
    owners = pc.list_parent_indices(lists).to_numpy()
    fields = _event_fields(feature, pc.list_flatten(lists))
    kept = _latest_events(fields["item_id"], owners, count, feature.max_length)
    owners = owners[kept]
    fields = {name: values.filter(pa.array(kept)) for name, values in fields.items()}
    lengths = np.bincount(owners, minlength=count)
    ends = np.cumsum(lengths)
    starts = ends - lengths
    has_events = lengths > 0

    times = known_times = None
    if feature.reads_times:
        timestamps = fields.get("timestamp", pa.nulls(len(owners), pa.int64())).cast(pa.int64())
        is_missing = timestamps.is_null().to_numpy(zero_copy_only=False)
        # An event without a time weighs as if it were of the newest moment of the training rows.
        filled = pc.fill_null(timestamps, fitted.numbers["newest"])
        times = filled.to_numpy().astype(np.int64)
        known_times = np.where(is_missing, np.nan, times)
    items = pa.chunked_array([fields["item_id"]])
    events = encode_events(feature, fitted, items, fields.get("event"), times)
    if feature.gaps and times is not None:
        since_previous = time_buckets(feature, np.diff(times, prepend=times[:1]))
        since_previous[starts[has_events]] = 0
        events[HISTORY_TIME_SINCE_PREVIOUS] = since_previous
    if feature.request_gap and known_times is not None:
        seconds = np.diff(known_times, append=known_times[-1:])
        last = ends[has_events] - 1
        requested = np.full(count, np.nan)
        if request_times is not None:
            requested = _seconds(feature, request_times)
        seconds[last] = requested[has_events] - known_times[last]
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
        times: Times int64 [M] in seconds; only a `half_life` reads them.
    """
    assert fitted.vocabulary is not None
    arrays = {f"{feature.name}/{feature.reads[0]}": fitted.vocabulary.rows(items)}
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
        logs = logs + np.log(2) * (times - fitted.numbers["newest"]) / half_life
    return arrays | {HISTORY_WEIGHT: logs.astype(np.float32)}


def time_buckets(feature: HistoryFeature, seconds: np.ndarray) -> np.ndarray:
    """Returns the buckets int32 of times: from 1 to `gaps`, and `gaps` + 1 for NaN."""
    known = np.maximum(np.nan_to_num(seconds), 0)
    buckets = np.minimum(np.log2(1 + known), feature.gaps - 1).astype(np.int32)
    return np.where(np.isnan(seconds), feature.gaps + 1, 1 + buckets).astype(np.int32)


def id_array(names: Iterable[str]) -> str:
    """Returns the name of the array that holds the ids of the items of a history.

    It is looked up rather than taken as the first: `jit` sorts dictionaries by name.
    """
    return next(name for name in names if name not in _BESIDE_ITEMS)


def read_arrays(feature: HistoryFeature, fitted: Fitted) -> dict[str, np.ndarray]:
    """Returns array name -> [V, ...], the features of an item that are read beside its id."""
    return {f"{feature.name}/{name}": values for name, values in fitted.reads.items()}


def read_items(
    feature: HistoryFeature, fitted: Fitted, encoded: Mapping[str, np.ndarray]
) -> Fitted:
    """Returns `fitted` with the features of items that the history reads beside their ids.

    Args:
        feature: The history feature.
        fitted: The state that the encoder fitted for it.
        encoded: Item feature -> [items, ...], the features that the history reads. Items without a
            row of their own are read by their id alone.
    """
    vocabulary = fitted.vocabulary
    assert vocabulary is not None
    first, *others = feature.reads
    ids = encoded[first]
    known = ids >= vocabulary.first
    reads = {}
    for name in others:
        values = encoded[name]
        by_row = np.zeros((vocabulary.size, *values.shape[1:]), values.dtype)
        by_row[ids[known]] = values[known]
        reads[name] = by_row
    return dataclasses.replace(fitted, reads=reads)


def _as_lists(feature: HistoryFeature, column: pa.ChunkedArray) -> Any:
    """Returns the column as one array of large lists."""
    kind = column.type
    if pa.types.is_null(kind):
        return pa.array([None] * len(column), pa.large_list(pa.string()))
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    if not (is_list or pa.types.is_fixed_size_list(kind)):
        raise ConfigError(
            f"{feature.where}: column {feature.column!r} holds {kind}; a history is a list of item "
            "ids, or of mappings with an item_id, the latest last."
        )
    kind = pa.large_list(kind.value_type)
    if not column.num_chunks:
        return pa.array([], kind)
    return pa.concat_arrays([chunk.cast(kind) for chunk in column.chunks])


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
            f"{feature.where}: the events of a history must have an item_id; these have {kind}."
        )
    return fields


def _latest_events(items: Any, owners: np.ndarray, count: int, length: int) -> np.ndarray:
    """Returns a mask bool [M] of the last `length` events of each history that name an item."""
    valid = pc.is_valid(items).to_numpy(zero_copy_only=False)
    valid_of_owner = np.bincount(owners[valid], minlength=count)
    running = np.cumsum(valid)
    first = np.searchsorted(owners, owners, side="left")
    running_within = running - np.append(0, running)[first]
    following = valid_of_owner[owners] - running_within
    return valid & (following < length)


def _seconds(feature: HistoryFeature, column: pa.ChunkedArray) -> np.ndarray:
    """Returns seconds since the epoch, NaN where missing."""
    seconds, missing = as_seconds(column, f"{feature.where}, column 'timestamp'")
    return np.where(missing, np.nan, seconds)
