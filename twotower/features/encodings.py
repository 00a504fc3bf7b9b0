"""How each kind of fitted feature becomes arrays, and what a tower must know to read them."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from twotower.core.arrow import pc
from twotower.core.errors import ConfigError
from twotower.features import numeric
from twotower.features.base import Feature
from twotower.features.kinds import (
    FloatFeature,
    HistoryFeature,
    IntFeature,
    PretrainedFeature,
    SentenceFeature,
    StringFeature,
    StringsFeature,
    TextFeature,
    TimestampFeature,
)
from twotower.features.sentence import encode_sentences
from twotower.features.text import hashed_pieces, pad_lists
from twotower.features.vocabulary import Vocabulary, as_strings


@dataclasses.dataclass(frozen=True)
class Input:
    """How a tower reads one encoded feature.

    Attributes:
        table: its embedding table; empty: the feature is numbers.
        length: L of ids [N, L], the masked mean of whose rows is taken (0 = padding); 0 for ids
            [N].
        width: of numbers, float32 [N, width]; 0 when there is a table.
        projection: width of a dense layer applied to the feature before the tower; 0 = none.
        oov_rate: share of ids replaced by an out-of-vocabulary row (1 to oov_rows) in training.
        oov_rows: how many such rows the table has.
        events: L of what is read at each event of a history, [N, L, ...]; 0 for all other features.
        gaps: of the first such feature: buckets of the time between events that stand beside it.
        until: of the first such feature: whether the time until the next event, or the request,
            stands beside it too.
    """

    table: str = ""
    length: int = 0
    width: int = 0
    projection: int = 0
    oov_rate: float = 0.0
    oov_rows: int = 0
    events: int = 0
    gaps: int = 0
    until: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class TableShape:
    """One embedding table, rows unpadded.

    Attributes:
        rows: V, of which row 0 is padding.
        width: E.
        initial: float32 [V, E] to start from; None: drawn at random.
        norm: expected norm of drawn rows.
    """

    rows: int
    width: int
    initial: np.ndarray | None = None
    norm: float = 1.0


@dataclasses.dataclass(frozen=True, eq=False)
class Fitted:
    """A feature and what was fitted for it.

    Attributes:
        vocabulary: of strings; of the ids of pretrained vectors, of the texts of sentence vectors.
            One object for the features that share a table.
        vectors: pretrained, or of sentences, float32 [ids, E].
        numbers: statistics, as JSON holds them.
        reads: of a history: what it reads of an item beside its id, encoded, [V, ...] by the row of
            the vocabulary.
    """

    feature: Feature
    vocabulary: Vocabulary | None = None
    vectors: np.ndarray | None = None
    numbers: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    reads: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)


def encode_column(fitted: Fitted, column: pa.ChunkedArray) -> np.ndarray:
    """The column as the feature's array: int32 [N] or [N, L], or float32 [N, width]."""
    with naming(fitted.feature):
        return _ENCODE[type(fitted.feature)](fitted, column)


@contextlib.contextmanager
def naming(feature: Feature) -> Iterator[None]:
    """Puts the feature in front of an error that does not name it yet."""
    try:
        yield
    except ValueError as error:
        raise (
            error
            if str(error).startswith(feature.where)
            else ConfigError(f"{feature.where}: {error}")
        ) from None


def strings_of(
    feature: StringFeature, column: pa.ChunkedArray
) -> tuple[np.ndarray, pa.LargeStringArray]:
    """The row that each value comes from, int64 [M], and the values; a plain string feature has one
    a row."""
    if not isinstance(feature, StringsFeature):
        return np.arange(len(column)), as_strings(column)
    lists = _lists(feature, column)
    parents, values = (
        pc.list_parent_indices(lists),
        pc.utf8_trim_whitespace(as_strings(pc.list_flatten(lists))),
    )
    kept = pc.fill_null(pc.not_equal(values, ""), False)
    return parents.filter(kept).to_numpy().astype(np.int64), values.filter(kept)


def _lists(feature: StringsFeature, column: pa.ChunkedArray) -> pa.LargeListArray:
    kind = column.type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return pa.concat_arrays(
            [chunk.cast(pa.large_list(kind.value_type)) for chunk in column.chunks]
            or [pa.array([], pa.large_list(kind.value_type))]
        )
    if not feature.separator and not pa.types.is_null(kind):
        raise ConfigError(
            f"{feature.where}: column {feature.column!r} holds {kind}, not lists; name the separator between its "
            f"values, for example separator='|'."
        )
    return pc.split_pattern(as_strings(column), feature.separator or "|").cast(
        pa.large_list(pa.large_string())
    )


def _encode_string(fitted: Fitted, column: pa.ChunkedArray) -> np.ndarray:
    return fitted.vocabulary.rows(column)


