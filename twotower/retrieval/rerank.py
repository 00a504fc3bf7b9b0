"""Re-ranked lists, chosen from more candidates of a retrieval than are shown.

`config.retrieval.rerank` names one of `RERANKERS` for all lists of a bundle, and the argument
`rerank` of `Retriever.recommend` one for a single list; a user's module may add its own. The two
functions at the end also work on lists of any origin:

    >>> candidates = tt.load_retriever("runs/mine").recommend("user-1", k=10)
    >>> labels = [item.item_id[-1] for item in candidates]
    >>> len([candidates[i] for i in cap_per_label(labels, 3, max_items=1)])
    3
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from twotower.config import RerankConfig
from twotower.core.errors import ConfigError
from twotower.core.fields import FieldChecks, build
from twotower.core.kinds import Kinds

if TYPE_CHECKING:  # its own import takes longer than many an answer
    from jaxtyping import Float, Int

FIELD = "config.retrieval.rerank"
MAX_NEAR = 512  # candidates that each chosen item is compared with before all of them are
MAX_NEW = 32  # items that are chosen before all candidates are compared with them
# The choice of a caller: text as `parse_rerank` reads it, the fields of `RerankConfig`, or that
# itself. None is what the configuration of the bundle says, and "" none at all.
RerankLike = RerankConfig | Mapping[str, Any] | str | None


@dataclasses.dataclass(frozen=True, eq=False)
class Candidates:
    """The candidates of one user, best first.

    Attributes:
        scores: Scores float32 [M]: dot products of the vectors, with what popularity adds.
        vectors: Vectors of the items, float32 [M, D].
        read_rows: Function that reads `rows`.
        user: Id of the user; None where it is not known, as of lists that many users get at once.
    """

    scores: np.ndarray
    vectors: np.ndarray
    read_rows: Callable[[], list[dict[str, Any]]]
    user: str | None = None

    @functools.cached_property
    def rows(self) -> list[dict[str, Any]]:
        """The item_id and the display columns of each candidate."""
        # Read when they are first used: some kinds look at the vectors alone.
        return self.read_rows()

    def column(self, name: str) -> list[Any]:
        """Returns a display column of the candidates.

        Raises:
            ConfigError: There is no such column; the message names the nearest.
        """
        # Without candidates there is nothing to check the name by.
        known = list(self.rows[0]) if self.rows else [name]
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"; did you mean {nearest[0]!r}?" if nearest else "."
            raise ConfigError(
                f"{FIELD}.options.column={name!r} is no display column of the items{hint} They "
                f"have: {', '.join(known)}."
            )
        return [row[name] for row in self.rows]


@runtime_checkable
class Reranker(Protocol):
    """A choice of K candidates of one user: positions among them, best first.

    Where it was registered with options, it is called with them as `options`.
    """

    def __call__(self, candidates: Candidates, k: int) -> Int[np.ndarray, " K"]: ...


@dataclasses.dataclass(frozen=True)
class Reranking:
    """A re-ranker with its options.

    Attributes:
        config: The options.
        choose: Function from the candidates of a user to the positions of K of them.
    """

    config: RerankConfig
    choose: Callable[[Candidates, int], np.ndarray]

    def __call__(self, candidates: Candidates, k: int) -> np.ndarray:
        """Returns the positions of up to `k` candidates, int64.

        Raises:
            ConfigError: The re-ranker returned something else.
        """
        # Looked at, since it may be a user's own function, and what it returns becomes an answer.
        chosen = np.asarray(self.choose(candidates, k), np.int64)
        count = len(candidates.scores)
        in_range = len(chosen) <= k and bool(np.all((chosen >= 0) & (chosen < count)))
        if not in_range or len(np.unique(chosen)) < len(chosen):
            raise ConfigError(
                f"{FIELD}.kind={self.config.kind!r} chose {chosen.tolist()}: a re-ranker returns "
                f"at most {k} different positions below {count}, the number of candidates."
            )
        return chosen


def resolve_rerank(rerank: RerankLike, default: RerankConfig) -> Reranking | None:
    """Returns the re-ranker of a choice; None where lists stay as they are.

    Args:
        rerank: Choice of a caller.
        default: Choice of the configuration.

    Raises:
        ConfigError: The kind or an option is not known, or an option is out of range.
    """
    # None asks for the configured one, "" for none.
    config = default
    if rerank is not None:
        config = as_config(rerank)
    if not config.kind:
        return None
    choose: Callable[..., np.ndarray] = RERANKERS.choose(config.kind, f"{FIELD}.kind")
    options = RERANKERS.build_options(config.kind, config.options, f"{FIELD}.options")
    if options is not None:
        choose = functools.partial(choose, options=options)
    return Reranking(config, choose)


def as_config(rerank: RerankConfig | Mapping[str, Any] | str) -> RerankConfig:
    """Returns a choice of a caller as the section of the configuration.

    Raises:
        ConfigError: A field is unknown, or its value cannot be read.
    """
    if isinstance(rerank, RerankConfig):
        return rerank
    if isinstance(rerank, str):
        return parse_rerank(rerank)
    return build(RerankConfig, rerank, FIELD)


def parse_rerank(text: str) -> RerankConfig:
    """Returns the re-ranking that a text names: a kind, and its options after a colon.

    >>> parse_rerank("caps:column=category,max_items=2,multiple=10").options
    {'column': 'category', 'max_items': 2}

    Args:
        text: Such as "mmr" or "mmr:diversity=0.5"; empty for none. `multiple` is the option of
            `config.retrieval.rerank` itself.

    Raises:
        ConfigError: An option has no value.
    """
    kind, _, rest = text.partition(":")
    options: dict[str, Any] = {}
    for part in filter(None, rest.split(",")):
        name, equals, value = part.partition("=")
        if not equals:
            raise ConfigError(
                f"{FIELD}={text!r}: {part!r} must be an option with its value, as in "
                "'mmr:diversity=0.5'."
            )
        options[name.strip()] = _parse_value(value.strip())
    fields = {"kind": kind.strip(), "options": options}
    # A field beside the options, which one text has no other place for.
    if "multiple" in options:
        fields["multiple"] = options.pop("multiple")
    return build(RerankConfig, fields, FIELD)


def _parse_value(text: str) -> Any:
    try:
        # Numbers, true and false; whatever else is text without quotes.
        return json.loads(text)
    except ValueError:
        return text


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiversityOptions:
    """The options of the kind mmr.

    Attributes:
        diversity: Weight of an item's likeness to those above it, from 0 (the order of the scores)
            to 1.
    """

    diversity: float = 0.3

    def __post_init__(self):
        FieldChecks(self, f"{FIELD}.options").between(0.0, 1.0, "diversity")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CapsOptions:
    """The options of the kind caps.

    Attributes:
        column: Display column of the items, such as a category or a brand.
        max_items: Greatest number of items of a list with one value in that column.
    """

    column: str
    max_items: int = 2

    def __post_init__(self):
        FieldChecks(self, f"{FIELD}.options").at_least(1, "max_items")


def _rerank_by_diversity(
    candidates: Candidates, k: int, *, options: DiversityOptions
) -> Int[np.ndarray, " K"]:
    # Dot products of vectors of any length are brought to the scale of cosines.
    largest = float(np.abs(candidates.scores).max(initial=1.0))
    return maximal_marginal_relevance(
        candidates.scores / largest, candidates.vectors, k, diversity=options.diversity
    )


def _rerank_by_caps(
    candidates: Candidates, k: int, *, options: CapsOptions
) -> Int[np.ndarray, " K"]:
    labels = [_hashable(value) for value in candidates.column(options.column)]
    return cap_per_label(labels, k, max_items=options.max_items)


def _hashable(value: Any) -> Any:
    # A list of tags is one label: that of the whole list.
    if isinstance(value, list):
        return tuple(value)
    return value


def maximal_marginal_relevance(
    scores: Float[np.ndarray, " M"], vectors: Float[np.ndarray, "M D"], k: int, *, diversity: float
) -> Int[np.ndarray, " K"]:
    """Chooses `k` items one by one, each by its score less its likeness to those chosen before.

    The next item maximises (1 - diversity) score - diversity max cosine to the chosen (Carbonell
    and Goldstein 1998).

    Args:
        scores: Scores of the candidates, on the scale of cosines (as they are of a model that
            normalises).
        vectors: Vectors of the same items.
        k: Number of items to choose; fewer where there are fewer candidates.
        diversity: From 0, the order of the scores, to 1, which looks at the scores for the first
            item alone.

    Returns:
        Positions of the chosen items among the candidates.

    >>> vectors = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    >>> maximal_marginal_relevance(np.array([0.9, 0.8, 0.5]), vectors, 2, diversity=0.5).tolist()
    [0, 2]
    """
    if not 0 <= diversity <= 1:
        raise ValueError(f"diversity={diversity} must be between 0 and 1.")
    # Cosines, so that one scale of `diversity` serves vectors of any length.
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    units = vectors / np.maximum(lengths, 1e-30)
    if not len(scores):
        return np.zeros(0, np.int64)
    # The first item is like nothing chosen.
    chosen = [int(np.argmax(scores))]
    # Of each candidate, to the chosen items so far.
    max_cosine = (units @ units[chosen[0]]).astype(np.float64)
    rated = (1 - diversity) * scores
    count = min(k, len(scores))
    # Greedy: the best set of k items would have to be sought among all sets.
    while len(chosen) < count:
        worth = rated - diversity * max_cosine
        worth[chosen] = -np.inf
        new = _most_worth(worth, rated, max_cosine, units, count - len(chosen), diversity)
        chosen += new
        if len(chosen) < count:
            # One product for all of them, [chosen, M]: NumPy takes the greatest of each column by
            # vector instructions, a hundred times as fast as that of each row of [M, chosen].
            np.maximum(max_cosine, (units[new] @ units.T).max(axis=0), out=max_cosine)
    return np.array(chosen, np.int64)


def _most_worth(
    worth: np.ndarray,
    rated: np.ndarray,
    max_cosine: np.ndarray,
    units: np.ndarray,
    count: int,
    diversity: float,
) -> list[int]:
    """Returns the next items of `maximal_marginal_relevance`, one or more.

    What an item is worth only falls as others are chosen. So the next ones are sought among the
    candidates that are worth most now, for as long as one of these is worth more than any other
    was: a few hundred are compared with each chosen item, and not all.

    Args:
        worth: Worth of each candidate now, float64 [M]; -inf of the chosen ones.
        rated: Part of it that the scores have, [M].
        max_cosine: Greatest cosine of each to the chosen ones, float64 [M].
        units: Vectors of length 1, [M, D].
        count: Greatest number of items.
        diversity: See `maximal_marginal_relevance`.
    """
    near = np.arange(len(worth))
    bound = -np.inf
    if len(worth) > MAX_NEAR:
        order = np.argpartition(-worth, MAX_NEAR)
        bound = float(worth[order[MAX_NEAR]])
        # Rising: of equal worth the first is chosen.
        near = np.sort(order[:MAX_NEAR])
        count = min(count, MAX_NEW)
    worth = worth[near]
    # Of those that were chosen nothing is left, whatever they are like.
    rated = np.where(worth > -np.inf, rated[near], -np.inf)
    max_cosine = max_cosine[near]
    near_units = units[near]
    taken: list[int] = []
    while len(taken) < count:
        best = int(np.argmax(worth))
        # The first is the best of all.
        if taken and worth[best] <= bound:
            break
        taken.append(best)
        rated[best] = -np.inf
        np.maximum(max_cosine, near_units @ near_units[best], out=max_cosine)
        worth = rated - diversity * max_cosine
    return near[taken].tolist()


def cap_per_label(
    labels: Sequence[Hashable], k: int, *, max_items: int | Mapping[Hashable, int]
) -> Int[np.ndarray, " K"]:
    """Chooses the first `k` items such that no label comes more often than allowed.

    Args:
        labels: Label of each candidate, best first: its category, brand or seller. An item without
            one (None) may always come.
        k: Number of items to choose.
        max_items: Largest number of items of a label; or a mapping from labels to such numbers, in
            which a missing label has no bound.

    Returns:
        Positions of the chosen items among the candidates.

    >>> cap_per_label(["a", "a", "b", "a", "b"], 3, max_items=1).tolist()
    [0, 2]
    """
    counts: dict[Hashable, int] = {}
    chosen: list[int] = []
    for position, label in enumerate(labels):
        if len(chosen) == k:
            break
        if isinstance(max_items, Mapping):
            bound = max_items.get(label)
        else:
            bound = max_items
        count = counts.get(label, 0)
        if label is not None and bound is not None and count >= bound:
            continue
        counts[label] = count + 1
        chosen.append(position)
    return np.array(chosen, np.int64)


# A user's module may add its own.
RERANKERS: Kinds[Callable[..., np.ndarray]] = Kinds(
    "re-ranker",
    {"mmr": _rerank_by_diversity, "caps": _rerank_by_caps},
    options={"mmr": DiversityOptions, "caps": CapsOptions},
    synonyms={
        "diversity": "mmr",
        "diverse": "mmr",
        "maximal_marginal_relevance": "mmr",
        "dpp": "mmr",
        "cap": "caps",
        "category": "caps",
        "quota": "caps",
        "max_per_category": "caps",
    },
)

# Those whose choice of fewer items is the beginning of their choice of more.
GREEDY = (_rerank_by_diversity, _rerank_by_caps)
