"""One tree of frozen dataclasses: every option, its default and its meaning, declared once.

An experiment file returns an `ml_collections.ConfigDict`; `from_dict` turns it into a `Config`
once, at the door, and refuses what it does not know. Everything below takes the dataclasses.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from twotower.config_rules import check_ranges
from twotower.core.fields import build


@dataclasses.dataclass(frozen=True, kw_only=True)
class TableConfig:
    """Where one table is read from, and which of its columns is which.

    Attributes:
        path: a file, a folder or a glob of CSV (also .gz) or Parquet files; environment variables
            and ~ are expanded. Of the source bigquery, a table: PROJECT.DATASET.TABLE, or
            DATASET.TABLE of the client's project.
        query: SQL of BigQuery, in the place of a path.
        columns: our name -> the file's name, for example {"user_id": "CustomerID"}.
            "metadata.brand" names a field of a column of JSON objects. Columns not named keep their
            own names.
        names: the column names of a file that has no header line.
        delimiter: between the fields of a CSV file.
        encoding: of a CSV file.
        timestamp_format: strptime format of a textual timestamp; empty means ISO 8601.
        timestamp_unit: of a numeric timestamp: s, ms, us or ns.
    """

    path: str = ""
    query: str = ""
    columns: Mapping[str, str] = dataclasses.field(default_factory=dict)
    names: tuple[str, ...] = ()
    delimiter: str = ","
    encoding: str = "utf-8"
    timestamp_format: str = ""
    timestamp_unit: str = "s"


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which log to learn from, and which of its rows.

    Attributes:
        source: a key of `twotower.data.sources.load.SOURCES`.
        path: of the interactions, in the place of `interactions.path`; empty: that one.
        interactions: who did what with which item.
        user_table: what is known of users; an empty path means nothing but their ids.
        item_table: what is known of items, which is also the corpus; an empty path means the items
            of the log.
        test: the test rows of a fixed split.
        dataset: TFDS name, such as movielens/100k-ratings.
        data_dir: where TFDS keeps prepared data; empty means its own default.
        project: of BigQuery, which pays for its queries; empty means that of the environment's
            credentials.
        location: where BigQuery runs queries; empty lets it find out.
        num_interactions: size of the generated shop.
        num_items: its items; 0: as many as suit its size.
        shop_seed: seed of the generated shop.
        where: rows to keep, as (column, operator, value); operators are ==, !=, <, <=, >, >=, in,
            not in, starts with, not starts with. ("rating", ">=", 4) and ("event", "in",
            ("purchase",)) are the usual ones.
        k_core: keep users and items with at least this many rows, repeatedly until all have; 0
            keeps all.
        duplicates: of several rows with one user and item, keep "all", the "first" or the "last".
        item_group: a column of the items table to recommend instead of the item id (a title, a
            parent product).
    """

    source: str = "shop"
    path: str = ""
    interactions: TableConfig = TableConfig()
    user_table: TableConfig = TableConfig()
    item_table: TableConfig = TableConfig()
    test: TableConfig = TableConfig()
    dataset: str = ""
    data_dir: str = ""
    project: str = ""
    location: str = ""
    num_interactions: int = 100_000
    num_items: int = 0
    shop_seed: int = 0
    where: tuple[tuple, ...] = ()
    k_core: int = 0
    duplicates: str = "all"
    item_group: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SplitConfig:
    """How rows are divided into train, validation and test.

    Attributes:
        kind: a key of `twotower.data.split.SPLITS`.
        validation: share of rows held out for validation (any value above 0 for leave_last_out: one
            row a user).
        test: share of rows held out for test (likewise).
        seed: of a random choice of rows.
        held: fixed, where no row is named validation: a "random" share of the training rows, or the
            "latest" share of each user's, which is what to tune on where the test rows are later
            ones.
        accept_leakage: findings of the leakage audit that the protocol at hand knowingly accepts,
            by name.
    """

    kind: str = "time"
    validation: float = 0.1
    test: float = 0.1
    seed: int = 0
    held: str = "random"
    accept_leakage: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeaturesConfig:
    """The feature specification: a JSON file, or the two mappings themselves (see
    `twotower.features.spec`)."""

    path: str = ""
    user: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    item: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TowerConfig:
    """One tower over the concatenated feature vectors.

    Attributes:
        kind: "mlp", dense layers.
        layers: widths of the dense layers, the last of which is D and has no activation. Empty: the
            concatenated features are the vector (matrix factorisation when the id is the only
            feature).
        activation: between the layers: relu, gelu, silu or tanh.
        dropout: share of the concatenated features, and of hidden units, dropped in training.
        layer_norm: normalise hidden units per example.
        batch_norm: normalise hidden units per batch.
    """

    kind: str = "mlp"
    layers: tuple[int, ...] = ()
    activation: str = "relu"
    dropout: float = 0.0
    layer_norm: bool = False
    batch_norm: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class HistoryConfig:
    """How the user tower reads a feature of type "history"; what comes of it is concatenated with
    the user's other features.

    Attributes:
        kind: a key of `twotower.towers.history.HISTORIES`: bag (weighted mean), attention (mean by
            learned weights), causal (a Transformer whose every position knows what is before it
            alone) or bidirectional (one that is pooled).
        width: of a dense layer on the vector of each event; 0: as wide as what the item's tables
            give.
        blocks: of the Transformer.
        heads: of its attention; must divide the width.
        block: sasrec (attention and two dense layers, each added to its input) or ligr (both gated,
            the layers SwiGLU).
        expansion: width of the hidden units of a block, in widths.
        positions: learned, or rotary.
        dropout: share of the units dropped in training, of the events' vectors and of what each
            block adds.
        pooling: of the bidirectional kind: mean, cls (a learned token's vector) or attention.
        recency: of the bags: learn how much an event counts by how many follow it, beside its other
            weights.
    """

    kind: str = "causal"
    width: int = 0
    blocks: int = 2
    heads: int = 2
    block: str = "sasrec"
    expansion: int = 4
    positions: str = "learned"
    dropout: float = 0.2
    pooling: str = "mean"
    recency: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The pair of towers and how their vectors are compared.

    Attributes:
        user, item: the towers.
        history: how the user tower reads the user's history, where that is a feature.
        normalize: L2-normalise both vectors, so that scores are cosines.
        temperature: scores are divided by it in the loss (never at serving, where it changes no
            ranking).
        learn_temperature: train its logarithm, kept within [0.01, 1].
        dtype: of the arithmetic in the towers and in the products of the loss: float32, or bfloat16
            (parameters, sums and vectors stay float32).
    """

    user: TowerConfig = TowerConfig()
    item: TowerConfig = TowerConfig()
    history: HistoryConfig = HistoryConfig()
    normalize: bool = True
    temperature: float = 0.07
    learn_temperature: bool = True
    dtype: str = "float32"


@dataclasses.dataclass(frozen=True, kw_only=True)
class NegativesConfig:
    """What each positive is compared with. Sources add up: the correction knows the expected count
    of an item over all of them.

    Attributes:
        in_batch: the positives of the other rows of the batch, of every device.
        uniform: items drawn from the corpus at each step, each equally likely, shared by the batch.
            -1: a quarter of the batch where the corpus holds items that training never saw (which
            would else never be a negative), otherwise none.
        popularity: items drawn at each step in proportion to their training rows to the power
            `alpha`, shared by the batch.
        alpha: see `popularity`.
        catalogue: every item of the corpus is a candidate (full softmax), for small catalogues; in
            the place of all the above.
        queue: past item vectors kept as candidates, a multiple of the batch size (cross-batch
            memory); 0 keeps none.
        queue_warmup: steps before the queue is used.
        queue_age: steps after which an entry is no longer used; 0: when it is overwritten.
        mined: hard negatives for each query, drawn from its pool of items ranked high by the model
            itself.
        mined_refresh: steps between rankings.
        mined_ranks: the pool: from the first of these ranks to before the second, known positives
            left out.
        mined_margin: items that score higher than a positive of the user less this are left out of
            the pool, being likely positives; -1 keeps them.
        explicit: hard negatives for each query, drawn from the training rows of its user whose
            `objective.label` is 0.
        frequency: how often an item is drawn in a batch: a key of
            `twotower.objectives.frequency.FREQUENCIES`.
    """

    in_batch: bool = True
    uniform: int = -1
    popularity: int = 0
    alpha: float = 0.75
    catalogue: bool = False
    queue: int = 0
    queue_warmup: int = 0
    queue_age: int = 0
    mined: int = 0
    mined_refresh: int = 1000
    mined_ranks: tuple[int, ...] = (10, 100)
    mined_margin: float = -1.0
    explicit: int = 0
    frequency: str = "exact"


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """A task beside retrieval: the probability that a row's label is 1, from the vectors of its
    user and item.

    Attributes:
        label: the column of the interactions that holds 0, 1 or nothing.
        weight: of its loss beside the others.
        pos_weight: how many times a row with label 1 counts.
        combine: how the two vectors meet: multiply, or concatenate (which needs hidden layers:
            without any, the order of items is the same for every user).
        layers: widths of hidden layers.
    """

    label: str = ""
    weight: float = 1.0
    pos_weight: float = 1.0
    combine: str = "multiply"
    layers: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """What training minimises.

    Attributes:
        loss: a key of `twotower.objectives.LOSSES` or `POINTWISE`.
        logq: subtract the log expected count of each candidate (sampling-bias correction), for the
            losses that know it.
        mask_same_user: other positives of a query's user are not its negatives.
        symmetric: average with the loss of finding the user among the batch's users.
        margin: taken off the positive's score (additive margin), or the margin of hinge, triplet
            and cosine contrastive losses.
        positive_temperature: of the positive in the bilateral softmax loss; 0 takes the model's
            temperature.
        calibration: t of gBCE, from 0 (binary cross-entropy) to 1 (unbiased probabilities).
        negative_weight: of the negatives' term in the cosine contrastive loss.
        label: the column of the interactions that holds the label, 0 or 1. Rows with 0 are no
            positives of a retrieval loss; a pointwise loss learns both. Empty: every row is a
            positive.
        pos_weight: how many times a row with label 1 counts in binary cross-entropy.
        weight: of the retrieval loss beside the heads; 0 trains the heads alone.
        heads: name -> `HeadConfig`.
        negatives: see its class.
        matryoshka: widths below D at which the retrieval loss is taken too, of vectors cut to their
            first numbers (and normalised again where vectors are); all count alike. Vectors can
            then be cut to any of them.
        block: queries compared with all candidates at once; 0 chooses.
    """

    loss: str = "softmax"
    logq: bool = True
    mask_same_user: bool = True
    symmetric: bool = False
    margin: float = 0.0
    positive_temperature: float = 0.0
    calibration: float = 0.75
    negative_weight: float = 1.0
    label: str = ""
    pos_weight: float = 1.0
    weight: float = 1.0
    heads: Mapping[str, HeadConfig] = dataclasses.field(default_factory=dict)
    negatives: NegativesConfig = NegativesConfig()
    matryoshka: tuple[int, ...] = ()
    block: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class DenseOptimizerConfig:
    """The optax optimizer of the dense parameters.

    Attributes:
        kind: a key of `twotower.training.optimizers.DENSE`.
        learning_rate: before the schedule.
        weight_decay: on kernels alone (never biases, norms or the temperature); adamw only.
        clip_norm: greatest global norm of the dense gradient; 0 leaves it alone.
    """

    kind: str = "adam"
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    clip_norm: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class TableOptimizerConfig:
    """The sparse optimizer of the embedding tables: only rows that a batch touches change.

    Attributes:
        kind: a key of `twotower.kernels.sparse_update.TABLE_OPTIMIZERS`.
        learning_rate: before the schedule.
        initial_accumulator: of the Adagrad kinds. With 0 the first update of a row has length
            learning_rate x sqrt(D), whatever the batch size; the loss being a mean, gradients are
            small and even 0.1 would all but stop learning.
    """

    kind: str = "rowwise_adagrad"
    learning_rate: float = 0.1
    initial_accumulator: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """A factor on both learning rates.

    Attributes:
        kind: constant, cosine (to 0 at the last step) or plateau.
        warmup_steps: steps of linear rise from 0 before it.
        factor: plateau: what the rates are multiplied by each time.
        patience: plateau: validations without improvement before that.
    """

    kind: str = "constant"
    warmup_steps: int = 0
    factor: float = 0.5
    patience: int = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """The loop.

    Attributes:
        seed: of initialisation, data order and dropout.
        batch_size: B, which is also the number of in-batch candidates.
        examples: "interactions": each row is an example, whose history is what is before it.
            "sequences": each user's sequence is one, and every position is trained in one pass (a
            causal history is needed). A row of the batch then has L + 1 places that whole sequences
            are packed into, so that short ones do not cost what a long one does.
        crop: of a sequence longer than L: train the "last" part, or a "random" one, another in each
            pass.
        steps: gradient steps in all.
        steps_for: the examples (rows, or packed rows of whole sequences) that `steps` are meant
            for: with more or fewer of them there are as many passes, and `steps`, `validate_every`
            and the warm-up are in proportion; 0 leaves them as they are.
        optimizer, tables, schedule: see their classes.
        log_every: steps between lines of metrics.
        validate_every: steps between validations, each followed by a checkpoint.
        metric: the validation metric that names the best checkpoint.
        patience: validations without improvement before training stops; 0 never stops early.
        keep_checkpoints: latest checkpoints kept, beside the best.
        resident_megabytes: encoded data up to this size is copied to the device once; larger data
            is streamed.
        steps_per_dispatch: steps that the device runs on its own before it is asked again, for
            small models; must divide `validate_every` and `steps`.
        accumulate: parts that a batch is computed in, one after the other, to save memory. It adds
            no negatives, so it is refused for losses that take them from the batch.
    """

    seed: int = 0
    batch_size: int = 1024
    examples: str = "interactions"
    crop: str = "last"
    steps: int = 1000
    steps_for: int = 0
    optimizer: DenseOptimizerConfig = DenseOptimizerConfig()
    tables: TableOptimizerConfig = TableOptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    log_every: int = 50
    validate_every: int = 200
    metric: str = "recall@10"
    patience: int = 0
    keep_checkpoints: int = 2
    resident_megabytes: int = 2048
    steps_per_dispatch: int = 1
    accumulate: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class RetrievalConfig:
    """The index and what is shown of an item.

    Attributes:
        index: auto, exact, scann_brute_force, scann_tree, scann_tree_ah, hnswlib or faiss (see
            `twotower.index.scann`).
        target_recall: share of the exact top `k` that the index must find; decides how hard a query
            searches.
        k: length of the lists that the index is tuned for; longer ones are tuned beside it.
        popularity: index one more coordinate, the log count of training rows, so that a query may
            weigh popularity.
        dim: width that the vectors of users and items are cut to: one of `objective.matryoshka`; 0
            keeps all of D.
        vectors: how item vectors are stored: float32, or int8 with a scale for each item, a quarter
            of the size (see `twotower.index.int8`). What either loses is measured at export and
            stands in the manifest.
        display: columns of the items table kept beside the vectors; empty keeps all.
    """

    index: str = "auto"
    target_recall: float = 0.98
    k: int = 10
    popularity: bool = False
    dim: int = 0
    vectors: str = "float32"
    display: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What is measured.

    Attributes:
        ks: list lengths K.
        validation_queries: asked at most at each validation, always the same ones, so that training
            does not wait for millions; 0 asks all. The `evaluate` command asks all.
        query: "user" (all held-out items of a user are right) or "interaction" (each held-out row
            is a query of its own).
    """

    ks: tuple[int, ...] = (10, 50, 100)
    query: str = "user"
    validation_queries: int = 10_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """An experiment."""

    data: DataConfig = DataConfig()
    split: SplitConfig = SplitConfig()
    features: FeaturesConfig = FeaturesConfig()
    model: ModelConfig = ModelConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    training: TrainingConfig = TrainingConfig()
    retrieval: RetrievalConfig = RetrievalConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    def __post_init__(self):
        check_ranges(self)

    def trained(self) -> dict[str, Any]:
        """The sections that decide what training computes: all but `retrieval`, which may change
        afterwards."""
        return {
            name: section
            for name, section in dataclasses.asdict(self).items()
            if name != "retrieval"
        }

    def identity(self) -> dict[str, Any]:
        """What of `trained` differs from the defaults: an option that a later version adds leaves
        it as it was."""
        return changed(self.trained(), Config().trained())

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False, sort_keys=True)


def changed(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The options in `values` that are not as in `defaults`, section by section.

    >>> changed({"seed": 1, "schedule": {"kind": "cosine", "factor": 1}}, {"seed": 0, "schedule": {"kind": "", "factor": 1}})
    {'seed': 1, 'schedule': {'kind': 'cosine'}}
    """
    found = {name: None for name in defaults if name not in values}
    for name, value in values.items():
        default = defaults.get(name)
        if isinstance(value, Mapping) and isinstance(default, Mapping):
            value, default = changed(value, default), {}
        if value != default:
            found[name] = value
    return found


def defaults() -> Any:
    """Every option at its default, as the `ml_collections.ConfigDict` that an experiment file
    starts from.

    Being whole, it lets the command line override any option. Not locked: `from_dict` says better
    what is wrong.
    """
    import ml_collections

    return ml_collections.ConfigDict(dataclasses.asdict(Config()))


def from_dict(values: Any) -> Config:
    """Validates a mapping (a ConfigDict, or parsed JSON) into a `Config`.

    Raises:
        ConfigError: a field is unknown (the nearest one is named), of the wrong type or out of
            range.
    """
    return build(Config, values, "config")
