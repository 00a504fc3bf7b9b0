"""From a configuration to arrays: read, filter, split, audit, fit the encoder on training rows,
encode."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np
import pyarrow as pa
from absl import logging

from twotower.config import Config
from twotower.core.arrow import pc
from twotower.core.errors import ConfigError
from twotower.core.fields import check_fields
from twotower.data.audit import audit, check_fitted
from twotower.data.dataset import TruePreferences
from twotower.data.filters import filter_rows
from twotower.data.interactions import PARTS, Split, timestamps
from twotower.data.sources.load import load_dataset
from twotower.data.split import split
from twotower.features.encoder import Encoder
from twotower.features.spec import load_spec
from twotower.pipeline.batches import Rows
from twotower.pipeline.histories import SPANS, Histories, build_histories
from twotower.pipeline.labels import check_labels, label_columns, read_labels
from twotower.pipeline.sequences import SequencePacking


@dataclasses.dataclass(frozen=True)
class PreparedData:
    """Everything that training and evaluation read.

    Attributes:
        users: all users, U rows; the raw columns.
        items: the corpus, N rows; the raw columns.
        train, validation, test: the interactions.
        features: {"user": {name: [U, ...]}, "item": {name: [N, ...]}}, encoded, in the order of
            `users` and `items`.
        truth: true factors in the same order, of the generated shop.
        encoder: fitted on the training rows.
        raw: the interactions as tables, all columns.
        histories: of users, where that is a feature; the context of a row then holds the span of
            its history.
        plan: of the sequences that are the examples of training, if they are.
    """

    config: Config
    users: pa.Table
    items: pa.Table
    train: Rows
    validation: Rows
    test: Rows
    encoder: Encoder
    features: Mapping[str, Mapping[str, np.ndarray]]
    truth: TruePreferences | None
    raw: Split
    histories: Histories | None = None
    plan: SequencePacking | None = None

    @property
    def examples(self) -> int:
        """How many a pass over the training data has: rows, or packed rows of whole sequences."""
        return len(self.train if self.plan is None else self.plan)

    def user_features(
        self, users: np.ndarray, context: Mapping[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        """{array: [N, ...]}, the encoded features of users in a context such as `Rows.context`
        has."""
        own = {name: values[users] for name, values in self.features["user"].items()}
        if self.histories is None:
            return own | dict(context)
        return (
            own
            | {name: x for name, x in context.items() if name != SPANS}
            | self.histories.take(context[SPANS])
        )

    def is_positive(self, part: str) -> np.ndarray:
        """bool [N], which rows of a part ("train", "validation" or "test") say that a user wanted
        an item: those with label 1 where `config.objective.label` names a column, else all."""
        rows: Rows = getattr(self, part)
        label = self.config.objective.label
        return rows.labels[label] == 1 if label else np.ones(len(rows), bool)

    def positives(self, part: str) -> Rows:
        """The rows that `is_positive` marks."""
        rows: Rows = getattr(self, part)
        return rows.take(self.is_positive(part)) if self.config.objective.label else rows


def prepare(
    config: Config, *, encoder: Encoder | None = None, fit: Callable[..., Encoder] = Encoder.fit
) -> PreparedData:
    """Reads and encodes the data that `config` names.

    Args:
        encoder: the one that a run was trained with; None fits a new one on the training rows.
        fit: how to make a new one; takes what `Encoder.fit` takes.

    Raises:
        ConfigError: the data cannot be read, or nothing is left of it.
        LeakageError: the split leaks (see `twotower.data.audit.audit`), or `encoder` was not fitted on these
            training rows.
    """
    spec = load_spec(config.features)
    dataset = filter_rows(load_dataset(config.data), config.data)
    parts = split(dataset.interactions, config.split)
    audit(parts, config.split)
    users, items = dataset.users, dataset.items
    labels = label_columns(config.objective)
    check_labels(dataset.interactions, parts.train, labels)
    # Read by export alone, but asked for here: else a misspelt column would cost a training.
    check_fields(
        dict.fromkeys(config.retrieval.display),
        items.column_names,
        "config.retrieval.display: the items table",
    )
    in_corpus = (
        np.ones(len(items), bool)
        if dataset.has_catalogue
        else _occurs(parts.train["item_id"], items["item_id"])
    )
    items = items.filter(pa.array(in_corpus))
    encoder = encoder or fit(spec, parts.train, users=users, items=items)
    check_fitted(encoder.fitted_on, parts)
    _check_context(encoder, labels)
    logging.info(
        "%d users, %d items in the corpus; rows: %d train, %d validation, %d test.",
        len(users),
        len(items),
        len(parts.train),
        len(parts.validation),
        len(parts.test),
    )
    truth = dataset.truth and dataclasses.replace(
        dataset.truth, item_factors=dataset.truth.item_factors[in_corpus]
    )
    own = [
        name
        for name, f in encoder.spec.user.items()
        if name not in encoder.context and f is not encoder.spec.history
    ]
    features = {"user": encoder.encode("user", users, own), "item": encoder.encode("item", items)}
    rows = [
        _rows(part, users, items, encoder, labels)
        for part in (parts.train, parts.validation, parts.test)
    ]
    if not rows[0].weight.any():
        raise ConfigError(
            "weight is 0 in every training row: nothing would be learned. At least one must be above 0."
        )
    histories, rows = _with_histories(encoder, parts, rows, len(users))
    plan = _plan(config, histories)
    return PreparedData(
        config, users, items, *rows, encoder, features, truth, parts, histories, plan
    )


def _plan(config: Config, histories: Histories | None) -> SequencePacking | None:
    """How training sequences are packed, where they are the examples."""
    if config.training.examples != "sequences":
        return None
    if histories is None:
        raise ConfigError(
            "config.training.examples='sequences' needs a history to be read: config.features.user={'history': {'type': "
            "'history'}, ...}."
        )
    return SequencePacking.build(histories, crop=config.training.crop, seed=config.training.seed)


def _with_histories(
    encoder: Encoder, parts: Split, rows: list[Rows], num_users: int
) -> tuple[Histories | None, list[Rows]]:
    """The histories, where they are a feature, and the rows with theirs in their context."""
    feature = encoder.spec.history
    if feature is None:
        return None, rows
    fitted = encoder.fitted["user", feature.name]
    histories = build_histories(
        feature, fitted, parts, [r.user for r in rows], [r.timestamp for r in rows], num_users
    )
    spans = [histories.spans[part] for part in PARTS]
    return histories, [
        dataclasses.replace(r, context={**r.context, SPANS: s}) for r, s in zip(rows, spans)
    ]


def _occurs(values: pa.ChunkedArray, among: pa.ChunkedArray) -> np.ndarray:
    return pc.is_in(among, value_set=pc.unique(values)).to_numpy()


def _rows(
    table: pa.Table, users: pa.Table, items: pa.Table, encoder: Encoder, labels: Mapping[str, str]
) -> Rows:
    def places(name: str, among: pa.Table) -> np.ndarray:
        found = pc.index_in(table[name], value_set=among[name].combine_chunks())
        return pc.fill_null(found, -1).to_numpy().astype(np.int32)

    return Rows(
        places("user_id", users),
        places("item_id", items),
        _weights(table),
        timestamps(table),
        encoder.encode("user", table, encoder.context),
        read_labels(table, labels),
    )


def _check_context(encoder: Encoder, labels: Mapping[str, str]) -> None:
    """A query that knows its own label would be told the answer."""
    for name in encoder.context:
        column = encoder.spec.user[name].column
        if column in labels:
            raise ConfigError(
                f"config.features: user feature {name!r} reads column {column!r}, which is {labels[column]}."
            )


def _weights(table: pa.Table) -> np.ndarray:
    if "weight" not in table.column_names:
        return np.ones(len(table), np.float32)
    weights = pc.fill_null(table["weight"], 1.0).to_numpy().astype(np.float32)
    bad = np.flatnonzero(~(np.isfinite(weights) & (weights >= 0)))
    if bad.size:
        raise ConfigError(
            f"weight={weights[bad[0]]} in row {bad[0] + 1} of the interactions must be finite and at least 0."
        )
    return weights
