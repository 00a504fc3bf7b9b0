"""Rankings by what items say of themselves: their words, and their categories."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.types as types

from twotower.core.arrays import Ragged
from twotower.evaluation.baselines.tuning import Choice, binary_matrix, sparse_array
from twotower.evaluation.evaluate import Scores
from twotower.evaluation.queries import Queries

_WORDS = re.compile(r"\w+")
_CATEGORY = re.compile(r"categor|genre|class|department|section", re.IGNORECASE)
# Greatest share of the items that the categories may be in number: beyond, they are rather names.
MAX_CATEGORIES = 0.2


def text_columns(items: pa.Table) -> list[str]:
    """Returns the columns of texts, or of lists of texts, besides the id."""
    return [
        field.name for field in items.schema if field.name != "item_id" and _is_text(field.type)
    ]


def _is_text(kind: pa.DataType) -> bool:
    # A list of genres or a dictionary-encoded column holds texts as well.
    if types.is_list(kind) or types.is_large_list(kind) or types.is_dictionary(kind):
        return _is_text(kind.value_type)
    return types.is_string(kind) or types.is_large_string(kind)


def word_vectors(items: pa.Table) -> Any:
    """Returns the words of each item, weighed by their rarity: a sparse array [N, W], rows of
    length 1.

    A word of n of the N items weighs log(N / n); a word that one item alone has tells nothing of
    another, and is left out. None where no column has words that two items share.

    Salton and Buckley, Term-weighting approaches in automatic text retrieval, 1988.

    Args:
        items: Table of the items.
    """
    words: dict[str, int] = {}
    rows = []
    columns = []
    for column in text_columns(items):
        for row, value in enumerate(items[column].to_pylist()):
            # Once a column: a word that a text repeats tells no more of rarity.
            for word in set(_WORDS.findall(_joined(value).lower())):
                rows.append(row)
                columns.append(words.setdefault(word, len(words)))
    if not words:
        return None
    # Distinct over columns too: a title may repeat its brand.
    lists = Ragged.from_pairs(np.array(rows), np.array(columns), num_rows=len(items)).distinct()
    counts = np.bincount(lists.values, minlength=len(words))
    is_shared = counts[lists.values] > 1
    lists = lists.filter(is_shared)
    weights = np.log(len(items) / counts[lists.values])
    lengths = np.sqrt(np.bincount(lists.rows, weights**2, minlength=len(items)))
    weights /= np.maximum(lengths[lists.rows], 1e-12)
    # Words that all items have weigh log(1) = 0.
    if not weights.any():
        return None
    return sparse_array(weights.astype(np.float32), lists.values, lists.offsets, len(words))


def _joined(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else " ".join(filter(None, value))


def content_scores(vectors: Any, queries: Queries) -> Scores:
    """Makes the cosines of every item with the last one that the user has seen; 0 of nobody's.

    Args:
        vectors: Sparse array [N, W] of rows of length 1, see `word_vectors`.
        queries: Queries to score.
    """
    # Turned once, not for each block of queries.
    columns = vectors.T.tocsr()

    def scores(block: slice) -> np.ndarray:
        seen = queries.seen_lists(block)
        found = np.zeros((len(seen), queries.num_items), np.float32)
        has_last = seen.lengths > 0
        last = seen.values[seen.offsets[1:][has_last] - 1]
        found[has_last] = (vectors[last] @ columns).toarray()
        return found

    return scores


def find_categories(items: pa.Table) -> tuple[str, Ragged] | None:
    """Finds the column of categories, and returns it with the categories of each item.

    It is the first whose name says so, or else the first text with few values.

    Args:
        items: Table of the items.

    Returns:
        Name of the column, and N lists of categories as numbers; None where no column will do.
    """
    names = text_columns(items)
    # False sorts before True: named columns come first, and the others keep their order.
    for name in sorted(names, key=lambda name: _CATEGORY.search(name) is None):
        values = items[name].to_pylist()
        codes: dict[str, int] = {}
        rows = []
        numbers = []
        for row, value in enumerate(values):
            listed = [value] if isinstance(value, str) else value or []
            for one in filter(None, listed):
                rows.append(row)
                numbers.append(codes.setdefault(one, len(codes)))
        # Two at least, or every item has the same one.
        if 2 <= len(codes) <= max(2, MAX_CATEGORIES * len(values)):
            pairs = (np.array(rows), np.array(numbers))
            return name, Ragged.from_pairs(*pairs, num_rows=len(values)).distinct()
    return None


def category_scores(categories: Ragged, order: np.ndarray, queries: Queries) -> Scores:
    """Makes scores by popularity within the categories of what the user has seen.

    The share of the user's items that are of an item's categories, times the item's number of
    training rows; behind these, and for users without items, by popularity alone.

    Args:
        categories: Categories of each item, N lists.
        order: Items by falling popularity, int [N].
        queries: Queries to score.
    """
    of_items = binary_matrix(categories, int(categories.values.max()) + 1)
    popularity = queries.counts.astype(np.float64)
    # No two items are equal: the rank decides between those of one score.
    behind = np.empty(len(order))
    behind[order] = np.linspace(1e-3, 0.0, len(order), endpoint=False)

    def scores(block: slice) -> np.ndarray:
        seen = queries.seen_lists(block)
        taken = binary_matrix(seen, queries.num_items) @ of_items
        totals = np.maximum(seen.lengths, 1)[:, None]
        shares = (taken @ of_items.T).toarray() / totals
        return (shares * popularity + behind).astype(np.float32)

    return scores


def describe_words(items: pa.Table) -> Choice:
    """Returns the columns whose words are read, as the setting of the baseline."""
    return Choice(f"words of {', '.join(text_columns(items))}")
