"""Histories: what a user had done before a moment, the latest last, as arrays of the last L events.

The events of all users lie in flat arrays, by user and then in time, so that a history is a span of
them: two numbers, whatever its length. `windows` makes arrays of spans, on the host or inside
`jit`:

    "history/item_id"  int32 [N, L], rows of the item's table, 0 after the last event; one such
    array for each feature read "history gap"      int32 [N, L], bucket of the time since the event
    before, from 1; 0 where there is none "history until"    int32 [N, L], likewise until the event
    after, and of the latest event until the request; `gaps` + 1 where
                       one of these times is missing. Only with `request_gap`, and then each span
                       has a third number: the bucket of its latest event
    "history weight"   float32 [N, L], log of the weight of each event beside that of the others

An event is earlier when its time is: events of the same second do not know of each other. Without
times the order of the file is the time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from twotower.core.arrow import pc
from twotower.core.errors import ConfigError
from twotower.data.interactions import Split
from twotower.features.encodings import HISTORY_GAP, HISTORY_UNTIL, HISTORY_WEIGHT, Fitted
from twotower.features.numeric import as_seconds
from twotower.features.vocabulary import as_strings

# Part of a split -> the parts whose events its rows may know of; "now" is what a served user is
# asked with.
KNOWN = {"train": (0,), "validation": (0,), "test": (0, 1), "now": (0, 1, 2)}
# Which of these have events of their own: validation rows know what training rows know.
_STORED = {"train": "train", "validation": "train", "test": "test", "now": "now"}
_DAY = 86_400
_BESIDE = (HISTORY_GAP, HISTORY_UNTIL, HISTORY_WEIGHT)  # what stands beside the items
# The name, in the context of a row, of the span of its history.
SPANS = "history span"


@dataclasses.dataclass(frozen=True, eq=False)
class Histories:
    """The events of a log, and the histories that they make.

    Attributes:
        fitted: the history feature.
        events: array -> [M, ...], those that training rows know of first.
        offsets: "train", "test" or "now" -> int64 [U + 1], where the events of each user begin.
        orders: likewise -> int64 [events], their places among the rows of all parts joined.
        spans: part -> int32 [rows, 2 or 3], the history of each of its rows: first event, and the
            one after the last.
        times: int64 [M], of the events, in seconds; empty without.
    """

    fitted: Fitted
    events: Mapping[str, np.ndarray]
    offsets: Mapping[str, np.ndarray]
    orders: Mapping[str, np.ndarray]
    spans: Mapping[str, np.ndarray]
    times: np.ndarray

    @property
    def length(self) -> int:
        """L."""
        return self.fitted.feature.max_length

    @property
    def reads(self) -> dict[str, np.ndarray]:
        """Array -> [V, ...], what is read of an item beside its id, by the row of the id."""
        return {f"{self.fitted.feature.name}/{of}": x for of, x in self.fitted.reads.items()}

    @property
    def trained(self) -> dict[str, np.ndarray]:
        """The events that training rows know of."""
        return {name: x[: len(self.orders["train"])] for name, x in self.events.items()}

    def take(self, spans: np.ndarray) -> dict[str, np.ndarray]:
        """The arrays of some histories."""
        return windows(self.events, self.reads, spans, self.length)

    def now(self, users: np.ndarray, asked: np.ndarray | None = None) -> np.ndarray:
        """int32 [N, 2 or 3], the histories of users as they stand at the end of the log.

        Args:
            asked: [N], when each is asked about, in seconds; the newest time of the log by default.
        """
        begin, end = self.offsets["now"][users], self.offsets["now"][np.asarray(users) + 1]
        return _spans(
            self.fitted,
            begin,
            end,
            self.times,
            self.times.max(initial=0) if asked is None else asked,
        )

    def stored(self, raw: Split) -> pa.Array:
        """The raw histories of all users as they stand at the end of the log, such as a request
        would bring them."""
        spans = self.now(np.arange(len(self.offsets["now"]) - 1))
        lengths = spans[:, 1] - spans[:, 0]
        ends = np.cumsum(lengths)
        places = np.repeat(spans[:, 0] - (ends - lengths), lengths) + np.arange(
            ends[-1] if len(ends) else 0
        )
        rows = pa.array(self.orders["now"][places - self.offsets["now"][0]])
        log = pa.concat_tables([raw.train, raw.validation, raw.test], promote_options="default")
        needed = {
            "item_id": True,
            "event": self.fitted.feature.weights,
            "timestamp": _is_timed(self.fitted),
        }
        fields = [name for name, read in needed.items() if read]
        values = [log[name].combine_chunks().take(rows) for name in fields]
        flat = values[0] if len(fields) == 1 else pa.StructArray.from_arrays(values, fields)
        return pa.ListArray.from_arrays(pa.array(np.append(0, ends).astype(np.int32)), flat)


def windows(
    events: Mapping[str, Any], reads: Mapping[str, Any], spans: Any, length: int
) -> dict[str, Any]:
    """The arrays [N, L] of spans [N, 2 or 3] of at most L events, filled up with 0; of NumPy
    arrays, or inside `jit`."""
    slot = np.arange(length, dtype=np.int32)[None]
    places = spans[:, :1] + slot
    valid = places < spans[:, 1:2]
    found = read_events(events, reads, places * valid, valid, first=slot == 0)
    if HISTORY_UNTIL in found:
        latest = places == spans[:, 1:2] - 1
        found[HISTORY_UNTIL] = found[HISTORY_UNTIL] * ~latest + spans[:, 2:] * latest
    return found


def read_events(
    events: Mapping[str, Any], reads: Mapping[str, Any], places: Any, valid: Any, *, first: Any
) -> dict[str, Any]:
    """The arrays of single events [N, S], 0 where not `valid`; the gap of a `first` one is not
    known."""
    found = {name: x[places] * valid for name, x in events.items()}
    if HISTORY_GAP in found:
        found[HISTORY_GAP] = found[HISTORY_GAP] * ~first
    ids = next((x for name, x in found.items() if name not in _BESIDE))  # `jit` sorts by name
    return found | {name: x[ids] for name, x in reads.items()}


def build_histories(
    fitted: Fitted,
    raw: Split,
    users: Sequence[np.ndarray],
    times: Sequence[np.ndarray | None],
    num_users: int,
) -> Histories:
    """The histories of the rows of a split.

    Args:
        users: of train, validation and test: row of the users table.
        times: likewise, in seconds; None without.

    Raises:
        ConfigError: the log lacks a column that the feature reads.
    """
    log = pa.concat_tables([raw.train, raw.validation, raw.test], promote_options="default")
    part, user = (
        np.repeat(np.arange(3), [len(x) for x in users]),
        np.concatenate(users).astype(np.int64),
    )
    timed = all(time is not None for time, x in zip(times, users) if len(x))
    time = np.concatenate([t for t in times if t is not None]) if timed else None
    _check_columns(fitted, log, timed)
    place = raw.file_order()
    # When each row happened as a number from 0 on, dense, so that one key orders users and times.
    when = np.unique(time if timed else place, return_inverse=True)[1]
    keys = user * (when.max(initial=0) + 1) + when
    columns = _event_arrays(
        fitted, log["item_id"], log["event"] if "event" in log.column_names else None, time
    )
    events, offsets, orders, ends = [], {}, {}, {}
    base = 0
    for name in ("train", "test", "now"):
        chosen = np.flatnonzero(np.isin(part, KNOWN[name]))
        order = orders[name] = chosen[np.lexsort((place[chosen], keys[chosen]))]
        offsets[name] = base + np.append(
            0, np.cumsum(np.bincount(user[chosen], minlength=num_users))
        )
        events.append(
            {n: x[order] for n, x in columns.items()}
            | _gaps(fitted, time, order)
            | _until(fitted, time, order)
        )
        for asked, known in _STORED.items():
            if known == name and asked != "now":
                rows = part == list(KNOWN).index(asked)
                ends[asked] = (
                    rows,
                    offsets[name][user[rows]],
                    base + np.searchsorted(keys[order], keys[rows], side="left"),
                )
        base += len(order)
    joined = {n: np.concatenate([level[n] for level in events]) for n in events[0]}
    times = np.concatenate([time[order] for order in orders.values()]) if timed else np.zeros(0)
    spans = {
        asked: _spans(fitted, begin, end, times, time[rows] if timed else np.nan)
        for asked, (rows, begin, end) in ends.items()
    }
    return Histories(fitted, joined, offsets, orders, spans, times)


def encode_histories(
    fitted: Fitted, column: pa.ChunkedArray, *, asked: pa.ChunkedArray | None = None
) -> dict[str, np.ndarray]:
    """The arrays of raw histories: lists of item ids or of mappings, the latest last; null is an
    empty one.

    Args:
        asked: when each is asked for; None: not known.
    """
    feature, count = fitted.feature, len(column)
    lists = _as_lists(fitted, column)
    owners, flat = pc.list_parent_indices(lists).to_numpy(), pc.list_flatten(lists)
    fields = {
        n: flat.field(n)
        for n in ("item_id", "event", "timestamp")
        if pa.types.is_struct(flat.type) and _has(flat, n)
    }
    items = fields.get("item_id", flat)
    if pa.types.is_struct(items.type):
        raise ConfigError(
            f"{feature.where}: the events of a history must have an item_id; these have {flat.type}."
        )
    kept = pc.is_valid(items).to_numpy(zero_copy_only=False)
    after = np.bincount(owners[kept], minlength=count)[owners] - _running(
        kept, owners
    )  # how many kept ones follow
    kept &= after < feature.max_length
    chosen, owners = pa.array(kept), owners[kept]
    time = known = None
    if _is_timed(fitted):
        given = (
            fields.get("timestamp", pa.nulls(len(flat), pa.int64())).filter(chosen).cast(pa.int64())
        )
        time = pc.fill_null(given, fitted.numbers["newest"]).to_numpy().astype(np.int64)
        known = np.where(given.is_null().to_numpy(zero_copy_only=False), np.nan, time)
    event = fields["event"].filter(chosen) if "event" in fields else None
    values = _event_arrays(fitted, pa.chunked_array([items.filter(chosen)]), event, time)
    values |= _gaps(fitted, time, np.arange(len(owners))) | _until(
        fitted, known, np.arange(len(owners))
    )
    lengths = np.bincount(owners, minlength=count)
    ends = np.cumsum(lengths)
    spans = _spans(
        fitted, ends - lengths, ends, known, np.nan if asked is None else _seconds(fitted, asked)
    )
    # One more event, of nothing: an empty span must have something to point at.
    padded = {name: np.concatenate([x, np.zeros(1, x.dtype)]) for name, x in values.items()}
    reads = {f"{feature.name}/{of}": x for of, x in fitted.reads.items()}
    return windows(padded, reads, spans, feature.max_length)


def read_items(fitted: Fitted, encoded: Mapping[str, np.ndarray]) -> Fitted:
    """`fitted` with what it reads of items beside their ids.

    Args:
        encoded: item feature -> [items, ...], its id among them. Items without a row of their own
            are read by their id alone.
    """
    first, *others = fitted.feature.reads
    ids, vocabulary = encoded[first], fitted.vocabulary
    known = ids >= vocabulary.first
    reads = {}
    for of in others:
        reads[of] = np.zeros((vocabulary.size, *encoded[of].shape[1:]), encoded[of].dtype)
        reads[of][ids[known]] = encoded[of][known]
    return dataclasses.replace(fitted, reads=reads)


def _event_arrays(
    fitted: Fitted, items: Any, event: Any, time: np.ndarray | None
) -> dict[str, np.ndarray]:
    """What each event is, [M] each."""
    feature = fitted.feature
    found = {f"{feature.name}/{feature.reads[0]}": fitted.vocabulary.rows(items)}
    if not feature.is_weighted:
        return found
    logs = np.zeros(len(items))
    if feature.weights and event is not None:
        names = pa.array(list(feature.weights), pa.large_string())
        at = pc.fill_null(pc.index_in(as_strings(event), value_set=names), len(names)).to_numpy()
        logs = np.log(np.append(list(feature.weights.values()), 1.0))[at]
    if feature.half_life:
        logs = logs + np.log(2) * (time - fitted.numbers["newest"]) / (_DAY * feature.half_life)
    return found | {HISTORY_WEIGHT: logs.astype(np.float32)}


def _gaps(fitted: Fitted, time: np.ndarray | None, order: np.ndarray) -> dict[str, np.ndarray]:
    """Buckets from 1 on of the time since the event before in `order`; of a user's first event they
    mean nothing."""
    return (
        {HISTORY_GAP: _buckets(fitted, np.diff(time[order], prepend=time[order][:1]))}
        if fitted.feature.gaps
        else {}
    )


def _until(fitted: Fitted, time: np.ndarray | None, order: np.ndarray) -> dict[str, np.ndarray]:
    """Likewise until the event after; of a user's last event they mean nothing."""
    return (
        {HISTORY_UNTIL: _buckets(fitted, np.diff(time[order], append=time[order][-1:]))}
        if fitted.feature.request_gap
        else {}
    )


