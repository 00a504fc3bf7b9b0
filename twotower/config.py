"""One tree of frozen dataclasses: every option, its default and its meaning, declared once.

An experiment file returns an `ml_collections.ConfigDict`; `from_dict` turns it into a `Config`
once, at the door. Each section checks its own options when it is made; rules across sections are in
`twotower.config_rules`.

    >>> options = defaults()
    >>> options.training.steps = 500
    >>> from_dict(options).training.steps
    500

A closed set of values is a `Literal`; options that name a kind of a
registry, to which modules of users may add, are text and checked where the registry lies.
"""

from __future__ import annotations

import codecs
import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any, Literal

from twotower.config_rules import check_rules
from twotower.core.errors import choose
from twotower.core.fields import FieldChecks, TimeUnit, build

# Findings about the data that `DataConfig.accept` may name; whoever refuses one names it.
DATA_FINDINGS = (
    "old_times",
    "future_times",
    "unmatched_users",
    "unmatched_items",
    "one_user",
    "one_item",
    "nothing_to_find",
)


def _is_encoding(name: str) -> bool:
    try:
        # Python's table of encodings, which Arrow's reader of CSV files uses too.
        codecs.lookup(name)
    except LookupError:
        return False
    return True


def _is_weight(value: Any) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and 0 < value < math.inf