def _encode_strings(fitted: Fitted, column: pa.ChunkedArray) -> np.ndarray:
    rows, values = strings_of(fitted.feature, column)
    return pad_lists(rows, fitted.vocabulary.rows(values), len(column), fitted.feature.max_length)


def _encode_text(fitted: Fitted, column: pa.ChunkedArray) -> np.ndarray:
    text = fitted.feature
    return hashed_pieces(
        column,
        words=text.words,
        characters=text.characters,
        buckets=text.buckets,
        max_length=text.max_length,
    )


def _encode_pretrained(fitted: Fitted, column: pa.ChunkedArray) -> np.ndarray:
    """Rows of the trained table, or the frozen vectors; with missing="zeros" a last column is 1
    where there is none."""
    rows = fitted.vocabulary.rows(column)
    if not fitted.feature.frozen:
        return rows
    found = rows - fitted.vocabulary.first
    vectors = np.where(found[:, None] < 0, np.float32(0), fitted.vectors[np.maximum(found, 0)])
    return (
        np.append(vectors, (found[:, None] < 0).astype(np.float32), axis=1)
        if _has_flag(fitted)
        else vectors
    )


def _encode_sentence(fitted: Fitted, column: pa.ChunkedArray) -> np.ndarray:
    return encode_sentences(
        fitted.feature, fitted.vocabulary, fitted.vectors, fitted.numbers["model"], column
    )


def _has_flag(fitted: Fitted) -> bool:
    return fitted.feature.missing == "zeros"


_ENCODE: dict[type[Feature], Callable[[Fitted, pa.ChunkedArray], np.ndarray]] = {
    StringFeature: _encode_string,
    StringsFeature: _encode_strings,
    IntFeature: lambda fitted, column: numeric.encode_int(fitted.feature, column, fitted.numbers),
    FloatFeature: lambda fitted, column: numeric.encode_float(
        fitted.feature, column, fitted.numbers
    ),
    TextFeature: _encode_text,
    PretrainedFeature: _encode_pretrained,
    SentenceFeature: _encode_sentence,
    TimestampFeature: lambda fitted, column: numeric.encode_timestamp(
        fitted.feature, column, fitted.numbers
    ),
}


def inputs_of(name: str, fitted: Fitted, items: Mapping[str, Fitted]) -> dict[str, Input]:
    """How a tower reads the arrays of one feature, by the name of each.

    Args:
        items: item feature -> what was fitted for it, of which a history reads some.
    """
    feature = fitted.feature
    if not isinstance(feature, HistoryFeature):
        return {name: input_of(fitted)}
    read = {
        f"{name}/{of}": dataclasses.replace(input_of(items[of]), events=feature.max_length)
        for of in feature.reads
    }
    first = next(iter(read))
    return read | {
        first: dataclasses.replace(read[first], gaps=feature.gaps, until=feature.request_gap)
    }


def input_of(fitted: Fitted) -> Input:
    """How a tower reads what `encode_column` yields."""
    feature = fitted.feature
    match feature:
        case StringFeature():
            length = feature.max_length if isinstance(feature, StringsFeature) else 0
            return Input(
                table=feature.table,
                length=length,
                oov_rate=feature.oov_rate,
                oov_rows=feature.oov_rows,
            )
        case TextFeature():
            return Input(table=feature.table, length=feature.max_length)
        case TimestampFeature():
            return Input(table=feature.table, length=len(feature.parts))
        case PretrainedFeature(frozen=False):
            return Input(
                table=feature.table, projection=feature.projection, oov_rows=feature.oov_rows
            )
        case PretrainedFeature():
            return Input(
                width=fitted.vectors.shape[1] + _has_flag(fitted), projection=feature.projection
            )
        case SentenceFeature():
            return Input(width=fitted.vectors.shape[1], projection=feature.embedding_size)
        case IntFeature(normalize=False):
            return Input(table=feature.table)
    return Input(width=2, projection=feature.embedding_size)


def shape_of(fitted: Fitted) -> TableShape:
    """The table of a feature that has one."""
    feature = fitted.feature
    match feature:
        case StringFeature():
            return TableShape(
                rows=fitted.vocabulary.size, width=feature.embedding_size, norm=feature.initial_norm
            )
        case TextFeature():
            return TableShape(rows=feature.buckets, width=feature.embedding_size)
        case TimestampFeature():
            return TableShape(rows=numeric.timestamp_rows(feature), width=feature.embedding_size)
        case PretrainedFeature():
            # Ids without a vector start at zero, as padding does.
            initial = np.pad(fitted.vectors, ((fitted.vocabulary.first, 0), (0, 0)))
            return TableShape(rows=len(initial), width=initial.shape[1], initial=initial)
    return TableShape(
        rows=numeric.FIRST_BUCKET + len(fitted.numbers["boundaries"]) + 1,
        width=feature.embedding_size,
    )