def _spans(
    fitted: Fitted, begin: np.ndarray, end: np.ndarray, times: np.ndarray | None, asked: Any
) -> np.ndarray:
    """int32 [N, 2 or 3], of the last L events within [begin, end).

    Args:
        times: [M], of the events in seconds, NaN where missing.
        asked: [N] or one number: when each history is asked for, likewise.
    """
    spans = [np.maximum(begin, end - fitted.feature.max_length), end]
    if fitted.feature.request_gap:
        since = asked - np.append(times, np.nan)[np.maximum(end, 1) - 1]
        spans.append(np.where(end > begin, _buckets(fitted, since), 0))
    return np.stack(spans, axis=1).astype(np.int32)


def _buckets(fitted: Fitted, seconds: np.ndarray) -> np.ndarray:
    """int32, from 1 on; NaN has one of its own."""
    buckets = fitted.feature.gaps
    known = 1 + np.minimum(np.log2(1 + np.maximum(np.nan_to_num(seconds), 0)), buckets - 1).astype(
        np.int32
    )
    return np.where(np.isnan(seconds), buckets + 1, known).astype(np.int32)


def _is_timed(fitted: Fitted) -> bool:
    return bool(fitted.feature.gaps or fitted.feature.half_life)


def _check_columns(fitted: Fitted, log: pa.Table, timed: bool) -> None:
    feature = fitted.feature
    if feature.weights and "event" not in log.column_names:
        raise ConfigError(
            f"{feature.where}.weights={dict(feature.weights)} needs a column 'event' of the interactions."
        )
    for field in ("gaps", "half_life"):
        if getattr(feature, field) and not timed:
            raise ConfigError(
                f"{feature.where}.{field}={getattr(feature, field)} needs a time in every row; this log has none."
            )


