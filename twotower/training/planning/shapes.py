"""The shapes of a run that has no data yet: inputs and tables of the towers, batches, arrays of the
data."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import pyarrow as pa

from twotower.config import Config
from twotower.core.errors import ConfigError, choose
from twotower.features.base import Feature, Fitted
from twotower.features.categorical import StringFeature
from twotower.features.inputs import (
    HISTORY_POSITION,
    HISTORY_SEGMENT,
    HISTORY_TIME_SINCE_PREVIOUS,
    HISTORY_TIME_TO_NEXT,
    HISTORY_WEIGHT,
    Input,
    TableShape,
)
from twotower.features.numeric import IntFeature
from twotower.features.spec import FeatureSpec, load_spec
from twotower.features.vocabulary import Vocabulary
from twotower.pipeline.event_weights import with_event_weights
from twotower.pipeline.prepare import PreparedData
from twotower.training.candidates import corpus_size

# Values of a column that nobody has said the number of.
ASSUMED_VALUES = 1_000

Inputs = Mapping[str, Mapping[str, Input]]


@dataclasses.dataclass(frozen=True)
class Shapes:
    """The shapes of a run.

    Attributes:
        users: Number of users.
        items: Number of items.
        rows: Number of training rows.
        unseen: Number of items without a training row.
        inputs: Side -> feature -> how a tower reads it.
        tables: Embedding tables by name.
        batch: One batch of `jax.ShapeDtypeStruct`.
        examples: Number of examples of a pass.
        data: Bytes of the encoded training data.
        item_features: Item feature -> its encoded values, `jax.ShapeDtypeStruct`.
        assumed: Columns whose number of values was assumed.
    """

    users: int
    items: int
    rows: int
    unseen: int
    inputs: Inputs
    tables: Mapping[str, TableShape]
    batch: Mapping[str, Any]
    examples: int
    data: int
    item_features: Mapping[str, jax.ShapeDtypeStruct]
    assumed: tuple[str, ...] = ()


def prepared_shapes(prepared: PreparedData) -> Shapes:
    """Returns the shapes of prepared data, exactly."""
    config = prepared.config
    # A batch is gathered for two rows, and its shape widened: large batches need not be made to be
    # measured.
    examples = prepared.training_examples()
    few = np.arange(min(2, len(examples)))
    index = examples.index(few, np.zeros_like(few))
    batch = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((config.training.batch_size, *x.shape[1:]), x.dtype),
        examples.gather(examples.data, index),
    )
    features = prepared.features["item"]
    return Shapes(
        users=len(prepared.users),
        items=len(prepared.items),
        rows=len(prepared.train),
        unseen=corpus_size(prepared).unseen,
        inputs=prepared.encoder.inputs,
        tables=prepared.encoder.tables,
        batch=batch,
        examples=prepared.num_examples,
        data=sum(x.nbytes for x in jax.tree.leaves(examples.data)),
        item_features={
            name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in features.items()
        },
    )


def planned_shapes(
    config: Config, *, users: int, items: int, rows: int, values: Mapping[str, int]
) -> Shapes:
    """Returns the shapes that a configuration would have for a log of these sizes.

    Args:
        config: Configuration of the run.
        users: Number of users.
        items: Number of items.
        rows: Number of training rows.
        values: Column -> number of values that its vocabulary knows; for others, of ids all users
            or items, else `ASSUMED_VALUES`.

    Raises:
        ConfigError: The shape of a feature depends on data, or no feature reads a column.
    """
    spec = with_event_weights(load_spec(config.features), config)
    # Values that are given win: an id column may know fewer ids than there are (min_count).
    sizes = {"user_id": users, "item_id": items} | dict(values)
    columns = {feature.column: None for feature in spec}
    # A column that no feature reads is misspelt, and its number would be ignored in silence.
    for column in values:
        choose(columns, column, "--values")
    inputs = _inputs(spec)
    tables, assumed = _tables(spec, sizes)
    item_features = {
        name: jax.ShapeDtypeStruct((items, *_shape(spec_input)), _dtype(spec_input))
        for name, spec_input in inputs["item"].items()
    }
    # Events of a history are kept once for all users, and counted by row below.
    user_bytes = sum(
        _row_bytes(read) for read in inputs["user"].values() if not read.history_length
    )
    item_bytes = sum(_row_bytes(read) for read in inputs["item"].values())
    labels = label_columns(config)
    # User, item and weight of each row, and what lies beside them.
    row_bytes = 12 + 4 * len(labels)
    # A row is an example, but for sequences.
    examples = rows
    # A history is spans of the log's rows, and not copies of them.
    if spec.history is not None:
        beside = spec.history.is_weighted + bool(spec.history.gaps)
        # An event is its item and what is read beside it; a span has two numbers or three.
        row_bytes += 4 * (1 + beside) + 8 + 4 * spec.history.request_gap
        # Other features of items are kept once more, by the row of the id.
        item_bytes += sum(_row_bytes(inputs["item"][name]) for name in spec.history.reads[1:])
    if config.training.examples == "sequences":
        # Packed without gaps, as short sequences nearly are.
        examples = -(-rows // _positions(inputs))
    return Shapes(
        users=users,
        items=items,
        rows=rows,
        # Not known: with one, as many are drawn for it as the configuration would draw.
        unseen=1,
        inputs=inputs,
        tables=tables,
        batch=_batch(config, spec, inputs),
        examples=examples,
        data=users * user_bytes + items * item_bytes + rows * row_bytes,
        item_features=item_features,
        assumed=assumed,
    )


def label_columns(config: Config) -> list[str]:
    """Returns the columns of labels that a configuration reads, each once."""
    columns = [config.objective.label]
    columns += [head.label for head in config.objective.heads.values()]
    return list(dict.fromkeys(column for column in columns if column))


def _stand_in(feature: Feature) -> Fitted:
    """Returns the state of a feature without data, for the shape of its input and table alone."""
    if isinstance(feature, StringFeature):
        # One value, which `_tables` replaces by the number that is planned for.
        one = pa.array(["?"], pa.large_string())
        return Fitted(vocabulary=Vocabulary(one, feature.oov_rows))
    if isinstance(feature, IntFeature):
        # As many boundaries as a fit would find, of which the values change no shape.
        boundaries = feature.boundaries or range(feature.buckets - 1)
        return Fitted(statistics={"boundaries": list(boundaries)})
    return Fitted()


@contextlib.contextmanager
def _refusal(feature: Feature) -> Iterator[None]:
    """Refuses a feature whose kind cannot tell its shape without what it fits to data."""
    try:
        yield
    # The errors of a feature that looks for what a fit would have left.
    except (ValueError, KeyError):
        raise ConfigError(
            f"{feature.location}: its shape is known from the data alone. Plan for a prepared run "
            "by --workdir, or without the feature."
        ) from None


def _inputs(spec: FeatureSpec) -> Inputs:
    items: dict[str, Input] = {}
    users: dict[str, Input] = {}
    # Items before users: a history is read as the item features that it names.
    for feature in [*spec.item.values(), *spec.user.values()]:
        side = users if feature.side == "user" else items
        with _refusal(feature):
            side |= feature.inputs(_stand_in(feature), items)
    return {"user": users, "item": items}


def _tables(
    spec: FeatureSpec, sizes: Mapping[str, int]
) -> tuple[dict[str, TableShape], tuple[str, ...]]:
    """Returns the tables, and the columns whose number of values was assumed."""
    tables: dict[str, TableShape] = {}
    assumed = []
    for feature in spec:
        with _refusal(feature):
            shape = feature.table_shape(_stand_in(feature))
        if shape is None:
            continue
        rows = shape.rows
        if isinstance(feature, StringFeature):
            if feature.column not in sizes:
                assumed.append(feature.column)
            # In the place of the one value of the stand-in.
            rows += sizes.get(feature.column, ASSUMED_VALUES) - 1
        # Several features may share a table, which has the rows of the largest.
        if feature.table in tables:
            rows = max(rows, tables[feature.table].rows)
        tables[feature.table] = dataclasses.replace(shape, rows=rows)
    return tables, tuple(dict.fromkeys(assumed))


def _shape(read: Input) -> tuple[int, ...]:
    """Returns the shape of the encoded values of one user, item or event."""
    # A feature without a table is a vector of numbers; one with a table has rows to look up.
    if not read.table:
        return (read.width,)
    return (read.length,) if read.length else ()


def _dtype(read: Input) -> str:
    return "int32" if read.table else "float32"


def _row_bytes(read: Input) -> int:
    # Rows of tables and numbers take four bytes each.
    return 4 * int(np.prod(_shape(read), dtype=np.int64))


def _positions(inputs: Inputs) -> int:
    """Returns the positions of a packed row of whole sequences."""
    # One more than a history reads: the last event of a sequence is predicted only.
    return 1 + max(read.history_length for read in inputs["user"].values())


def _batch(config: Config, spec: FeatureSpec, inputs: Inputs) -> dict[str, Any]:
    """Returns the shapes of a batch; histories as windows, which spans hold at most as much as."""
    lead: tuple[int, ...] = (config.training.batch_size,)
    is_packed = config.training.examples == "sequences"
    if is_packed:
        # Each position is a query and an answer.
        lead = (*lead, _positions(inputs))

    def array(dtype: str, *trailing: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((*lead, *trailing), dtype)

    user_features = {}
    for name, read in inputs["user"].items():
        events = ()
        # A packed row has an event at each of its positions.
        if read.history_length and not is_packed:
            events = (read.history_length,)
        user_features[name] = array(_dtype(read), *events, *_shape(read))
        if read.time_buckets:
            user_features[HISTORY_TIME_SINCE_PREVIOUS] = array("int32", *events)
        if read.time_to_next:
            user_features[HISTORY_TIME_TO_NEXT] = array("int32", *events)
        if read.history_length and spec.history is not None and spec.history.is_weighted:
            user_features[HISTORY_WEIGHT] = array("float32", *events)
    if is_packed:
        user_features[HISTORY_SEGMENT] = array("int32")
        user_features[HISTORY_POSITION] = array("int32")
    batch: dict[str, Any] = {
        "user": array("int32"),
        "item": array("int32"),
        "weight": array("float32"),
        "labels": {column: array("float32") for column in label_columns(config)},
        "user_features": user_features,
        "item_features": {
            name: array(_dtype(read), *_shape(read)) for name, read in inputs["item"].items()
        },
    }
    if is_packed:
        # Of a log in which several rows of a user have one time.
        batch["query_slot"] = array("int32")
    return batch


def parse_values(pairs: Sequence[str]) -> dict[str, int]:
    """Returns the numbers of values of columns from "COLUMN=NUMBER"s.

    >>> parse_values(["city=1e3"])
    {'city': 1000}
    """
    values = {}
    for pair in pairs:
        column, _, number = pair.partition("=")
        try:
            # By way of a float, so that 1e9 can be written.
            values[column] = int(float(number))
        except ValueError:
            raise ConfigError(
                f"--values={pair} must be COLUMN=NUMBER, such as city=1000."
            ) from None
    return values