@dataclasses.dataclass(frozen=True, kw_only=True)
class TableConfig:
    """Source of one table, and the names of its columns.

    Attributes:
        path: File, folder or glob of CSV (also .gz), JSON (.json, .jsonl, .ndjson) or Parquet, or a
            zip with one such file; environment variables and ~ are expanded. dataset:NAME/FILE is a
            file of a known data set, such as dataset:movielens-100k/u.data, read from
            $TWOTOWER_DATA or else downloaded. With the source bigquery, a table:
            PROJECT.DATASET.TABLE, or DATASET.TABLE of the client's project.
        query: BigQuery SQL, in place of a path.
        event_files: Mapping of kinds of events to the path of their files, in place of a path:
            {"view": "views/*.csv", "purchase": "orders.csv"}.
        columns: Mapping of our names to the file's names, for example {"user_id": "CustomerID"}.
            "metadata.brand" names a field of a column of JSON objects. Columns not named keep their
            own names.
        names: Column names of a file without a header line. An empty name leaves a column out, and
            so does the lack of names for the last ones.
        delimiter: Separator of the fields of a text file. The words tab, space and whitespace (of
            any length) are known too. Where the header has a tab, a semicolon or a pipe in its
            place, that one is taken.
        quoting: Character that quotes fields with delimiters or line breaks, or "off". Fields
            between delimiters of several characters have no quotes.
        comment: Beginning of the lines that are left out, such as "#".
        skip_lines: Number of lines before the header, or before the first row.
        bad_rows: Treatment of rows with more or fewer fields than the header: refused, skipped, or
            padded with missing values (where fields too many are empty).
        gather: Columns whose values in the rows of one id become a list, such as a genre a row.
        encoding: Encoding of a text file. One that begins with the mark of UTF-16 is read as that.
        timestamp_format: Strptime format of textual timestamps; empty for ISO 8601.
        timestamp_unit: Unit of numeric timestamps since the epoch.
        missing: Words of a text file that stand for a missing value. Without "NA" among them, that
            is a value such as any other: Namibia.
        decimal: Character before the decimals of numbers.
        thousands: Character between groups of three digits of numbers; empty for none.
        marks: Texts beside numbers that are left out, such as ("$", "%").
    """

    # Empty text rather than None, from which a flag of the command line could not tell the type.
    path: str = ""
    query: str = ""
    event_files: Mapping[str, str] = dataclasses.field(default_factory=dict)
    columns: Mapping[str, str] = dataclasses.field(default_factory=dict)
    names: tuple[str, ...] = ()
    delimiter: str = ","
    quoting: str = '"'
    comment: str = ""
    skip_lines: int = 0
    bad_rows: Literal["refuse", "skip", "pad"] = "refuse"
    gather: tuple[str, ...] = ()
    encoding: str = "utf-8"
    timestamp_format: str = ""
    # Seconds, as in MovieLens.
    timestamp_unit: TimeUnit = "s"
    # Those that pandas knows.
    missing: tuple[str, ...] = (
        "",
        "#N/A",
        "#NA",
        "N/A",
        "NA",
        "NULL",
        "NaN",
        "NaT",
        "None",
        "n/a",
        "nan",
        "null",
    )
    decimal: Literal[".", ","] = "."
    thousands: Literal["", ",", ".", " ", "'"] = ""
    marks: tuple[str, ...] = ()

    def __post_init__(self):
        # By class name, since several fields of `DataConfig` are tables; `build` names the field.
        check = FieldChecks(self, "TableConfig")
        has_delimiter = bool(self.delimiter)
        check.require(has_delimiter, "delimiter", "one or more characters, such as ',' or '\\t'")
        is_quoting = self.quoting == "off" or len(self.quoting) == 1
        check.require(is_quoting, "quoting", "one character, such as '\"', or 'off'")
        check.at_least(0, "skip_lines")
        is_alone = not (self.event_files and self.path)
        check.require(is_alone, "path", "empty beside event_files, which names the files")
        known = _is_encoding(self.encoding)
        check.require(known, "encoding", "an encoding that Python knows, such as 'utf-8'")
        # Of 10:13 PM, %H would read ten in the morning.
        has_halves = ("%p" in self.timestamp_format) == ("%I" in self.timestamp_format)
        right = "with both %I (hours from 1 to 12) and %p (AM or PM), or with neither"
        check.require(has_halves, "timestamp_format", right)
        differ = self.thousands != self.decimal
        check.require(differ, "thousands", f"another character than decimal={self.decimal!r}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The log to learn from, and the rows of it that are kept.

    Attributes:
        source: Kind of source, a key of `twotower.data.sources.load.SOURCES`.
        options: Options of a source of your own, see `twotower.register`.
        path: Path of the interactions, in place of `interactions.path`; empty for that one.
        interactions: Table of the events: user, item, and further columns.
        user_table: Table of users' attributes; an empty path for none but their ids.
        item_table: Table of items' attributes, which is also the corpus; an empty path for the
            items of the log.
        validation: Table of the validation rows of a fixed split.
        test: Table of the test rows of a fixed split.
        dataset: Name of a TFDS dataset, such as movielens/100k-ratings.
        data_dir: Folder in which TFDS keeps prepared data; empty for its own default.
        project: Google Cloud project billed for the queries; empty for that of the environment's
            credentials.
        location: BigQuery region that runs the queries; empty lets BigQuery find it.
        num_interactions: Number of rows of the generated shop.
        num_items: Number of items of the generated shop; 0 for a number that suits its rows.
        shop_seed: Random seed of the generated shop.
        where: Conditions on the rows to keep, as (column, operator, value); operators are ==, !=,
            <, <=, >, >=, in, not in, starts with, not starts with, and of lists contains.
            ("rating", ">=", 4) and ("event", "in", ("purchase",)) are the usual ones.
        event_weights: Mapping of the kinds of events, the values of the column `event`, to the
            weights of their rows, above 0, for example {"view": 1, "add_to_cart": 5, "purchase":
            10}. A kind that is not named weighs 1. The weights multiply those of a column `weight`,
            and are the default ones of the events of a history that is a bag. A column of another
            name is mapped: `interactions.columns` = {"event": "action"}.
        fold_events: Whether kinds of events that differ by case alone weigh alike: the weight of
            "view" is that of "View" and "VIEW" too.
        k_core: Least number of rows of each user and item; others are dropped, repeatedly until all
            have as many. 0 keeps all.
        duplicates: Rows to keep of several with one user and item.
        item_group: Column of the items table to recommend in place of the item id, such as a title
            or a parent product; empty for the item id.
        item_rows: Rows that describe the items where the table of items is the file of the log:
            those of training, with the latest values of each item and without columns that differ
            within items, unless a feature or the lists read them; or all rows of the file, with
            the first values, whose items are then all in the corpus.
        accept: Names of findings about the data that are refused unless they are right for the data
            at hand, such as "unmatched_items"; the message of a refusal says its name.
    """

    source: str = "shop"
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    path: str = ""
    interactions: TableConfig = TableConfig()
    user_table: TableConfig = TableConfig()
    item_table: TableConfig = TableConfig()
    validation: TableConfig = TableConfig()
    test: TableConfig = TableConfig()
    dataset: str = ""
    data_dir: str = ""
    project: str = ""
    location: str = ""
    # Small enough for a first run without an accelerator.
    num_interactions: int = 100_000
    num_items: int = 0
    shop_seed: int = 0
    # Inner tuples have members of several types, so only their number is checked, in data/filters.
    where: tuple[tuple, ...] = ()
    event_weights: Mapping[str, float] = dataclasses.field(default_factory=dict)
    fold_events: bool = False
    k_core: int = 0
    duplicates: Literal["all", "first", "last"] = "all"
    item_group: str = ""
    item_rows: Literal["train", "all"] = "train"
    accept: tuple[str, ...] = ()

    def __post_init__(self):
        check = FieldChecks(self, "config.data")
        for finding in self.accept:
            choose(dict.fromkeys(DATA_FINDINGS), finding, "config.data.accept")
        check.at_least(1000, "num_interactions")
        check.at_least(0, "k_core", "num_items")
        are_weights = all(_is_weight(weight) for weight in self.event_weights.values())
        check.require(are_weights, "event_weights", "a mapping of events to numbers above 0")
        folded = {event.lower() for event in self.event_weights}
        are_apart = not self.fold_events or len(folded) == len(self.event_weights)
        right = "of events that differ by more than case with config.data.fold_events=True"
        check.require(are_apart, "event_weights", right)
        # SQL that no source reads would be passed over in silence.
        for name in ("interactions", "user_table", "item_table", "validation", "test"):
            table: TableConfig = getattr(self, name)
            if table.query:
                by_bigquery = self.source == "bigquery"
                right = "empty unless config.data.source='bigquery'"
                check.require(by_bigquery, f"{name}.query", right)
                right = f"empty beside a config.data.{name}.query"
                check.require(not table.path, f"{name}.path", right)

    def weight_by_event(self) -> dict[str, float]:
        """Returns the weights of events in all the cases in which they weigh so."""
        weights = dict(self.event_weights)
        if not self.fold_events:
            return weights
        for event, weight in self.event_weights.items():
            for variant in (event.lower(), event.upper(), event.title(), event.capitalize()):
                weights.setdefault(variant, weight)
        return weights


@dataclasses.dataclass(frozen=True, kw_only=True)
class SplitConfig:
    """Division of the rows into train, validation and test.

    Attributes:
        kind: Kind of split, a key of `twotower.data.split.SPLITS`.
        validation: Share of the rows held out for validation, from 0 to 0.99; any value above 0
            with leave_last_out, which holds out `held_out` rows a user.
        test: Share of the rows held out for test, likewise.
        seed: Random seed of a random choice of rows, or of an order of ties.
        held: Validation rows of a fixed split that names none: a random share of the training rows,
            or the latest share of each user's, which suits test rows that are later ones.
        ties: Last row, for leave_last_out, of a user's rows of one time: the last of the file, one
            drawn by the seed, or all rows of that time together, any of which is then a right
            answer. The audit "ties" of an evaluation says for how many users it matters.
        held_out: Number of last rows of each user that leave_last_out holds out for each part.
        validation_by: Rows that validation takes of those that are left beside the test: those that
            the kind of split says, the latest (time), the last `held_out` of each user (last), or
            all rows of a share of the users (user), whose last rows are found by the rows before.
        accept_leakage: Names of findings of the leakage audit that the protocol at hand knowingly
            accepts.
    """

    # The one split under which training knows no more than a served model does.
    kind: str = "time"
    validation: float = 0.1
    test: float = 0.1
    seed: int = 0
    held: Literal["random", "latest"] = "random"
    ties: Literal["file", "drawn", "together"] = "file"
    held_out: int = 1
    validation_by: Literal["kind", "time", "last", "user"] = "kind"
    accept_leakage: tuple[str, ...] = ()

    def __post_init__(self):
        # Up to 0.99 each; that both leave a share for train is checked where rows are counted.
        check = FieldChecks(self, "config.split")
        check.between(0.0, 0.99, "validation", "test")
        check.at_least(1, "held_out")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeaturesConfig:
    """The feature specification, in a file or in place; see `twotower.features.spec`.

    Attributes:
        path: Path of a JSON file with the two mappings; empty for those below.
        user: Mapping of users' feature names to their specifications.
        item: Mapping of items' feature names to their specifications.
    """

    path: str = ""
    user: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    item: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TowerConfig:
    """One tower over the vectors of its features.

    Attributes:
        kind: Kind of tower, a key of `twotower.towers.tower.TOWERS`: mlp (dense layers), or one of
            your own.
        options: Options of a kind of your own, see `twotower.register`.
        layers: Widths of the dense layers; the last is D and has no activation. Empty for the
            combined features themselves (matrix factorisation when the id is the only feature).
        combine: Combination of the vectors of the features, the history's among them, into the
            input of the first layer: concatenated, or summed, for which all must be of one width.
            The features of an event of the history are combined alike.
        activation: Activation between the layers: relu, gelu, silu or tanh.
        dropout: Share of the combined features, and of hidden units, dropped in training, from 0 to
            0.99.
        layer_dropout: Shares in the place of one `dropout`: that of the combined features, then one
            for each hidden layer. (0.5, 0.1) goes with layers=(128, 64).
        layer_norm: Whether hidden units are normalised per example.
        batch_norm: Whether hidden units are normalised per batch.
        order: Order of the normalisation and the activation of hidden units.
        output_norm: Whether the vector of the tower is normalised per example, with a learned scale
            and offset of each number (layer norm), before `config.model.normalize` makes its length
            1.
    """

    kind: str = "mlp"
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    layers: tuple[int, ...] = ()
    combine: Literal["concatenate", "sum"] = "concatenate"
    activation: str = "relu"
    # Of the features too, since wide embeddings of ids overfit:
    # `experiments/configs/movielens_100k.py` drops 60 %.
    dropout: float = 0.0
    # Not a second type of `dropout`: a flag of the command line has one type.
    layer_dropout: tuple[float, ...] = ()
    layer_norm: bool = False
    batch_norm: bool = False
    order: Literal["norm_activation", "activation_norm"] = "norm_activation"
    output_norm: bool = False

    def __post_init__(self):
        check = FieldChecks(self, "TowerConfig")
        check.between(0.0, 0.99, "dropout")
        check.widths("layers")
        self._check_layer_dropout(check)
        has_norm = self.layer_norm or self.batch_norm
        check.require(
            self.order == "norm_activation" or has_norm,
            "order",
            "'norm_activation' without layer_norm or batch_norm: there is nothing to order",
        )

    def _check_layer_dropout(self, check: FieldChecks) -> None:
        """Refuses shares out of range, of another number, or beside one for all layers."""
        if not self.layer_dropout:
            return
        # Written so that NaN, which compares as False, is refused.
        in_range = all(0.0 <= rate <= 0.99 for rate in self.layer_dropout)
        check.require(in_range, "layer_dropout", "shares between 0.0 and 0.99")
        # The features and all layers but the last, whose output is the vector.
        count = max(1, len(self.layers))
        check.require(
            len(self.layer_dropout) == count,
            "layer_dropout",
            f"of length {count} with layers={self.layers}: one share for the combined features and "
            "one for each layer but the last",
        )
        right = f"0.0 beside layer_dropout={self.layer_dropout}"
        check.require(self.dropout == 0.0, "dropout", right)


@dataclasses.dataclass(frozen=True, kw_only=True)
class HistoryConfig:
    """The user tower's reader of a feature of type "history".

    Its output is combined with the user's other features.

    Attributes:
        kind: Kind of reader, a key of `twotower.towers.history.HISTORIES`: bag (weighted mean),
            attention (mean by learned weights), causal (a Transformer in which each position sees
            only earlier ones), gru (a recurrent network, GRU4Rec's) or bidirectional (a
            Transformer, pooled).
        width: Width of a dense layer on the vector of each event; 0 for the width of the item's
            tables.
        blocks: Number of Transformer blocks, or of layers of a GRU.
        heads: Number of attention heads; must divide the width.
        block: Kind of Transformer block: sasrec (attention and two dense layers, each added to its
            input) or ligr (both gated, the layers SwiGLU).
        expansion: Width of the hidden units of a block, in multiples of its width.
        positions: Kind of position information.
        dropout: Share of units dropped in training, from 0 to 0.99, of the events' vectors and of
            the output of each block before it is added, or of each layer of a GRU.
        empty_rate: Share of the histories that are emptied in training, from 0 to 0.99, so that
            users without one, who are rare among training rows, are served well.
        pooling: Pooling of the bidirectional kind: mean, cls (the vector of a learned token) or
            attention.
        recency: Whether bags learn the weight of an event from the number of events after it, in
            addition to its other weights.
    """

    # A kind that sequences of whole users can be trained with; see `twotower.config_rules`.
    kind: str = "causal"
    width: int = 0
    # Two blocks and dropout .2 are the setting that SASRec was published with for MovieLens-1M.
    blocks: int = 2
    heads: int = 2
    block: str = "sasrec"
    expansion: int = 4
    positions: Literal["learned", "rotary"] = "learned"
    dropout: float = 0.2
    empty_rate: float = 0.0
    pooling: Literal["mean", "cls", "attention"] = "mean"
    recency: bool = False

    def __post_init__(self):
        check = FieldChecks(self, "config.model.history")
        check.between(0.0, 0.99, "dropout", "empty_rate")
        check.at_least(0, "width")
        # Whether the heads divide the width is checked with the towers: 0 takes the width of a
        # table.
        check.at_least(1, "blocks", "heads", "expansion")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The pair of towers and the comparison of their vectors.

    Attributes:
        user: The tower of users.
        item: The tower of items.
        history: The user tower's reader of the user's history, where that is a feature.
        normalize: Whether both vectors are L2-normalised, so that scores are cosines.
        temperature: Divisor of the scores in the loss, from 0.01 to 1; never used at serving, where
            it changes no ranking.
        learn_temperature: Whether the logarithm of the temperature is trained, within the same
            bounds.
        dtype: Type of the arithmetic in the towers and in the products of the loss; parameters,
            sums and vectors stay float32. "auto" is bfloat16 where the machine that begins a run
            multiplies it, float32 elsewhere; the run keeps it.
    """

    user: TowerConfig = TowerConfig()
    item: TowerConfig = TowerConfig()
    history: HistoryConfig = HistoryConfig()
    normalize: bool = True
    # 0.05 to 0.07 is usual for normalised vectors; at 1 a cosine can hardly tell items apart.
    temperature: float = 0.07
    learn_temperature: bool = True
    # bfloat16 has eight bits of precision: a long sum in it would lose its small terms.
    dtype: Literal["auto", "float32", "bfloat16"] = "float32"

    def __post_init__(self):
        FieldChecks(self, "config.model").between(0.01, 1.0, "temperature")


@dataclasses.dataclass(frozen=True, kw_only=True)
class NegativesConfig:
    """The candidates that each positive is compared with.

    Sources add up: the correction knows the expected count of an item over all of them.

    Attributes:
        in_batch: Whether the positives of the batch's other rows, of every device, are candidates.
        uniform: Number of items drawn from the corpus at each step, each equally likely, shared by
            the batch. -1 for a quarter of the batch where the corpus holds items that training
            never saw (which would otherwise never be negatives), and none elsewhere.
        popularity: Number of items drawn at each step in proportion to their training rows to the
            power `alpha`, shared by the batch.
        alpha: Exponent of `popularity`, at least 0.
        catalogue: Whether every item of the corpus is a candidate (full softmax), in place of all
            the above; for small catalogues.
        queue: Number of past item vectors kept as candidates (cross-batch memory), a multiple of
            the batch size; 0 for none.
        queue_warmup: Steps before the queue is used.
        queue_age: Steps after which an entry of the queue is no longer used; 0 to use it until it
            is overwritten.
        mined: Number of hard negatives for each query, drawn from its pool of items that the model
            itself ranks high.
        mined_refresh: Steps between two rankings.
        mined_ranks: First rank of the pool, and the rank after its last; known positives are left
            out.
        mined_margin: Score margin of likely positives: items that score higher than a positive of
            the user less this are left out of the pool. -1 keeps them.
        explicit: Number of hard negatives for each query, drawn from the training rows of its user
            whose `objective.label` is 0.
        frequency: Estimator of how often an item is drawn in a batch, a key of
            `twotower.objectives.frequency.FREQUENCIES`.
    """

    in_batch: bool = True
    # -1 rather than 0: items that are never negatives keep their random direction, and surface.
    uniform: int = -1
    popularity: int = 0
    # The exponent of word2vec's negative sampling.
    alpha: float = 0.75
    catalogue: bool = False
    queue: int = 0
    # Early on the model changes so fast that vectors of some steps ago say little.
    queue_warmup: int = 0
    queue_age: int = 0
    mined: int = 0
    mined_refresh: int = 1000
    # The very first ranks often are positives that the log does not show.
    mined_ranks: tuple[int, ...] = (10, 100)
    mined_margin: float = -1.0
    explicit: int = 0
    # Counts of the training rows; the other kinds estimate them from the batches.
    frequency: str = "exact"

    def __post_init__(self):
        check = FieldChecks(self, "config.objective.negatives")
        # -1 is "automatic" for the one and "no margin" for the other.
        check.at_least(-1, "uniform", "mined_margin")
        check.at_least(0, "popularity", "alpha", "queue", "queue_warmup", "queue_age")
        # Draws that do not divide over the devices are checked in `twotower.training.checks`.
        check.at_least(0, "mined", "explicit")
        check.at_least(1, "mined_refresh")
        ranks = self.mined_ranks
        in_order = len(ranks) == 2 and 0 <= ranks[0] < ranks[1]
        check.require(in_order, "mined_ranks", "two ranks, the first below the second")
        # -1 is not counted: whether it draws anything is known only with the data.
        shared = self.in_batch or self.catalogue or self.popularity or self.uniform > 0
        check.require(
            bool(shared) or not self.mined,
            "mined",
            "beside other sources: before the first ranking it has nothing",
        )
        # Every item is a candidate already; a second source would count some of them twice.
        if self.catalogue:
            for name in ("uniform", "popularity", "queue"):
                check.require(
                    getattr(self, name) <= 0,
                    name,
                    "0 with config.objective.negatives.catalogue=True, which compares with every "
                    "item already",
                )


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """A task beside retrieval: the probability that the label of a row is 1.

    It is predicted from the vectors of the row's user and item.

    Attributes:
        label: Column of the interactions that holds 0, 1 or nothing.
        weight: Weight of the task's loss, at least 0.
        pos_weight: Weight of a row with label 1, in rows with label 0.
        combine: Combination of the two vectors: multiply, or concatenate (which needs hidden
            layers: without any, the order of items is the same for every user).
        layers: Widths of hidden layers.
    """

    label: str = ""
    weight: float = 1.0
    pos_weight: float = 1.0
    combine: Literal["multiply", "concatenate"] = "multiply"
    layers: tuple[int, ...] = ()

    def __post_init__(self):
        check = FieldChecks(self, "HeadConfig")
        check.at_least(0, "weight")
        # 0 would train on negatives alone.
        check.require(self.pos_weight > 0, "pos_weight", "above 0")
        check.widths("layers")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """The loss that training minimises.

    Attributes:
        loss: Retrieval loss, a key of `twotower.objectives.losses.LOSSES`, or
            "binary_cross_entropy".
        options: Options of a loss of your own, see `twotower.register`.
        logq: Whether the log expected count of each candidate is subtracted (sampling-bias
            correction), by the losses that know it.
        mask_same_user: Whether other positives of a query's user are left out of its negatives.
        symmetric: Whether the loss of finding the user among the batch's users is averaged in.
        margin: Margin taken off the positive's score, or that of the hinge, triplet and cosine
            contrastive losses.
        positive_temperature: Temperature of the positive in the bilateral softmax loss; 0 for the
            model's.
        calibration: Parameter t of gBCE, from 0 (binary cross-entropy) to 1 (unbiased
            probabilities).
        negative_weight: Weight of the negatives' term in the cosine contrastive loss.
        label: Column of the interactions that holds the label, 0 or 1. Rows with 0 are no positives
            of a retrieval loss; a pointwise loss learns both. Empty if every row is a positive.
        pos_weight: Weight of a row with label 1 in binary cross-entropy, in rows with label 0.
        weight: Weight of the retrieval loss beside the heads; 0 trains the heads alone.
        heads: Mapping of names to further tasks, see `HeadConfig`.
        negatives: The negatives of the retrieval loss.
        matryoshka: Widths below D at which the retrieval loss is taken too, of vectors cut to their
            first numbers (and normalised again where vectors are); all count alike. Vectors can
            then be cut to any of them.
        block: Number of queries compared with all candidates at once; 0 chooses it.
        softmax_kernel: How a loss of the softmax kind is computed: by "blocks" of queries, or by
            "pallas", kernels for NVIDIA GPUs that write no logits. Where these do not serve (the
            loss, the vectors, the device), blocks take their place and a warning says so.
    """

    # Text, not a Literal: modules of users add losses to the registry.
    loss: str = "softmax"
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    logq: bool = True
    mask_same_user: bool = True
    symmetric: bool = False
    margin: float = 0.0
    positive_temperature: float = 0.0
    # 0.75 is the value of gSASRec, in the paper that introduces the loss.
    calibration: float = 0.75
    negative_weight: float = 1.0
    label: str = ""
    pos_weight: float = 1.0
    weight: float = 1.0
    heads: Mapping[str, HeadConfig] = dataclasses.field(default_factory=dict)
    negatives: NegativesConfig = NegativesConfig()
    # Widths below D are checked against the towers' last layers, in `twotower.training.checks`.
    matryoshka: tuple[int, ...] = ()
    block: int = 0
    softmax_kernel: Literal["blocks", "pallas"] = "blocks"

    def __post_init__(self):
        check = FieldChecks(self, "config.objective")
        check.at_least(0, "positive_temperature", "negative_weight", "weight", "margin", "block")
        check.between(0.0, 1.0, "calibration")
        check.require(self.pos_weight > 0, "pos_weight", "above 0")
        # Heads alone may be trained on the vectors, but something must be.
        trained = self.weight or any(head.weight for head in self.heads.values())
        check.require(bool(trained), "weight", "above 0 where there are no heads to train")
        if self.loss == "binary_cross_entropy" and "label" in self.heads:
            check.refuse(
                "heads.label",
                ": 'label' is the name of what the loss itself learns. Choose another name.",
            )
        # Metrics and losses are logged under the name of their task.
        if "retrieval" in self.heads:
            check.refuse(
                "heads.retrieval",
                ": 'retrieval' is the name of the loss of the two towers. Choose another name.",
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DenseOptimizerConfig:
    """The optax optimizer of the dense parameters.

    Attributes:
        kind: Kind of optimizer, a key of `twotower.training.optimizers.DENSE`.
        learning_rate: Learning rate before the schedule.
        weight_decay: Decay of kernels alone (never of biases, norms or the temperature); of adamw
            only.
        clip_norm: Greatest global norm of the dense gradient; 0 leaves it alone.
    """

    # Dense parameters are few beside the tables, so two slots for each cost little.
    kind: str = "adam"
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    clip_norm: float = 0.0

    def __post_init__(self):
        check = FieldChecks(self, "config.training.optimizer")
        check.at_least(0, "learning_rate", "weight_decay", "clip_norm")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TableOptimizerConfig:
    """The sparse optimizer of the embedding tables, which changes only the rows a batch touches.

    Attributes:
        kind: Kind of optimizer, a key of `twotower.kernels.table_optimizers.TABLE_OPTIMIZERS`.
        learning_rate: Learning rate before the schedule.
        initial_accumulator: Initial sum of squared gradients of the Adagrad kinds. With 0 the first
            update of a row has length learning_rate x sqrt(D), whatever the batch size; the loss
            being a mean, gradients are small and even 0.1 would all but stop learning.
    """

    # One accumulator a row instead of one a number: a table's optimizer state is 1/D of the table.
    kind: str = "rowwise_adagrad"
    learning_rate: float = 0.1
    # Optax starts at 0.1, which is above the squared gradients of a mean over the batch.
    initial_accumulator: float = 0.0

    def __post_init__(self):
        check = FieldChecks(self, "config.training.tables")
        check.at_least(0, "learning_rate", "initial_accumulator")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """A factor on both learning rates.

    Attributes:
        kind: Kind of schedule: constant, cosine (to 0 at the last step) or plateau.
        warmup_steps: Steps of linear rise from 0 before it.
        factor: Factor on the rates at each plateau, from 0 to 1.
        patience: Validations without improvement that leave the rates as they are; the next one
            lowers them.
    """

    # Adagrad lowers the rates of the tables by itself.
    kind: str = "constant"
    warmup_steps: int = 0
    factor: float = 0.5
    patience: int = 3

    def __post_init__(self):
        check = FieldChecks(self, "config.training.schedule")
        check.at_least(0, "warmup_steps")
        check.between(0.0, 1.0, "factor")
        check.at_least(1, "patience")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """The training loop.

    Attributes:
        seed: Random seed of initialisation, data order and dropout.
        batch_size: Number B of examples in a batch of all devices, which is also the number of
            in-batch candidates. One that is larger than the data shrinks to it.
        examples: Kind of example. "interactions": each row, with the user's earlier rows as its
            history. "sequences": each user's sequence, whose positions are all trained in one pass
            (with a history of kind causal or gru). A row of the batch then has L + 1 positions that
            whole sequences are packed into, so that short ones cost less than a long one.
        crop: Part to train of a sequence longer than L: the last, or a random one, another in each
            pass.
        steps: Number of gradient steps.
        steps_for: Number of examples (rows, or packed rows of whole sequences) that `steps` are
            meant for: with more or fewer of them there are as many passes, and `steps`,
            `validate_every` and the warm-up are in proportion; 0 leaves them as they are.
        passes: Number of passes over the training examples (epochs) in place of `steps`, which is
            then left out: the steps are passes x examples / batch size, rounded up. 0 counts by
            steps.
        optimizer: The optimizer of the dense parameters.
        tables: The optimizer of the embedding tables.
        schedule: The schedule of both.
        log_every: Steps between lines of metrics.
        validate_every: Steps between validations, each followed by a checkpoint. With `passes`, its
            default stands for one pass.
        metric: Validation metric that names the best checkpoint, the one with its greatest value.
        patience: Validations without improvement before training stops; 0 never stops early.
        keep_checkpoints: Number of latest checkpoints kept, beside the best.
        input: Place that batches come from. "resident": all data lies on the device. "host": each
            process gathers its rows of a batch from arrays that are mapped into its memory.
            "stream": each process reads its rows alone, ahead of the steps, from shards of records
            that are written once (extra stream); for logs beyond memory. "auto": resident where the
            data fits into `resident_megabytes`, else host. The first two give the same bits; a
            stream has another order of examples.
        resident_megabytes: Greatest size, in megabytes, of encoded data that the input "auto"
            copies to the device.
        steps_per_dispatch: Number of steps that the device runs before the host starts more; must
            divide `validate_every` and `steps`. 0 takes as many as last a quarter of a second, 32
            at most, where all data is on the device, and 1 elsewhere. A stream has 1. No number
            changes a bit.
        accumulate: Number of parts that a batch is computed in, one after the other, to save
            memory. It adds no negatives, so it is refused for losses that take them from the batch.
    """

    seed: int = 0
    batch_size: int = 1024
    examples: Literal["interactions", "sequences"] = "interactions"
    crop: Literal["last", "random"] = "last"
    # Steps rather than passes, so that --config.training.steps=200 alone means what it says.
    steps: int = 1000
    steps_for: int = 0
    # Fractions too: a pass over a large log may be more than is needed.
    passes: float = 0.0
    optimizer: DenseOptimizerConfig = DenseOptimizerConfig()
    tables: TableOptimizerConfig = TableOptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    log_every: int = 50
    validate_every: int = 200
    metric: str = "recall@10"
    patience: int = 0
    keep_checkpoints: int = 2
    input: Literal["auto", "resident", "host", "stream"] = "auto"
    resident_megabytes: int = 2048
    # The host costs up to half a millisecond a step: a third of a step of 256 examples.
    steps_per_dispatch: int = 0
    accumulate: int = 1

    def __post_init__(self):
        check = FieldChecks(self, "config.training")
        check.at_least(1, "batch_size", "steps", "log_every", "validate_every", "keep_checkpoints")
        # 0 parts of a batch would divide by zero below.
        check.at_least(1, "accumulate")
        check.at_least(0, "seed", "steps_for", "patience", "resident_megabytes")
        check.at_least(0, "steps_per_dispatch")
        check.between(0.0, 1e6, "passes")
        if self.passes:
            self._check_passes(check)
        check.require(
            self.input != "stream" or self.steps_per_dispatch <= 1,
            "steps_per_dispatch",
            "0 or 1 with config.training.input='stream', whose batches come one by one",
        )
        check.require(
            self.batch_size % self.accumulate == 0,
            "accumulate",
            f"a divisor of the batch size {self.batch_size}",
        )
        check.require(
            self.crop == "last" or self.examples == "sequences",
            "crop",
            "'last' with config.training.examples='interactions', whose histories are always the "
            "latest events",
        )

    def _check_passes(self, check: FieldChecks) -> None:
        """Refuses a number of steps beside a number of passes."""
        steps = type(self).steps
        check.require(
            self.steps == steps,
            "steps",
            f"left out (or {steps}, the default) with config.training.passes={self.passes:g}, "
            "which decides the number of steps",
        )
        check.require(
            not self.steps_for,
            "steps_for",
            f"0 with config.training.passes={self.passes:g}, which counts passes already",
        )

    @property
    def resident_limit(self) -> float:
        """Greatest size, in megabytes, of training data that lies on the device."""
        if self.input == "auto":
            return self.resident_megabytes
        return math.inf if self.input == "resident" else 0.0

    def scaled_to(self, num_examples: int) -> TrainingConfig:
        """Returns the options with as many `steps` as the examples ask for.

        Without `steps_for` and `passes` they stay as they are. Each validation ends with a whole
        dispatch. Few examples get no fewer steps than `steps_for` means before the first
        validation.

        Args:
            num_examples: The number of rows, or of packed rows of whole sequences.
        """
        if self.passes:
            return self._with_steps_of_passes(num_examples)
        if not self.steps_for:
            return self
        # The number of validations stays; the steps between them change.
        validations = math.ceil(self.steps / self.validate_every)
        # Dispatches of no fixed length end wherever they must.
        dispatch = max(1, self.steps_per_dispatch)
        per_validation = validations * dispatch
        # Rounded to whole dispatches between two validations, the unit in which the loop moves.
        needed = round(self.steps * num_examples / self.steps_for / per_validation)
        fewest = math.ceil(self.validate_every / per_validation)
        every = max(needed, fewest) * dispatch
        # The same share of the run as before.
        warmup = round(self.schedule.warmup_steps * validations * every / self.steps)
        return dataclasses.replace(
            self,
            steps=validations * every,
            validate_every=every,
            schedule=dataclasses.replace(self.schedule, warmup_steps=warmup),
        )

    def _with_steps_of_passes(self, num_examples: int) -> TrainingConfig:
        """Returns the options with the number of steps in the place of that of passes."""
        dispatch = max(1, self.steps_per_dispatch)
        steps = math.ceil(self.passes * num_examples / self.batch_size)
        # The loop moves by whole dispatches.
        steps = math.ceil(steps / dispatch) * dispatch
        every = self.validate_every
        if every == type(self).validate_every:
            every = math.ceil(num_examples / self.batch_size)
        every = math.ceil(every / dispatch) * dispatch
        # Without `passes`, so that what is scaled once stays as it is.
        return dataclasses.replace(self, passes=0.0, steps=steps, validate_every=min(every, steps))


@dataclasses.dataclass(frozen=True, kw_only=True)
class RerankConfig:
    """The choice of the items that are shown, among more candidates.

    Attributes:
        kind: Kind of re-ranker, a key of `twotower.retrieval.rerank.RERANKERS`: mmr (items unlike
            those above them) or caps (at most so many of a category); empty for none.
        multiple: Number of candidates, in multiples of the length of the list.
        options: Options of the kind: {"diversity": 0.3} of mmr, {"column": "category", "max_items":
            2} of caps, or those of a re-ranker of your own.
    """

    kind: str = ""
    multiple: int = 5
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        FieldChecks(self, "config.retrieval.rerank").at_least(1, "multiple")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RetrievalConfig:
    """The index, and the columns that are shown of an item.

    Attributes:
        index: Kind of index; auto chooses one by the vectors and the platform, and compares ScaNN's
            trees on the vectors where these are many; fastest compares FAISS's inverted files with
            them (extra faiss).
        optimize_for: Use that auto and fastest choose for: queries that come one by one, as a
            server gets them, or batches of hundreds.
        target_recall: Share of the exact top `k` that the index must find, from 0 to 1; decides how
            hard a query searches.
        k: Length of the lists that the index is tuned for; longer ones are tuned beside it.
        popularity: Whether the index has one more coordinate, the log count of training rows, so
            that a query may weigh popularity.
        dim: Width that the vectors of users and items are cut to, one of `objective.matryoshka`; 0
            keeps all of D.
        vectors: Type of the stored item vectors: float32, or int8 with a scale for each item, a
            quarter of the size (see `twotower.index.vectors`). The loss of either is measured at
            export and stands in the manifest.
        hnsw_m: Links of an item in each layer of a graph (M of HNSW; the lowest layer has twice as
            many). More of them find more at the same effort, and take memory and building time.
        hnsw_ef_construction: Candidates among which the links of an item are chosen when a graph is
            built; more of them give a better graph, in more time.
        display: Columns of the items table kept beside the vectors; empty keeps all.
        rerank: Re-ranking of the lists that a bundle recommends.
    """

    index: Literal[
        "auto",
        "fastest",
        "exact",
        "scann_brute_force",
        "scann_tree",
        "scann_tree_ah",
        "hnswlib",
        "faiss",
        "faiss_ivf",
    ] = "auto"
    optimize_for: Literal["queries", "batches"] = "queries"
    # Of the exact list of the model: the loss of the index comes on top of that of the model.
    target_recall: float = 0.98
    k: int = 10
    # One more number a vector; queries without a weight for it rank as before.
    popularity: bool = False
    dim: int = 0
    vectors: Literal["float32", "int8"] = "float32"
    # From the upper half of the range that Malkov and Yashunin (2016) recommend, 5 to 48, which is
    # for wide vectors and high recalls; the second is hnswlib's default.
    hnsw_m: int = 32
    hnsw_ef_construction: int = 200
    display: tuple[str, ...] = ()
    rerank: RerankConfig = RerankConfig()

    def __post_init__(self):
        check = FieldChecks(self, "config.retrieval")
        check.between(0.0, 1.0, "target_recall")
        # An item with one link at most is the end of every path.
        check.at_least(2, "hnsw_m")
        check.at_least(1, "k", "hnsw_ef_construction")
        check.at_least(0, "dim")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """The measurements of retrieval.

    Attributes:
        ks: Lengths K of the lists that are measured.
        validation_queries: Greatest number of queries of a validation, always the same ones, so
            that training does not wait for millions; 0 for all. Fewer, at least 1,000, are asked
            where they would take over a tenth of the training. The `evaluate` command asks all.
        query: Kind of query: user (all held-out items of a user are right) or interaction (each
            held-out row is a query of its own).
    """

    ks: tuple[int, ...] = (10, 50, 100)
    query: Literal["user", "interaction"] = "user"
    # The standard error of a recall over them is at most half a percent.
    validation_queries: int = 10_000

    def __post_init__(self):
        check = FieldChecks(self, "config.evaluation")
        check.at_least(0, "validation_queries")
        in_range = min(self.ks, default=0) >= 1
        check.require(in_range, "ks", "one or more list lengths of at least 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """An experiment.

    Attributes:
        plugins: Python modules that register kinds of your own, such as "mine.losses", or paths of
            .py files, relative to the experiment file or to the working folder. Every command
            imports them, never from inside the folder of a run; see `twotower.plugins`.
        data: The log.
        split: Its division into train, validation and test.
        features: The features of users and items.
        model: The towers.
        objective: The loss.
        training: The training loop.
        retrieval: The index.
        evaluation: The measurements.
    """

    plugins: tuple[str, ...] = ()
    # Frozen, so that one instance can be the default of all configurations.
    data: DataConfig = DataConfig()
    split: SplitConfig = SplitConfig()
    features: FeaturesConfig = FeaturesConfig()
    model: ModelConfig = ModelConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    training: TrainingConfig = TrainingConfig()
    retrieval: RetrievalConfig = RetrievalConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    def __post_init__(self):
        # Last: each section has checked itself when it was made.
        check_rules(self)

    def training_sections(self) -> dict[str, Any]:
        """Returns the sections that decide what training computes, as nested dicts.

        These are all but `retrieval`, which may change afterwards.
        """
        sections = dataclasses.asdict(self)
        # The index is built after training, from the same checkpoint, as often as is wanted.
        del sections["retrieval"]
        # Runs of 1, once the default, and of 0 are the same: no bit depends on it.
        training = sections["training"]
        training["steps_per_dispatch"] = max(1, training["steps_per_dispatch"])
        # A stream alone has an order of its own.
        if training["input"] in ("resident", "host"):
            training["input"] = "auto"
        return sections

    def identity(self) -> dict[str, Any]:
        """Returns the training options that differ from their defaults.

        An option that a later version adds leaves it as it was.
        """
        # Only what differs from the defaults: a new option must not change the id of an old run.
        return non_defaults(self.training_sections(), Config().training_sections())

    def to_json(self) -> str:
        """Returns all options as JSON, from which `from_dict` makes the same configuration."""
        # Sorted keys: equal configurations are equal files.
        return json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False, sort_keys=True)


def non_defaults(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the options in `values` that differ from `defaults`, section by section.

    >>> non_defaults({"seed": 1, "schedule": {"kind": "cosine", "factor": 1}},
    ...              {"seed": 0, "schedule": {"kind": "", "factor": 1}})
    {'seed': 1, 'schedule': {'kind': 'cosine'}}
    """
    # An option that an older file lacks is listed as None, as it differs from its default.
    changed: dict[str, Any] = {name: None for name in defaults if name not in values}
    for name, value in values.items():
        default = defaults.get(name)
        if isinstance(value, Mapping) and isinstance(default, Mapping):
            # A section in which nothing differs becomes an empty dict, and is left out below.
            value = non_defaults(value, default)
            default = {}
        if value != default:
            changed[name] = value
    return changed


def defaults() -> Any:
    """Returns every option at its default, the `ConfigDict` that an experiment file starts from.

    As it has all options, the command line can override any of them. It is not locked: the errors
    of `from_dict` for an unknown option are better.
    """
    # Here alone: everything else reads a configuration without it.
    import ml_collections

    return ml_collections.ConfigDict(dataclasses.asdict(Config()))


def from_dict(values: Any) -> Config:
    """Returns the configuration that a mapping describes: a `ConfigDict`, or parsed JSON.

    Raises:
        ConfigError: A field is unknown (the nearest one is named), of the wrong type or out of
            range, or does not go with another.
    """
    # Copied field by field: later changes of the ConfigDict do not reach the frozen tree.
    return build(Config, values, "config")