def _seconds(fitted: Fitted, column: pa.ChunkedArray) -> np.ndarray:
    """Seconds since the epoch, NaN where missing."""
    seconds, missing = as_seconds(column, f"{fitted.feature.where}, column 'timestamp'")
    return np.where(missing, np.nan, seconds)


def _as_lists(fitted: Fitted, column: pa.ChunkedArray) -> pa.LargeListArray:
    kind = column.type
    if pa.types.is_null(kind):
        return pa.array([None] * len(column), pa.large_list(pa.string()))
    if not (
        pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    ):
        raise ConfigError(
            f"{fitted.feature.where}: column {fitted.feature.column!r} holds {kind}; a history is a list of item ids, or of "
            "mappings with an item_id, the latest last."
        )
    kind = pa.large_list(kind.value_type)
    return (
        pa.concat_arrays([chunk.cast(kind) for chunk in column.chunks])
        if column.num_chunks
        else pa.array([], kind)
    )


def _has(values: pa.StructArray, name: str) -> bool:
    return values.type.get_field_index(name) >= 0


def _running(kept: np.ndarray, owners: np.ndarray) -> np.ndarray:
    """How many are kept of the same owner up to each place, itself included."""
    total = np.cumsum(kept)
    first = np.searchsorted(owners, owners, side="left")
    return total - np.append(0, total)[first]
