"""One of each part that a user can add: a loss, a tower, a feature type, a source, a re-ranker.

`experiment.py` beside it names this file in `config.plugins` and sets the options of each part.
"""

import dataclasses
import sqlite3

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pyarrow as pa

import twotower as tt


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolyOptions:
    """The options of the loss.

    Attributes:
        epsilon: Weight of the term that is added to the softmax loss.
    """

    epsilon: float = 1.0


@tt.register.loss("poly", options=PolyOptions, corrects=True, corrects_positive=True)
def poly(positive, negatives, *, where, options):
    """Returns the softmax loss plus epsilon (1 - p), with p the probability of the positive.

    Leng et al., PolyLoss, ICLR 2022, arXiv 2204.12511. A query without negatives has a softmax loss
    of 0, and so p = 1 and no loss here either.

    Args:
        positive: Logits of the positives, [B].
        negatives: Logits of the negatives, [B, C].
        where: Negatives that count, [B, C].
        options: Options of the loss.
    """
    softmax = tt.losses.softmax(positive, negatives, where=where)
    return softmax + options.epsilon * (1.0 - jnp.exp(-softmax))


@dataclasses.dataclass(frozen=True, kw_only=True)
class CrossOptions:
    """The options of the tower.

    Attributes:
        depth: Number of cross layers.
    """

    depth: int = 2

    def __post_init__(self):
        if self.depth < 1:
            raise ValueError(f"depth={self.depth} must be at least 1.")


@tt.register.tower("cross", options=CrossOptions)
class CrossTower(tt.register.Tower):
    """A tower of cross layers, x' = x_0 * (W x + b) + x, and a projection to the last width.

    Wang et al., DCN V2, WWW 2021, arXiv 2008.13535.
    """

    @nn.compact
    def __call__(self, features, *, history=None, keys=None, axis=None):
        """Returns the vector of each row; see `Tower`."""
        first = self.combine(features, history, keys)
        x = first
        for layer in range(self.options.depth):
            x = first * nn.Dense(first.shape[-1], name=f"cross_{layer}")(x) + x
        return nn.Dense(self.config.layers[-1], name="project")(x)


@tt.register.feature("num_words")
@dataclasses.dataclass(frozen=True, kw_only=True)
class NumWords(tt.register.Feature):
    """The number of words of a text, as a row of a table.

    Attributes:
        longest: Number of words that longer texts count as.
    """

    embedding_size: int = 4
    longest: int = 10

    def encode(self, fitted, column):
        """Returns the number of words of each text, int32 [N]; 0 of a missing one."""
        texts = column.to_pylist()
        counts = [len(str(text).split()) if text is not None else 0 for text in texts]
        return np.minimum(counts, self.longest).astype(np.int32)

    def input(self, fitted):
        return tt.register.Input(table=self.table)

    def table_shape(self, fitted):
        return tt.register.TableShape(rows=self.longest + 1, width=self.embedding_size)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SqliteOptions:
    """The options of the source.

    Attributes:
        interactions: Query of the log, with the columns user_id, item_id and timestamp.
        items: Query of the items, with the column item_id.
    """

    interactions: str
    items: str


@tt.register.source("sqlite", options=SqliteOptions)
def read_sqlite(config, *, options):
    """Returns the log and the items of the SQLite database at `config.data.path`."""
    # Opened for reading: a misspelt path must not become a new, empty database.
    database = sqlite3.connect(f"file:{config.path}?mode=ro", uri=True)
    try:
        interactions = _query(database, options.interactions)
        items = _query(database, options.items)
    finally:
        database.close()
    return tt.register.Tables(interactions, items=items)


def _query(database, sql):
    cursor = database.execute(sql)
    names = [description[0] for description in cursor.description]
    return pa.Table.from_pylist([dict(zip(names, row)) for row in cursor])


@dataclasses.dataclass(frozen=True, kw_only=True)
class BoostOptions:
    """The options of the re-ranker.

    Attributes:
        column: Display column of the items.
        value: Value of the items that are lifted.
        weight: Number that is added to their scores.
    """

    column: str
    value: str
    weight: float = 0.1


@tt.register.reranker("boost", options=BoostOptions)
def boost(candidates, k, *, options):
    """Returns the best `k` positions after the items with a value were lifted."""
    is_lifted = np.array([value == options.value for value in candidates.column(options.column)])
    scores = candidates.scores + options.weight * is_lifted
    return np.argsort(-scores, kind="stable")[:k]
