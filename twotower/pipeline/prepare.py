"""From a configuration to arrays: read, filter, split, audit, fit the encoder, encode."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from twotower.config import Config
from twotower.core.arrays import stable_argsort
from twotower.core.arrow import pc, plain_text
from twotower.core.codes import distinct, positions
from twotower.core.errors import ConfigError
from twotower.core.fields import check_fields
from twotower.data.audit import audit, check_fitted, drop_repeats
from twotower.data.contract import KEYS, Contract
from twotower.data.dataset import Dataset, TruePreferences, assemble
from twotower.data.filters import filter_rows
from twotower.data.interactions import PARTS, Split, timestamps
from twotower.data.matching import check_matches
from twotower.data.report import DataReport
from twotower.data.sources.kept import locate
from twotower.data.sources.load import (
    describes_items,
    load_dataset,
    takes_items_of_log,
    with_uses,
)
from twotower.data.split import split
from twotower.data.tables import check_time_range
from twotower.features.encoder import Encoder
from twotower.features.fit import fit_encoder
from twotower.features.spec import FeatureSpec, load_spec
from twotower.pipeline.batches import (
    SPANS,
    Examples,
    Features,
    InteractionExamples,
    InteractionRows,
)
from twotower.pipeline.describe import check_log, check_times, describe_data, list_separators
from twotower.pipeline.event_weights import (
    check_any_weight,
    check_event_weights,
    read_weights,
    with_event_weights,
)
from twotower.pipeline.histories import Histories, build_histories
from twotower.pipeline.labels import check_labels, label_columns, label_uses, read_labels
from twotower.pipeline.log_items import with_items_of_log
from twotower.pipeline.sequences import SequenceExamples, SequencePacking
from twotower.pipeline.streaming.layout import Records
from twotower.pipeline.streaming.records import RowRecords, SequenceRecords


@dataclasses.dataclass(frozen=True)
class FurtherRows:
    """Rows of a further test set, which were in no part of the log.

    Attributes:
        name: Name of the set, which its figures are kept under.
        source: Name of the file or table.
        rows: Number of rows that are measured.
        unknown_users: Number of users that the log does not have.
        rows_of_unknown_items: Number of rows whose item is not in the corpus.
        notes: Sentences on what was left out, taken for granted or found odd.
    """

    name: str
    source: str
    rows: int
    unknown_users: int
    rows_of_unknown_items: int
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreparedData:
    """Everything that training and evaluation read.

    Attributes:
        config: Configuration that the data was prepared for.
        users: Table of all users, U rows, with the columns as they were read.
        items: Table of the corpus, N rows, likewise.
        train: Interactions to learn from, as arrays.
        validation: Interactions to choose a model by.
        test: Interactions to report on.
        encoder: Encoder, fitted on the training rows.
        features: Encoded features in the order of `users` and `items`: {"user": {name: [U, ...]},
            "item": {name: [N, ...]}}.
        truth: True preferences in the same order, which a generated shop alone has.
        raw: Interactions as tables with all their columns; the rows of a part are those of `train`,
            `validation` or `test`, in the same order.
        histories: Histories of users, where they are a feature; the context of a row then holds the
            span of its history.
        packing: Packed sequences, where these are the examples of training.
        has_catalogue: Whether items have a table of their own, as `Dataset` says.
        report: Facts about the data that a person should know; None where it was not described.
        further: Further rows that stand in the place of the test rows; None for those of the log.
    """

    config: Config
    users: pa.Table
    items: pa.Table
    train: InteractionRows
    validation: InteractionRows
    test: InteractionRows
    encoder: Encoder
    features: Features
    truth: TruePreferences | None
    raw: Split
    histories: Histories | None = None
    packing: SequencePacking | None = None
    has_catalogue: bool = True
    report: DataReport | None = None
    further: FurtherRows | None = None

    @property
    def num_examples(self) -> int:
        """Number of examples of a pass over the training data: rows, or packed rows of
        sequences."""
        return len(self.train if self.packing is None else self.packing)

    @property
    def num_positions(self) -> int:
        """Number of positions in a pass: rows, or all slots of packed sequences, filled or not."""
        if self.packing is None:
            return len(self.train)
        return len(self.packing) * self.packing.num_slots

    def target_rates(self) -> np.ndarray | None:
        """Returns how often a pass has each training row as a target.

        Returns:
            float64 [rows] of packed sequences; None where each row is one example.
        """
        if self.packing is None or self.histories is None:
            return None
        rates = np.zeros(len(self.train))
        # From the order of events, by user, to the order of the rows.
        rates[self.histories.orders["train"]] = self.packing.target_rates(len(self.train))
        return rates

    def training_examples(self) -> Examples:
        """Returns the examples that batches are made of."""
        if self.packing is None:
            return InteractionExamples(self.train, self.features, self.histories)
        assert self.histories is not None, "sequences are packed from histories"
        return SequenceExamples(self.train, self.features, self.histories, self.packing)

    def training_records(self) -> Records:
        """Returns the same examples as records, which a stream is made of."""
        if self.packing is None:
            return RowRecords(self.train, self.features, self.histories)
        assert self.histories is not None, "sequences are packed from histories"
        return SequenceRecords(self.train, self.features, self.histories, self.packing)

    def user_features(
        self, users: np.ndarray, context: Mapping[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        """Returns the encoded features of users in a context: {name: [N, ...]}.

        Args:
            users: Rows of the users table, int32 [N].
            context: Encoded features of each row, {name: [N, ...]}, as in
                `InteractionRows.context`.
        """
        features = {name: values[users] for name, values in self.features["user"].items()}
        features |= context
        # A span says which events are a row's past; the events themselves are looked up here.
        if self.histories is not None:
            spans = features.pop(SPANS)
            features |= self.histories.take(spans)
        return features

    def rolled_spans(self, part: str) -> np.ndarray | None:
        """Returns the spans of the rows of a part by all rows of their users before them.

        Those of the part itself count too, as they do for a served model.

        Args:
            part: "train", "validation" or "test".

        Returns:
            int32 [rows, 2 or 3], see `Histories`; None without histories.
        """
        if self.histories is None:
            return None
        parts = (self.train, self.validation, self.test)
        users = [rows.user for rows in parts]
        times = [rows.timestamp for rows in parts]
        return self.histories.rolled_spans(part, users, times)

    def is_positive(self, part: str) -> np.ndarray:
        """Marks the rows in which a user wanted an item: bool [N].

        Where `config.objective.label` names a column, those are the rows with label 1; else all.

        Args:
            part: "train", "validation" or "test".
        """
        rows: InteractionRows = getattr(self, part)
        label = self.config.objective.label
        if not label:
            return np.ones(len(rows), bool)
        # A missing label is NaN, which equals nothing: such a row is no positive.
        return rows.labels[label] == 1

    def positives(self, part: str) -> InteractionRows:
        """Returns the rows that `is_positive` marks."""
        rows: InteractionRows = getattr(self, part)
        # Without a label no copy of the log is made.
        if not self.config.objective.label:
            return rows
        return rows.take(self.is_positive(part))


def read_parts(
    config: Config,
    *,
    folder: Path | None = None,
    dataset: Dataset | None = None,
    spec: FeatureSpec | None = None,
    contract: Contract | None = None,
) -> tuple[Dataset, Split]:
    """Reads the log that a configuration names, filters it and divides it.

    Args:
        config: Configuration of an experiment.
        folder: Folder of the run, in which rows that it keeps are found.
        dataset: The log itself, in the place of the one that the configuration names.
        spec: Features, in the place of those that the configuration names.
        contract: Contract of a run whose log has grown; by default one is found.

    Raises:
        ConfigError: The data cannot be read, or nothing is left of it.
        LeakageError: The split leaks (see `twotower.data.audit`).
    """
    # The features say how columns are read: as numbers, as times or as text.
    spec = spec or load_spec(config.features)
    uses = spec.uses() | {"log": label_uses(config.objective)}
    # A log in memory has our names and types already.
    if dataset is not None:
        dataset = with_uses(dataset, uses)
    else:
        # Only here do rows get the folder of their run: its configuration stays that of any folder.
        located = locate(config.data, folder)
        dataset = load_dataset(located, uses=uses, contract=contract)
    dataset = dataset.with_codes()
    check_matches(dataset.matches, config.data.accept)
    # Filters come before the split: its shares are those of the rows that are kept.
    dataset = filter_rows(dataset, config.data, separators=list_separators(spec))
    time_form = dataset.contract.time
    check_time_range(dataset.interactions, time_form, config.data.accept, now=time.time())
    # Before the split, whose own message does not name the features that read the time.
    check_times(config, spec, dataset.interactions)
    parts = split(dataset.interactions, config.split)
    # Before anything is fitted: a split that leaks gets as far as no figure.
    held_out_text = describes_items(config.data) and not takes_items_of_log(config.data)
    findings = audit(parts, config.split, describes_items=held_out_text)
    parts, dropped = drop_repeats(parts, findings, config.split)
    dataset = dataclasses.replace(dataset, dropped=dataset.dropped + dropped)
    return with_items_of_log(dataset, parts, _columns_of_items(config, spec)), parts


@dataclasses.dataclass(frozen=True)
class DescribedLog:
    """A log that was read, divided and described.

    Attributes:
        dataset: The log, with its items restricted to the corpus.
        parts: Parts of the log.
        users: Row of the users table for each row of train, validation and test, int32 [N] each.
        items: Row of the corpus likewise, -1 where the item is not in it.
        report: Facts that a person should know.
    """

    dataset: Dataset
    parts: Split
    users: tuple[np.ndarray, ...]
    items: tuple[np.ndarray, ...]
    report: DataReport


def read_and_describe(
    config: Config,
    spec: FeatureSpec,
    *,
    folder: Path | None = None,
    dataset: Dataset | None = None,
    contract: Contract | None = None,
) -> DescribedLog:
    """Reads, checks and describes the log that a configuration names, and encodes nothing.

    Args:
        config: Configuration of a run.
        spec: Features of the run.
        folder: Folder of the run, in which rows that it keeps are found.
        dataset: The log itself, in the place of the one that the configuration names.
        contract: Contract of a run whose log has grown; by default one is found.

    Raises:
        ConfigError: The data cannot be read, nothing is left of it, or it can only be a mistake.
        LeakageError: The split leaks (see `twotower.data.audit`).
    """
    dataset, parts = read_parts(
        config, folder=folder, dataset=dataset, spec=spec, contract=contract
    )
    # Before anything is encoded: a log of one user trains to nothing, without an error.
    check_log(dataset.interactions, config.data.accept)
    check_labels(dataset.interactions, parts.train, label_columns(config.objective))
    warnings = check_event_weights(dataset.interactions, config.data)
    dataset = dataclasses.replace(dataset, warnings=(*dataset.warnings, *warnings))
    # Export alone reads these columns, but by then a misspelt one would have cost a training.
    check_fields(
        dict.fromkeys(config.retrieval.display),
        dataset.items.column_names,
        "config.retrieval.display: the items table",
    )
    dataset = _restrict_to_corpus(dataset, parts.train)
    # Once for report and arrays: each row of the log is looked up.
    users = [positions(rows["user_id"], dataset.users["user_id"]) for rows in parts.tables]
    items = [positions(rows["item_id"], dataset.items["item_id"]) for rows in parts.tables]
    report = describe_data(config, spec, dataset, parts, users, items)
    return DescribedLog(dataset, parts, tuple(users), tuple(items), report)


def _columns_of_items(config: Config, spec: FeatureSpec) -> set[str]:
    """Returns the columns of items that a feature, the lists or the mapping of columns names."""
    names = {*config.retrieval.display, *config.data.item_table.columns}
    # All that features read, or a column that a rare feature needs would be dropped as varying.
    for feature in spec.item.values():
        names.update(feature.columns_read)
    return names


def prepare(
    config: Config,
    *,
    folder: Path | None = None,
    dataset: Dataset | None = None,
    spec: FeatureSpec | None = None,
    encoder: Encoder | None = None,
    fit: Callable[..., Encoder] = fit_encoder,
    contract: Contract | None = None,
) -> PreparedData:
    """Reads the log that a configuration names, divides it, and encodes it as arrays.

    Args:
        config: Configuration of a run.
        folder: Folder of the run, in which rows that it keeps are found.
        dataset: The log itself, in the place of the one that the configuration names.
        spec: Features, in the place of those that the configuration names.
        encoder: Encoder that a run was trained with; by default one is fitted on the training rows.
        fit: Function that fits a new encoder, with the arguments of `fit_encoder`.
        contract: Contract of a run whose log has grown; by default one is found.

    Raises:
        ConfigError: The data cannot be read, or nothing is left of it.
        LeakageError: The split leaks (see `twotower.data.audit`), or `encoder` was fitted on other
            rows than these training rows.
    """
    # Before the log is read, which may take minutes: a mistake in the features is shown at once.
    if spec is None:
        spec = with_event_weights(load_spec(config.features), config)
    log = read_and_describe(config, spec, folder=folder, dataset=dataset, contract=contract)
    dataset = log.dataset
    parts = log.parts
    users = dataset.users
    items = dataset.items
    # Vocabularies and statistics are of training rows alone, see `fit_encoder`; an encoder that
    # comes from a run is held to that by its fingerprint.
    if encoder is None:
        encoder = fit(spec, parts.train, users=users, items=items)
        # Requests are read by the forms of this log.
        encoder = dataclasses.replace(encoder, contract=dataset.contract)
    else:
        check_fitted(encoder.fitted_on, parts)
    labels = label_columns(config.objective)
    check_labels_are_hidden(encoder, labels)
    event_weights = config.data.weight_by_event()
    # Users and items are encoded once: a batch looks them up by row.
    features = {
        "user": encoder.encode("user", users, columns_of_users(encoder)),
        "item": encoder.encode("item", items),
    }

    rows = [
        encode_rows(part, user, item, encoder, labels, event_weights)
        for part, user, item in zip(parts.tables, log.users, log.items)
    ]
    check_any_weight(bool(rows[0].weight.any()))
    # From rows as arrays, all parts at once: a test row's past holds training and validation rows.
    histories, (train, validation, test) = with_histories(encoder, parts, rows, len(users))
    return PreparedData(
        config=config,
        users=users,
        items=items,
        train=train,
        validation=validation,
        test=test,
        encoder=encoder,
        features=features,
        truth=dataset.truth,
        raw=parts,
        histories=histories,
        packing=pack_sequences(config, histories),
        has_catalogue=dataset.has_catalogue,
        report=log.report,
    )


def with_features(prepared: PreparedData, config: Config, encoder: Encoder) -> PreparedData:
    """Returns the same rows of the same parts, encoded by another encoder.

    Args:
        prepared: Prepared data of a run.
        config: Configuration with the features of the encoder; its data and split are those of the
            run.
        encoder: Encoder that was fitted on the training rows of the run.
    """
    features = {
        "user": encoder.encode("user", prepared.users, columns_of_users(encoder)),
        "item": encoder.encode("item", prepared.items),
    }
    rows = []
    for table, part in zip(
        prepared.raw.tables, (prepared.train, prepared.validation, prepared.test)
    ):
        # Rows and their labels stay: only what the features read of them is encoded again.
        context = encoder.encode("user", table, encoder.context)
        rows.append(dataclasses.replace(part, context=context))
    histories, (train, validation, test) = with_histories(
        encoder, prepared.raw, rows, len(prepared.users)
    )
    return dataclasses.replace(
        prepared,
        config=config,
        train=train,
        validation=validation,
        test=test,
        encoder=encoder,
        features=features,
        histories=histories,
        # Baselines are towers that are never trained, so that nothing is packed.
        packing=None,
    )


def join_parts(prepared: PreparedData) -> Dataset:
    """Returns the log that data was prepared from, in file order, as its filters had left it."""
    raw = prepared.raw
    log = pa.concat_tables([raw.train, raw.validation, raw.test], promote_options="default")
    # As text, with which further rows may be joined.
    for key in KEYS:
        log = log.set_column(log.column_names.index(key), key, plain_text(log[key]))
    # Parts are told by the split anew, and equal times by the order of the file.
    order = stable_argsort(raw.joined_file_positions())
    # With the ids that the corpus was restricted from.
    dataset = assemble(log.take(pa.array(order)), prepared.users, prepared.items)
    truth = prepared.truth
    # Its rows are those of the tables.
    if len(dataset.items) > len(prepared.items):
        truth = None
    # The tables are complete by now: what they had of their own was told when they were read.
    return dataclasses.replace(
        dataset,
        has_catalogue=prepared.has_catalogue,
        truth=truth,
        matches=(),
        contract=prepared.encoder.contract,
    )


def _restrict_to_corpus(dataset: Dataset, train: pa.Table) -> Dataset:
    """Drops the items that cannot be recommended.

    Without a table of items, those are the items that no training row has: nothing is known of
    them but an id, for which nothing was learned.
    """
    if dataset.has_catalogue:
        return dataset
    # Training rows alone: an item that test rows bring could not have been recommended.
    trained = distinct(train["item_id"])
    is_trained = pc.is_in(dataset.items["item_id"], value_set=trained)
    truth = dataset.truth
    # The factors keep the order of the items.
    if truth is not None:
        item_factors = truth.item_factors[is_trained.to_numpy()]
        truth = dataclasses.replace(truth, item_factors=item_factors)
    return dataclasses.replace(dataset, items=dataset.items.filter(is_trained), truth=truth)


def check_labels_are_hidden(encoder: Encoder, labels: Mapping[str, str]) -> None:
    """Refuses a user feature that reads a label: the query would hold the answer.

    Args:
        encoder: Fitted encoder.
        labels: Columns that are labels, and the fields of the configuration that name them.
    """
    for name in encoder.context:
        for column in encoder.spec.user[name].columns_read:
            if column in labels:
                raise ConfigError(
                    f"config.features: user feature {name!r} reads column {column!r}, which is "
                    f"{labels[column]}."
                )


def columns_of_users(encoder: Encoder) -> list[str]:
    """Returns the user features whose column is one of the users table, not of the log."""
    # Features of the context are encoded with the rows of the log, and a history from its events.
    names = []
    for name, feature in encoder.spec.user.items():
        if name not in encoder.context and feature is not encoder.spec.history:
            names.append(name)
    return names


def encode_rows(
    rows: pa.Table,
    user: np.ndarray,
    item: np.ndarray,
    encoder: Encoder,
    labels: Mapping[str, str],
    event_weights: Mapping[str, float],
) -> InteractionRows:
    """Returns the rows of one part of the split as arrays.

    Args:
        rows: Interactions.
        user: Row of the users table of each, int32 [N].
        item: Row of the corpus of each, int32 [N], -1 where the item is not in it.
        encoder: Fitted encoder.
        labels: Columns that are labels.
        event_weights: Weight by kind of event.
    """
    return InteractionRows(
        user=user,
        item=item,
        weight=read_weights(rows, event_weights),
        timestamp=timestamps(rows),
        context=encoder.encode("user", rows, encoder.context),
        labels=read_labels(rows, labels),
    )


def with_histories(
    encoder: Encoder, parts: Split, rows: Sequence[InteractionRows], num_users: int
) -> tuple[Histories | None, list[InteractionRows]]:
    """Puts the span of its history into the context of each row, where users have histories.

    Args:
        encoder: Fitted encoder.
        parts: Parts of the log.
        rows: The same rows as arrays: train, validation and test.
        num_users: Number of users.

    Returns:
        The events of each user before each row, None where the encoder reads none; and the rows.
    """
    feature = encoder.spec.history
    if feature is None:
        return None, list(rows)
    fitted = encoder.fitted["user", feature.name]
    users = [part.user for part in rows]
    times = [part.timestamp for part in rows]
    histories = build_histories(feature, fitted, parts, users, times, num_users)
    spanned = []
    for name, part in zip(PARTS, rows, strict=True):
        context = {**part.context, SPANS: histories.spans[name]}
        spanned.append(dataclasses.replace(part, context=context))
    return histories, spanned


def pack_sequences(config: Config, histories: Histories | None) -> SequencePacking | None:
    """Packs users' sequences into rows, where these are the examples of training."""
    if config.training.examples != "sequences":
        return None
    if histories is None:
        raise ConfigError(
            "config.training.examples='sequences' needs a history to be read: "
            "config.features.user={'history': {'type': 'history'}, ...}."
        )
    return SequencePacking.build(histories, crop=config.training.crop, seed=config.training.seed)
