"""What a feature can be: one frozen dataclass a kind, each of which checks itself."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping

from twotower.core.errors import choose
from twotower.core.times import UNITS_PER_SECOND
from twotower.features.base import Feature


@dataclasses.dataclass(frozen=True, kw_only=True)
class StringFeature(Feature):
    """One value of a vocabulary, such as an id or a brand.

    Attributes:
        min_count: training rows a value needs to have a row of its own.
        oov_rows: rows that all other values are spread over, by hash.
        oov_rate: share of the ids replaced by an out-of-vocabulary row in training, so that those
            rows are trained.
        initial_norm: expected norm of the rows that training starts from; what is seen rarely stays
            near them.
    """

    min_count: int = 1
    oov_rows: int = 8
    oov_rate: float = 0.01
    initial_norm: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        self._at_least(1, "min_count", "oov_rows")
        self._check(0 < self.initial_norm < math.inf, "initial_norm", "above 0")
        self._check(0 <= self.oov_rate < 1, "oov_rate", "at least 0 and below 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StringsFeature(StringFeature):
    """Several values of a vocabulary, such as genres: their rows are averaged.

    Attributes:
        separator: between the values of a text column; empty means that the column holds lists.
        max_length: values kept of a row, the first ones.
    """

    separator: str = ""
    max_length: int = 16

    def __post_init__(self):
        super().__post_init__()
        self._at_least(1, "max_length")


@dataclasses.dataclass(frozen=True, kw_only=True)
class IntFeature(Feature):
    """A whole number: a row for each bucket, or normalised.

    Attributes:
        buckets: how many, with about as many training users or items (rows, for a context column)
            in each.
        boundaries: the buckets themselves: a value v falls in the bucket after the last boundary <=
            v.
        normalize: (v - mean) / standard deviation and a flag for missing, instead of buckets.
        embedding_size: 0 is 8 for buckets, and no dense layer for a normalised number.
    """

    embedding_size: int = 0
    buckets: int = 16
    boundaries: tuple[float, ...] = ()
    normalize: bool = False

    def __post_init__(self):
        if not self.normalize and self.embedding_size == 0:
            object.__setattr__(self, "embedding_size", 8)
        super().__post_init__()
        self._at_least(2, "buckets")
        rising = all(
            low < high for low, high in itertools.pairwise((-math.inf, *self.boundaries, math.inf))
        )
        self._check(rising, "boundaries", "finite and strictly increasing")
        self._check(
            not (self.normalize and self.boundaries), "boundaries", "empty when normalize is true"
        )

    @property
    def has_table(self) -> bool:
        return not self.normalize


@dataclasses.dataclass(frozen=True, kw_only=True)
class FloatFeature(Feature):
    """A number, normalised, with a flag for missing.

    Attributes:
        log: take sign(v) log(1 + |v|) first, for prices and counts.
    """

    embedding_size: int = 0
    log: bool = False

    @property
    def has_table(self) -> bool:
        return False


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextFeature(Feature):
    """Text as the mean over its words and character n-grams, each hashed into one of `buckets`
    rows.

    Attributes:
        words: lengths of word n-grams; (1, 2) takes words and pairs of neighbours.
        characters: lengths of character n-grams within a word, its two boundaries counted as
            characters.
        buckets: rows of the table.
        max_length: pieces kept of a text: its words first, then its n-grams.
    """

    words: tuple[int, ...] = (1,)
    characters: tuple[int, ...] = (3, 4, 5)
    buckets: int = 65_536
    max_length: int = 96

    def __post_init__(self):
        super().__post_init__()
        self._at_least(1, "max_length")
        self._at_least(2, "buckets")
        self._check(
            bool(self.words or self.characters),
            "words",
            "one or more lengths when characters is empty",
        )
        for field in ("words", "characters"):
            sizes = getattr(self, field)
            self._check(
                all(1 <= n <= 8 for n in sizes) and len(set(sizes)) == len(sizes),
                field,
                "distinct lengths from 1 to 8",
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainedFeature(Feature):
    """A vector that something else computed for the id in `column`.

    Attributes:
        path: vectors [V, E]: a .npy file, or a Parquet file that has `vector_column` and
            `id_column`.
        ids: of a .npy file: a text file with the id of each row, one a line.
        id_column, vector_column: of a Parquet file.
        frozen: leave the vectors as they are; otherwise they are the initial rows of a table that
            is trained.
        projection: width of a dense layer put between the vector and the tower; 0 is none.
        missing: what to do when a user or item has no vector: "error", or "zeros" (and a flag
            beside a frozen vector).
        oov_rows: of a trained table: rows for ids without a vector.
        embedding_size: E; 0 takes what the file has.
    """

    path: str
    ids: str = ""
    id_column: str = "id"
    vector_column: str = "vector"
    frozen: bool = True
    projection: int = 0
    missing: str = "error"
    oov_rows: int = 8
    embedding_size: int = 0

    def __post_init__(self):
        super().__post_init__()
        self._at_least(0, "projection")
        self._at_least(1, "oov_rows")
        choose(dict.fromkeys(("error", "zeros")), self.missing, f"{self.where}.missing")
        npy, parquet = self.path.endswith(".npy"), self.path.endswith(".parquet")
        self._check(npy or parquet, "path", "a .npy or .parquet file")
        self._check(
            bool(self.ids) == npy,
            "ids",
            "the file with the id of each row" if npy else "empty for a .parquet file",
        )

    @property
    def has_table(self) -> bool:
        return not self.frozen

    @property
    def _least_width(self) -> int:
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class SentenceFeature(Feature):
    """Text as the vector that a frozen sentence encoder gives it; the extra "text" reads the model,
    without PyTorch.

    The vectors of all texts of the table are kept in the encoder and in the bundle, so that the
    model is needed once, and again for texts that are new.

    Attributes:
        model: a sentence-transformers model of the BERT or XLM-RoBERTa family: a folder, or its
            name on the Hugging Face Hub.
        cache: the folder where vectors are kept, by model and text, for other runs; environment
            variables and ~ are expanded.
        embedding_size: width of the dense layer put between the vector and the tower, all of it
            that is trained; 0 is none.
    """

    model: str = "paraphrase-multilingual-MiniLM-L12-v2"
    cache: str = "~/.cache/twotower/sentences"
    embedding_size: int = 64

    def __post_init__(self):
        super().__post_init__()
        self._check(bool(self.model.strip()), "model", "a folder or the name of a model")
        self._check(bool(self.cache.strip()), "cache", "a folder")

    @property
    def has_table(self) -> bool:
        return False


@dataclasses.dataclass(frozen=True, kw_only=True)
class TimestampFeature(Feature):
    """A time (UTC) as rows of a small table: its hour, its weekday, its age before the newest
    training row.

    Attributes:
        parts: which of them.
        unit: of a column of numbers: s, ms, us or ns since the epoch.
        age_buckets: the age in hours falls in bucket floor(log2(1 + age)), at most the last of
            these.
    """

    embedding_size: int = 8
    parts: tuple[str, ...] = ("hour", "weekday", "age")
    unit: str = "s"
    age_buckets: int = 20

    def __post_init__(self):
        super().__post_init__()
        self._at_least(1, "age_buckets")
        choose(UNITS_PER_SECOND, self.unit, f"{self.where}.unit")
        self._check(
            bool(self.parts) and len(set(self.parts)) == len(self.parts),
            "parts",
            "one or more different parts",
        )
        for part in self.parts:
            choose(dict.fromkeys(("hour", "weekday", "age")), part, f"{self.where}.parts")


@dataclasses.dataclass(frozen=True, kw_only=True)
class HistoryFeature(Feature):
    """The items of a user's strictly earlier interactions: a feature of the user tower, at most
    one.

    Requests bring it in `column`: item ids, or {"item_id": ..., "event": ..., "timestamp": ...},
    the latest last.

    Attributes:
        max_length: L, events kept: the latest ones.
        reads: the features of an item that are read at each event, from the tables of the item
            tower; the first is its id.
        gaps: buckets of the time since the event before, floor(log2(1 + seconds)); 0: not read.
        request_gap: read beside each event the time until the one that follows, in as many buckets,
            and beside the latest the time until the request. A user's vector then depends on when
            one asks: in training and evaluation at the time of the row to be predicted, of which
            nothing else is known; in serving at the "timestamp" of the row that is asked with, by
            default the newest time of the log. Only comparable with models that know when they are
            asked: most published figures of sequential recommenders are of models that do not.
        weights: event -> its weight in a bag, above 0; an event that is not named weighs 1.
        half_life: days in which the weight of an event in a bag falls by half; 0: never.
    """

    max_length: int = 50
    reads: tuple[str, ...] = ("item_id",)
    gaps: int = 0
    request_gap: bool = False
    weights: Mapping[str, float] = dataclasses.field(default_factory=dict)
    half_life: float = 0.0
    embedding_size: int = 0

    def __post_init__(self):
        super().__post_init__()
        above = all(isinstance(x, (int, float)) and 0 < x < math.inf for x in self.weights.values())
        self._check(self.side == "user", "side", "user: items have no history")
        self._check(
            self.embedding_size == 0,
            "embedding_size",
            "left out: vectors are rows of the item's own tables",
        )
        self._check(bool(self.reads), "reads", "one or more features of the item, its id first")
        self._check(above, "weights", "a mapping of events to numbers above 0")
        self._check(
            bool(self.gaps) or not self.request_gap, "gaps", "how many buckets request_gap has"
        )
        self._at_least(1, "max_length")
        self._at_least(0, "gaps", "half_life")

    @property
    def has_table(self) -> bool:
        return False

    @property
    def is_weighted(self) -> bool:
        """Whether events differ in weight."""
        return bool(self.weights or self.half_life)

    @property
    def reads_times(self) -> bool:
        """Whether the times of events are read."""
        return bool(self.gaps or self.half_life)


FEATURES: dict[str, type[Feature]] = {
    "string": StringFeature,
    "strings": StringsFeature,
    "int": IntFeature,
    "float": FloatFeature,
    "text": TextFeature,
    "pretrained": PretrainedFeature,
    "sentence": SentenceFeature,
    "timestamp": TimestampFeature,
    "history": HistoryFeature,
}
