"""Histories: what a user had done before a moment, the latest last, as arrays of the last L events.

The events of all users lie in flat arrays, by user and then in time, so that a history is a span of them: two numbers, whatever
its length. `windows` makes arrays of spans, on the host or inside `jit`:

    "history/item_id"  int32 [N, L], rows of the item's table, 0 after the last event; one such array for each feature read
    "history gap"      int32 [N, L], bucket of the time since the event before, from 1; 0 where there is none
    "history weight"   float32 [N, L], log of the weight of each event beside that of the others

An event is earlier when its time is: events of the same second do not know of each other. Without times the order of the file is
the time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from twotower.data.encodings import HISTORY_GAP, HISTORY_WEIGHT, Fitted
from twotower.data.interactions import Split
from twotower.data.vocabulary import as_strings
from twotower.validation import ConfigError

# Part of a split -> the parts whose events its rows may know of; "now" is what a served user is asked with.
KNOWN = {"train": (0,), "validation": (0,), "test": (0, 1), "now": (0, 1, 2)}
# Which of these have events of their own: validation rows know what training rows know.
_STORED = {"train": "train", "validation": "train", "test": "test", "now": "now"}
_DAY = 86_400
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
        spans: part -> int32 [rows, 2], the history of each of its rows: first event, and the one after the last.
    """

    fitted: Fitted
    events: Mapping[str, np.ndarray]
    offsets: Mapping[str, np.ndarray]
    orders: Mapping[str, np.ndarray]
    spans: Mapping[str, np.ndarray]

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

    def now(self, users: np.ndarray) -> np.ndarray:
        """int32 [N, 2], the histories of users as they stand at the end of the log."""
        begin, end = self.offsets["now"][users], self.offsets["now"][np.asarray(users) + 1]
        return np.stack([np.maximum(begin, end - self.length), end], axis=1).astype(np.int32)

    def stored(self, raw: Split) -> pa.Array:
        """The raw histories of all users as they stand at the end of the log, such as a request would bring them."""
        spans = self.now(np.arange(len(self.offsets["now"]) - 1))
        lengths = spans[:, 1] - spans[:, 0]
        ends = np.cumsum(lengths)
        places = np.repeat(spans[:, 0] - (ends - lengths), lengths) + np.arange(ends[-1] if len(ends) else 0)
        rows = pa.array(self.orders["now"][places - self.offsets["now"][0]])
        log = pa.concat_tables([raw.train, raw.validation, raw.test], promote_options="default")
        needed = {"item_id": True, "event": self.fitted.feature.weights, "timestamp": _is_timed(self.fitted)}
        fields = [name for name, read in needed.items() if read]
        values = [log[name].combine_chunks().take(rows) for name in fields]
        flat = values[0] if len(fields) == 1 else pa.StructArray.from_arrays(values, fields)
        return pa.ListArray.from_arrays(pa.array(np.append(0, ends).astype(np.int32)), flat)


def windows(events: Mapping[str, Any], reads: Mapping[str, Any], spans: Any, length: int) -> dict[str, Any]:
    """The arrays [N, L] of spans [N, 2] of at most L events, filled up with 0; of NumPy arrays, or inside `jit`."""
    slot = np.arange(length, dtype=np.int32)[None]
    places = spans[:, :1] + slot
    valid = places < spans[:, 1:]
    return read_events(events, reads, places * valid, valid, first=slot == 0)


def read_events(events: Mapping[str, Any], reads: Mapping[str, Any], places: Any, valid: Any, *, first: Any) -> dict[str, Any]:
    """The arrays of single events [N, S], 0 where not `valid`; the gap of a `first` one is not known."""
    found = {name: x[places] * valid for name, x in events.items()}
    if HISTORY_GAP in found:
        found[HISTORY_GAP] = found[HISTORY_GAP] * ~first
    ids = next((x for name, x in found.items() if name not in (HISTORY_GAP, HISTORY_WEIGHT)))  # `jit` sorts by name
    return found | {name: x[ids] for name, x in reads.items()}


def build_histories(
    fitted: Fitted, raw: Split, users: Sequence[np.ndarray], times: Sequence[np.ndarray | None], num_users: int
) -> Histories:
    """The histories of the rows of a split.

    Args:
        users: of train, validation and test: row of the users table.
        times: likewise, in seconds; None without.

    Raises:
        ConfigError: the log lacks a column that the feature reads.
    """
    log = pa.concat_tables([raw.train, raw.validation, raw.test], promote_options="default")
    part, user = np.repeat(np.arange(3), [len(x) for x in users]), np.concatenate(users).astype(np.int64)
    timed = all(time is not None for time, x in zip(times, users) if len(x))
    time = np.concatenate([t for t in times if t is not None]) if timed else None
    _check_columns(fitted, log, timed)
    place = raw.file_order()
    # When each row happened as a number from 0 on, dense, so that one key orders users and times.
    when = np.unique(time if timed else place, return_inverse=True)[1]
    keys = user * (when.max(initial=0) + 1) + when
    columns = _event_arrays(fitted, log["item_id"], log["event"] if "event" in log.column_names else None, time)
    events, offsets, orders, spans = [], {}, {}, {}
    base = 0
    for name in ("train", "test", "now"):
        chosen = np.flatnonzero(np.isin(part, KNOWN[name]))
        order = orders[name] = chosen[np.lexsort((place[chosen], keys[chosen]))]
        offsets[name] = base + np.append(0, np.cumsum(np.bincount(user[chosen], minlength=num_users)))
        events.append({n: x[order] for n, x in columns.items()} | _gaps(fitted, time, order))
        for asked, known in _STORED.items():
            if known == name and asked != "now":
                rows = part == list(KNOWN).index(asked)
                end = base + np.searchsorted(keys[order], keys[rows], side="left")
                begin = np.maximum(offsets[name][user[rows]], end - fitted.feature.max_length)
                spans[asked] = np.stack([begin, end], axis=1).astype(np.int32)
        base += len(order)
    joined = {n: np.concatenate([level[n] for level in events]) for n in events[0]}
    return Histories(fitted, joined, offsets, orders, spans)


