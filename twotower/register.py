"""Registration of parts of one's own: losses, towers, feature types, sources and re-rankers.

Each function takes a name for the configuration and the part, or decorates it. A part may have
options: a frozen dataclass, whose fields are set in the configuration and checked like the
library's own. Put the parts into a module and name it in `config.plugins`, so that every command
knows them; `experiments/examples/own_parts` has an example of each.

The classes that parts build upon are here too: `Tower`, `Feature` with `Fitted`, `Input` and
`TableShape`, `Tables` of a source, and `Candidates` of a re-ranker.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from twotower.core.kinds import Kinds
from twotower.data.sources.load import SOURCES, Source, Tables
from twotower.features.base import Feature, Fitted
from twotower.features.inputs import Input, TableShape
from twotower.features.spec import FEATURES
from twotower.kernels.loss_inputs import Loss
from twotower.objectives.losses import LOSSES
from twotower.retrieval.rerank import RERANKERS, Candidates, Reranker
from twotower.towers.tower import TOWERS, Tower

__all__ = [
    "Candidates",
    "Feature",
    "Fitted",
    "Input",
    "Loss",
    "TableShape",
    "Tables",
    "Tower",
    "feature",
    "loss",
    "reranker",
    "source",
    "tower",
]


def loss(
    name: str,
    function: Callable[..., Any] | None = None,
    *,
    options: type | None = None,
    needs: tuple[str, ...] = (),
    corrects: bool = False,
    corrects_positive: bool = False,
    scaled: bool = True,
    biased: bool = False,
) -> Any:
    """Registers a retrieval loss, which `config.objective.loss` may then name.

    The function takes the logits of each query's positive and of its negatives, and returns a loss
    for each query: 0, with a zero gradient, for a query without any negative. Its options are set
    as `config.objective.options`.

    >>> import dataclasses
    >>> import jax.numpy as jnp
    >>> @dataclasses.dataclass(frozen=True, kw_only=True)
    ... class PolyOptions:
    ...     epsilon: float = 1.0
    >>> @tt.register.loss("poly", options=PolyOptions)
    ... def poly(positive, negatives, *, where, options):
    ...     '''The softmax loss plus epsilon (1 - p), with p the probability of the positive.'''
    ...     softmax = tt.losses.softmax(positive, negatives, where=where)
    ...     return softmax + options.epsilon * (1.0 - jnp.exp(-softmax))
    >>> "poly" in tt.losses.LOSSES
    True

    Args:
        name: Name in the configuration.
        function: (positive [B], negatives [B, C], *, where [B, C]) -> [B]; with `options` as
            a keyword too where it has some, and each of `needs`. None to decorate it.
        options: Frozen dataclass of its options.
        needs: Further keywords of the function: names of options of the objective, such as
            "margin", or "num_items", the number of items that a negative may be.
        corrects: Whether log expected counts are taken off the negatives' logits.
        corrects_positive: Whether they are taken off the positive's too.
        scaled: Whether scores are divided by the temperature.
        biased: Whether a learnable bias is added to every logit.

    Returns:
        The function; without one, a decorator.

    Raises:
        ConfigError: The name is taken, or the options are no frozen dataclass.
    """

    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        # A loss is called with its constants as keywords, of which its options are one.
        constants = needs
        if options is not None:
            constants = (*needs, "options")
        kind = Loss(
            function,
            corrects=corrects,
            corrects_positive=corrects_positive,
            scaled=scaled,
            biased=biased,
            constants=constants,
        )
        LOSSES.register(name, kind, options=options)
        # The function itself, so that it can still be called and tested as it is.
        return function

    return _apply(add, function)


def tower(name: str, cls: type[Tower] | None = None, *, options: type | None = None) -> Any:
    """Registers a kind of tower, which `config.model.user.kind` and `.item.kind` may then name.

    It is a subclass of `tt.register.Tower`, a Flax module. Its options are set as
    `config.model.user.options` and `.item.options`, and are its attribute `options`.

    >>> import flax.linen as nn
    >>> @tt.register.tower("linear")
    ... class LinearTower(tt.register.Tower):
    ...     @nn.compact
    ...     def __call__(self, features, *, history=None, keys=None, axis=None):
    ...         x = self.combine(features, history, keys)
    ...         return nn.Dense(self.config.layers[-1])(x)

    Args:
        name: Name in the configuration.
        cls: Class of the tower. None to decorate it.
        options: Frozen dataclass of its options.

    Returns:
        The class; without one, a decorator.

    Raises:
        ConfigError: The name is taken, or the options are no frozen dataclass.
    """
    return _register(TOWERS, name, cls, options)


def feature(name: str, cls: type[Feature] | None = None) -> Any:
    """Registers a kind of feature, which the "type" of a feature may then name.

    It is a frozen dataclass that extends `tt.register.Feature`. Its own fields are its options, set
    in the specification beside the type.

    >>> import dataclasses
    >>> import numpy as np
    >>> @tt.register.feature("is_known")
    ... @dataclasses.dataclass(frozen=True, kw_only=True)
    ... class IsKnown(tt.register.Feature):
    ...     '''Two rows of a table: of missing values, and of all others.'''
    ...     def encode(self, fitted, column):
    ...         return column.is_valid().to_numpy().astype(np.int32)
    ...     def input(self, fitted):
    ...         return tt.register.Input(table=self.table)
    ...     def table_shape(self, fitted):
    ...         return tt.register.TableShape(rows=2, width=self.embedding_size)

    Args:
        name: Name of the type in a specification.
        cls: Class of the feature. None to decorate it.

    Returns:
        The class; without one, a decorator.

    Raises:
        ConfigError: The name is taken.
    """
    return _register(FEATURES, name, cls, None)


def source(name: str, function: Source | None = None, *, options: type | None = None) -> Any:
    """Registers a source of data, which `config.data.source` may then name.

    The function takes `config.data` and returns the log: a table of interactions, or
    `tt.register.Tables` of interactions, users and items, as Arrow tables or as frames of pandas or
    polars. Ids, times and numbers are read as those of files are. Its options are set as
    `config.data.options`.

    >>> import pyarrow as pa
    >>> @tt.register.source("two_rows")
    ... def read_two_rows(config):
    ...     return pa.table({"user_id": [1, 2], "item_id": [7, 7]})

    Args:
        name: Name in the configuration.
        function: (config.data) -> the log; with `options` as a keyword too where it has some. None
            to decorate it.
        options: Frozen dataclass of its options.

    Returns:
        The function; without one, a decorator.

    Raises:
        ConfigError: The name is taken, or the options are no frozen dataclass.
    """
    return _register(SOURCES, name, function, options)


def reranker(name: str, function: Reranker | None = None, *, options: type | None = None) -> Any:
    """Registers a re-ranker, which `config.retrieval.rerank.kind` may then name.

    The function chooses K of the candidates of one user. Its options are set as
    `config.retrieval.rerank.options`.

    >>> import numpy as np
    >>> @tt.register.reranker("reverse")
    ... def reverse(candidates, k):
    ...     return np.argsort(candidates.scores)[:k]

    Args:
        name: Name in the configuration.
        function: (candidates, k) -> positions of the chosen candidates, best first; with `options`
            as a keyword too where it has some. None to decorate it.
        options: Frozen dataclass of its options.

    Returns:
        The function; without one, a decorator.

    Raises:
        ConfigError: The name is taken, or the options are no frozen dataclass.
    """
    return _register(RERANKERS, name, function, options)


def _register(kinds: Kinds[Any], name: str, part: Any, options: type | None) -> Any:
    def add(part: Any) -> Any:
        # The registry refuses names that are taken, and notes which plugin is being imported.
        kinds.register(name, part, options=options)
        return part

    return _apply(add, part)


def _apply(add: Callable[[Any], Any], part: Any) -> Any:
    """Registers a part, or returns the decorator that does."""
    # Used as @tt.register.loss("name"), the part comes with the next call.
    if part is None:
        return add
    return add(part)
