"""The base class of all kinds of features, and the records that they share with the encoder.

A kind of feature is one file of this folder: a frozen dataclass with the fields of its
specification. Its methods fit the feature to training rows, encode a column, describe the encoded
arrays to the tower that reads them, and give the shape of the embedding table.
`twotower.features.spec` lists the kinds.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import pyarrow as pa

from twotower.core.errors import ConfigError
from twotower.core.fields import check_literals
from twotower.data.contract import Use
from twotower.features.inputs import SIDES, Input, TableShape
from twotower.features.vocabulary import Vocabulary

if TYPE_CHECKING:  # its own import takes longer than many an answer
    from jaxtyping import Shaped

# Side and name of a feature.
Key = tuple[str, str]
# A value of a request that needs no reading: a text, or a list of texts.
PlainValue = str | list[str]


@dataclasses.dataclass(frozen=True, eq=False)
class Fitted:
    """The state that a feature has after fitting. Nothing else is saved of a feature.

    Attributes:
        vocabulary: Known strings, or the ids or texts of the vectors. One object for the features
            that share a table.
        vectors: Vectors of the vocabulary, float32 [ids, E].
        statistics: Values that JSON holds, such as a mean or the boundaries of buckets.
        reads: Item feature -> [V, ...], encoded by the row of the vocabulary: the features of an
            item that a history reads in addition to its id.
    """

    vocabulary: Vocabulary | None = None
    vectors: np.ndarray | None = None
    statistics: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    reads: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

    # A kind knows which of these its `fit` set; a type checker, and a damaged folder, do not.

    def require_vocabulary(self) -> Vocabulary:
        """Returns the vocabulary.

        Raises:
            ValueError: There is none; a saved encoder is damaged.
        """
        if self.vocabulary is None:
            raise ValueError("the encoder has no vocabulary of this feature; fit it again.")
        return self.vocabulary

    def require_vectors(self) -> np.ndarray:
        """Returns the vectors.

        Raises:
            ValueError: There are none; a saved encoder is damaged.
        """
        if self.vectors is None:
            raise ValueError("the encoder has no vectors of this feature; fit it again.")
        return self.vectors


class TrainingColumn(NamedTuple):
    """A feature and the column that it is fitted to.

    Attributes:
        feature: The feature.
        values: One value for each user or item that occurs in training rows; of a context feature,
            one for each training row.
        weights: Number of training rows of each value, int64 [N].
        all_values: The whole column, including users or items that training rows lack.
        is_context: Whether the column is one of the interactions.
        newest: Latest training timestamp in seconds; None in a log without times.
        vocabulary: Vocabulary of the feature's table, where its kind has one.
    """

    feature: Feature
    values: pa.ChunkedArray
    weights: np.ndarray
    all_values: pa.ChunkedArray
    is_context: bool
    newest: int | None = None
    vocabulary: Vocabulary | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Feature:
    """The fields that every feature has, and the methods that a kind overrides.

    A kind overrides `encode` and `input`. A kind that learns from training rows overrides `fit`,
    one with a table of embeddings `table_shape`. Only a kind of several arrays, as a history is,
    overrides `encode_rows` and `inputs` instead.

    Attributes:
        side: Tower that the feature belongs to, "user" or "item".
        name: Name within the tower.
        column: Column that the feature reads; empty for its name. An item feature reads the items
            table; a user feature the users table or, if only the interactions have the column, the
            interactions (the context of a query).
        table: Name of the embedding table. Features that name one table share its rows and their
            vocabulary; empty for a table of its own, "side.name".
        embedding_size: Width of the table. For a feature that is numbers (`float`, a normalised
            `int`, frozen vectors), the width of a dense layer before the tower; 0 for none.
    """

    side: str
    name: str
    column: str = ""
    table: str = ""
    embedding_size: int = 32

    # Whether the feature is the user's history, `twotower.features.history.HistoryFeature`.
    is_history: ClassVar[bool] = False
    # Fields on which two features must agree to share a table. Features whose kinds list other
    # fields cannot share one, nor can those of a kind that lists none.
    shared_fields: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self):
        minimum = self._min_embedding_size
        # The side first: all other messages name it.
        self._check(self.side in SIDES, "side", "user or item")
        check_literals(self, self.location)
        self._check(self.embedding_size >= minimum, "embedding_size", f"at least {minimum}")
        self._check(
            self.has_table or not self.table,
            "table",
            "left out: this feature is numbers and has no table",
        )
        # The defaults depend on other fields; a frozen dataclass can set them in no other way.
        object.__setattr__(self, "column", self.column or self.name)
        # The side is part of the name, since users and items may have features of one name.
        if self.has_table and not self.table:
            object.__setattr__(self, "table", f"{self.side}.{self.name}")

    @property
    def key(self) -> Key:
        """Side and name, the key of the feature's state in an encoder."""
        return self.side, self.name

    @property
    def location(self) -> str:
        """Name of the feature in error messages."""
        return f"features.{self.side}.{self.name}"

    @property
    def columns_read(self) -> tuple[str, ...]:
        """Names of the columns of a table that `read` joins into one."""
        return (self.column,)

    @property
    def use(self) -> Use | None:
        """What the column is read as; None for text, lists, and what a source has of itself."""
        return None

    @property
    def has_table(self) -> bool:
        """Whether the feature is ids of table rows, as opposed to numbers."""
        return True

    @property
    def _min_embedding_size(self) -> int:
        # A table needs a column; a feature of numbers may do without a dense layer.
        return int(self.has_table)

    def read(self, rows: pa.Table) -> pa.ChunkedArray:
        """Returns the values that `fit` and `encode` take, from a table that may lack columns.

        Raises:
            ValueError: Values of several columns cannot be joined.
        """
        return column_of(rows, self.column)

    def fit_vocabulary(self, columns: Sequence[TrainingColumn]) -> Vocabulary | None:
        """Fits the vocabulary of the feature's table, if its kind has one.

        Args:
            columns: The columns of all features that share the table.
        """
        return None

    def fit(self, column: TrainingColumn) -> Fitted:
        """Fits the feature to training rows.

        Raises:
            ValueError: A value cannot be read as the feature's type.
        """
        return Fitted()

    def encode(self, fitted: Fitted, column: pa.ChunkedArray) -> np.ndarray:
        """Encodes N values: ids int32 [N] or [N, L], or numbers float32 [N, width].

        Raises:
            ValueError: A value cannot be read as the feature's type.
        """
        raise NotImplementedError(f"{type(self).__name__}.encode")

    def input(self, fitted: Fitted) -> Input:
        """Returns the description of the array of `encode` for the tower."""
        raise NotImplementedError(f"{type(self).__name__}.input")

    def table_shape(self, fitted: Fitted) -> TableShape | None:
        """Returns the shape of the feature's table, or None without one."""
        return None

    def extend(self, old: Fitted, new: Fitted, vocabulary: Vocabulary) -> Fitted:
        """Returns `old` with the new values of a larger log added.

        Args:
            old: State before.
            new: State fitted to the larger log.
            vocabulary: Vocabulary of `old`, followed by the values that only `new` knows.
        """
        # Kinds with a vocabulary and no vectors keep all else: known values must encode as before.
        if old.vectors is None:
            return dataclasses.replace(old, vocabulary=vocabulary)
        # The values at the end of the vocabulary have vectors in `new` alone, in another order.
        known = new.require_vocabulary()
        rows = known.rows(vocabulary.values[len(old.vectors) :]) - known.first
        vectors = np.concatenate([old.vectors, new.require_vectors()[rows]])
        return dataclasses.replace(old, vocabulary=vocabulary, vectors=vectors)

    def encode_rows(self, fitted: Fitted, rows: pa.Table) -> dict[str, np.ndarray]:
        """Returns the arrays of the feature by name, from a table that may lack its column."""
        with prefix_errors(self.location):
            return {self.name: self.encode(fitted, self.read(rows))}

    def encode_value(self, fitted: Fitted, value: PlainValue) -> dict[str, np.ndarray] | None:
        """Returns the arrays [1, ...] of a single value, as `encode_rows` does of its column.

        A request is answered in fewer microseconds than a column of Arrow takes to make. A kind
        that has no such way returns None, as this does.

        Args:
            fitted: State of the feature.
            value: Text, or the texts of a list.
        """
        return None

    def inputs(self, fitted: Fitted, items: Mapping[str, Input]) -> dict[str, Input]:
        """Returns the description of each array of `encode_rows` for the tower, by name.

        Args:
            fitted: State of the feature.
            items: Descriptions of the item tower's arrays, some of which a history reads.
        """
        return {self.name: self.input(fitted)}

    def serving_model(self, fitted: Fitted) -> dict[str, str] | None:
        """Returns "model" and "sha256" of the model that encodes new values; None without one."""
        return None

    def warn_of_missing_extra(self) -> None:
        """Warns where new values cannot be encoded on this machine."""

    def _check(self, ok: bool, field: str, requirement: str) -> None:
        if not ok:
            value = getattr(self, field)
            raise ConfigError(f"{self.location}.{field}={value!r} must be {requirement}.")

    def _check_at_least(self, minimum: int, *fields: str) -> None:
        for field in fields:
            self._check(getattr(self, field) >= minimum, field, f"at least {minimum}")