def encode_histories(fitted: Fitted, column: pa.ChunkedArray) -> dict[str, np.ndarray]:
    """The arrays of raw histories: lists of item ids or of mappings, the latest last; null is an empty one."""
    feature, count = fitted.feature, len(column)
    lists = _as_lists(fitted, column)
    owners, flat = pc.list_parent_indices(lists).to_numpy(), pc.list_flatten(lists)
    fields = {n: flat.field(n) for n in ("item_id", "event", "timestamp") if pa.types.is_struct(flat.type) and _has(flat, n)}
    items = fields.get("item_id", flat)
    if pa.types.is_struct(items.type):
        raise ConfigError(f"{feature.where}: the events of a history must have an item_id; these have {flat.type}.")
    kept = pc.is_valid(items).to_numpy(zero_copy_only=False)
    after = np.bincount(owners[kept], minlength=count)[owners] - _running(kept, owners)  # how many kept ones follow
    kept &= after < feature.max_length
    chosen, owners = pa.array(kept), owners[kept]
    time = None
    if _is_timed(fitted):
        newest = fitted.numbers["newest"]
        given = fields.get("timestamp", pa.nulls(len(flat), pa.int64())).filter(chosen).cast(pa.int64())
        time = pc.fill_null(given, newest).to_numpy().astype(np.int64)
    event = fields["event"].filter(chosen) if "event" in fields else None
    values = _event_arrays(fitted, pa.chunked_array([items.filter(chosen)]), event, time)
    values |= _gaps(fitted, time, np.arange(len(owners)))
    ends = np.cumsum(np.bincount(owners, minlength=count))
    spans = np.stack([np.append(0, ends[:-1]), ends], axis=1).astype(np.int32) if count else np.zeros((0, 2), np.int32)
    # One more event, of nothing: an empty span must have something to point at.
    padded = {name: np.concatenate([x, np.zeros(1, x.dtype)]) for name, x in values.items()}
    reads = {f"{feature.name}/{of}": x for of, x in fitted.reads.items()}
    return windows(padded, reads, spans, feature.max_length)


def read_items(fitted: Fitted, encoded: Mapping[str, np.ndarray]) -> Fitted:
    """`fitted` with what it reads of items beside their ids.

    Args:
        encoded: item feature -> [items, ...], its id among them. Items without a row of their own are read by their id alone.
    """
    first, *others = fitted.feature.reads
    ids, vocabulary = encoded[first], fitted.vocabulary
    known = ids >= vocabulary.first
    reads = {}
    for of in others:
        reads[of] = np.zeros((vocabulary.size, *encoded[of].shape[1:]), encoded[of].dtype)
        reads[of][ids[known]] = encoded[of][known]
    return dataclasses.replace(fitted, reads=reads)


def _event_arrays(fitted: Fitted, items: Any, event: Any, time: np.ndarray | None) -> dict[str, np.ndarray]:
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
    """Buckets from 1 on of the time since the event before in `order`; of a user's first event they mean nothing."""
    buckets = fitted.feature.gaps
    if not buckets:
        return {}
    since = np.diff(time[order], prepend=time[order][:1])
    return {HISTORY_GAP: (1 + np.minimum(np.log2(1 + np.maximum(since, 0)), buckets - 1).astype(np.int32)).astype(np.int32)}


def _is_timed(fitted: Fitted) -> bool:
    return bool(fitted.feature.gaps or fitted.feature.half_life)


def _check_columns(fitted: Fitted, log: pa.Table, timed: bool) -> None:
    feature = fitted.feature
    if feature.weights and "event" not in log.column_names:
        raise ConfigError(f"{feature.where}.weights={dict(feature.weights)} needs a column 'event' of the interactions.")
    for field in ("gaps", "half_life"):
        if getattr(feature, field) and not timed:
            raise ConfigError(f"{feature.where}.{field}={getattr(feature, field)} needs a time in every row; this log has none.")


def _as_lists(fitted: Fitted, column: pa.ChunkedArray) -> pa.LargeListArray:
    kind = column.type
    if pa.types.is_null(kind):
        return pa.array([None] * len(column), pa.large_list(pa.string()))
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)):
        raise ConfigError(
            f"{fitted.feature.where}: column {fitted.feature.column!r} holds {kind}; a history is a list of item ids, or of "
            "mappings with an item_id, the latest last."
        )
    kind = pa.large_list(kind.value_type)
    return pa.concat_arrays([chunk.cast(kind) for chunk in column.chunks]) if column.num_chunks else pa.array([], kind)


def _has(values: pa.StructArray, name: str) -> bool:
    return values.type.get_field_index(name) >= 0


def _running(kept: np.ndarray, owners: np.ndarray) -> np.ndarray:
    """How many are kept of the same owner up to each place, itself included."""
    total = np.cumsum(kept)
    first = np.searchsorted(owners, owners, side="left")
    return total - np.append(0, total)[first]