@contextlib.contextmanager
def prefix_errors(location: str) -> Iterator[None]:
    """Prefixes errors that do not name the feature yet with its name."""
    try:
        yield
    except ValueError as error:
        # Inner functions name the feature and more, such as a file or a row.
        if str(error).startswith(location):
            raise
        raise ConfigError(f"{location}: {error}") from None


def column_of(rows: pa.Table, name: str) -> pa.ChunkedArray:
    """Returns a column of a table, or nulls if the table lacks it."""
    # A missing column is no error here: requests may know only some columns of a user.
    index = rows.schema.get_field_index(name)
    if index >= 0:
        return rows.column(index)
    # Every kind accepts Arrow's type of nulls, whatever the type of its column.
    return pa.chunked_array([pa.nulls(rows.num_rows)])


def join_lists(column: pa.ChunkedArray) -> pa.LargeListArray:
    """Returns a column of lists as one array."""
    # Large lists, whose offsets of 64 bits hold any column in one chunk.
    kind = pa.large_list(column.type.value_type)
    chunks = [chunk.cast(kind) for chunk in column.chunks]
    # Without a copy.
    if len(chunks) == 1:
        return chunks[0]
    return pa.concat_arrays(chunks or [pa.array([], kind)])


def pad_lists(
    rows: np.ndarray, values: np.ndarray, count: int, length: int
) -> Shaped[np.ndarray, "N L"]:
    """Returns the first `length` values of each row, [count, length], padded with 0 at the end.

    Args:
        rows: Row of each value, [M], ascending.
        values: Values [M].
        count: Number of rows N.
        length: Values L kept of a row.
    """
    if count == 1:
        padded = np.zeros((1, length), values.dtype)
        kept = values[:length]
        padded[0, : len(kept)] = kept
        return padded
    # Rows ascend, so the values of each lie together and their positions are a difference.
    # Without a loop over rows: columns may have millions of them.
    starts = np.searchsorted(rows, np.arange(count))
    positions = np.arange(len(rows)) - starts[rows]
    padded = np.zeros((count, length), values.dtype)
    is_kept = positions < length
    padded[rows[is_kept], positions[is_kept]] = values[is_kept]
    return padded
