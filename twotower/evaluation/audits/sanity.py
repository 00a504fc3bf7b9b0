"""Sanity of a model on one's own data: what anybody who knows the items would expect of it.

Items with like titles lie closer together than items with unlike ones, and somebody whose events
are all of one category gets that category.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa

from twotower.core.arrays import evenly_spaced
from twotower.core.arrow import plain_text
from twotower.core.errors import choose
from twotower.evaluation.intervals import interval, resampled_means
from twotower.features.categorical import StringFeature, StringsFeature
from twotower.features.spec import FeatureSpec
from twotower.features.text import TextColumns
from twotower.retrieval.embed import embed_rows
from twotower.retrieval.retriever import Retriever
from twotower.training.run import Run

SAMPLE = 1_000  # items whose titles are compared
LIKE = 0.3  # words of two like titles that both have, of those that either has
COMMON = 0.2  # of the titles, those that a word may be in to count
EVENTS = 5  # events of a made-up user
CATEGORIES = 50  # categories that are tried, the largest first
SMALLEST = 10  # items of a category that is tried
K = 10  # length of the lists
EXAMPLES = 3


def check_sanity(
    run: Run, retriever: Retriever, *, title: str = "", category: str = "", seed: int = 0
) -> dict[str, Any]:
    """Measures whether titles and categories stand where they should.

    Args:
        run: A loaded run.
        retriever: Retriever of the run.
        title: Column of the items with their titles; empty for that of a text feature.
        category: Column of the items with their category; empty for that of a categorical feature.
        seed: Seed of the drawn pairs and events.

    Returns:
        "titles" and "categories", see `compare_titles` and `ask_categories`, as far as there are
        columns for them; and "cannot", sentences on what could not be asked.

    Raises:
        ConfigError: A column is none of the items.
    """
    items = run.prepared.items
    spec = run.prepared.encoder.spec
    columns = {"title": title, "category": category}
    # Before anything is embedded, which takes longer than a reader waits for a misspelt name.
    for name, column in columns.items():
        if column:
            choose(dict.fromkeys(items.column_names), column, f"--sanity_{name}")
    title = title or find_title(spec)
    category = category or find_category(spec, items)
    cannot = []
    found: dict[str, Any] = {}
    # Examples of categories show ids where there are no titles.
    texts = _texts(items, title or "item_id")
    if title:
        rows = evenly_spaced(np.arange(len(items)), SAMPLE)
        features = {name: values[rows] for name, values in run.prepared.features["item"].items()}
        vectors = embed_rows(run.model, run.weights, "item", features)
        found["titles"] = {"column": title}
        found["titles"] |= compare_titles(vectors, [texts[row] for row in rows], seed=seed)
    else:
        cannot.append(
            "Titles were not compared: no feature of the items is a text. Name a column of the "
            f"items by --sanity_title: {', '.join(items.column_names)}."
        )
    # Somebody made up has events and no id: without a history the tower has nothing to read.
    if category and spec.history is not None:
        found["categories"] = {"column": category, "events": EVENTS, "k": K}
        found["categories"] |= ask_categories(retriever, items, category, texts, seed=seed)
    elif category:
        cannot.append(
            "Nobody of one category was made up: the user tower reads no history "
            "(config.features.user)."
        )
    else:
        cannot.append(
            "Categories were not asked for: no feature of the items is one of few values. Name a "
            f"column of the items by --sanity_category: {', '.join(items.column_names)}."
        )
    return found | {"cannot": cannot}


def find_title(spec: FeatureSpec) -> str:
    """Returns the column of the first text feature of the items; empty where there is none."""
    for feature in spec.item.values():
        if isinstance(feature, TextColumns):
            return feature.columns_read[0]
    return ""


def find_category(spec: FeatureSpec, items: pa.Table) -> str:
    """Returns the column of a categorical feature whose values have many items each.

    It is one of the name "category", or else that of the fewest values; empty where there is none.
    """
    num_values: dict[str, int] = {}
    for feature in spec.item.values():
        # Several values of one item are no category of it.
        if not isinstance(feature, StringFeature) or isinstance(feature, StringsFeature):
            continue
        column = feature.columns_read[0]
        if column in items.column_names and column != "item_id":
            num_values[column] = len(set(_texts(items, column)))
    # A column of nearly as many values as items names them, and one of one value divides nothing.
    fitting = {name: n for name, n in num_values.items() if 1 < n <= len(items) / SMALLEST}
    if "category" in fitting:
        return "category"
    return min(fitting, key=fitting.__getitem__, default="")


def compare_titles(
    vectors: np.ndarray, titles: Sequence[str], *, seed: int = 0
) -> dict[str, float | int | list[Any]]:
    """Returns how often an item lies closer to one of a like title than to one of an unlike one.

    Args:
        vectors: Vectors of items, float [M, D].
        titles: Their titles.
        seed: Seed of the unlike items that are drawn.

    Returns:
        "auc", the share of the items, 1 where the order is right and a half where it says nothing;
        its "interval"; "pairs", the number of items that have a like one; and "examples", the title
        of an item, of the nearest one, and their cosine. Without pairs the last two alone.
    """
    words = [frozenset(title.lower().split()) for title in titles]
    lengths = np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-30)
    units = vectors / lengths
    # All pairs of a sample: for 1,000 items four megabytes.
    cosines = units @ units.T
    # An item is nearest to itself.
    np.fill_diagonal(cosines, -np.inf)
    shared = _share_of_words(words)
    np.fill_diagonal(shared, 0.0)
    like = shared.argmax(1)
    anchors = np.flatnonzero(shared.max(1) >= LIKE)
    generator = np.random.default_rng(seed)
    values = []
    for anchor in anchors:
        # No word in common at all; the diagonal was set to 0 and has to be taken out.
        unlike = np.flatnonzero(shared[anchor] == 0)
        unlike = unlike[unlike != anchor]
        if not len(unlike):
            continue
        other = cosines[anchor, generator.choice(unlike)]
        own = cosines[anchor, like[anchor]]
        # A tie counts half, as in the area under a ROC curve.
        values.append(float(own > other) + 0.5 * float(own == other))
    shown = generator.permutation(len(titles))[:EXAMPLES]
    examples = []
    for row in shown:
        nearest = int(cosines[row].argmax())
        examples.append([titles[row], titles[nearest], round(float(cosines[row, nearest]), 4)])
    found: dict[str, float | int | list[Any]] = {"pairs": len(values), "examples": examples}
    if values:
        of_items = np.array(values)[:, None]
        # Each item is a group of its own, which is drawn or not.
        low, high = interval(resampled_means(of_items, np.arange(len(values))))
        found["auc"] = float(np.mean(values))
        found["interval"] = [float(low[0]), float(high[0])]
    return found


def _share_of_words(words: Sequence[frozenset[str]]) -> np.ndarray:
    """Returns the words that both titles have, of those that either has: float [M, M]."""
    vocabulary = {word: number for number, word in enumerate(sorted(frozenset().union(*words)))}
    has_word = np.zeros((len(words), len(vocabulary)), np.float32)
    for row, title in enumerate(words):
        has_word[row, [vocabulary[word] for word in title]] = 1.0
    # Words of many titles, such as "edition", make none alike.
    has_word = has_word[:, has_word.mean(0) <= COMMON]
    both = has_word @ has_word.T
    lengths = has_word.sum(1)
    either = lengths[:, None] + lengths[None, :] - both
    return both / np.maximum(either, 1.0)


@runtime_checkable
class Recommender(Protocol):
    """What is asked for lists; `twotower.retrieval.retriever.Retriever` is one."""

    def recommend(self, *, events: Sequence[Any], k: int) -> Any:
        """Returns the best `k` items of somebody new with these events."""
        ...


def ask_categories(
    retriever: Recommender,
    items: pa.Table,
    column: str,
    titles: Sequence[str],
    *,
    seed: int = 0,
) -> dict[str, Any]:
    """Returns how much of the lists of made-up users is of the category of their events.

    A user is somebody new, with some events of one category.

    Args:
        retriever: Retriever of the run.
        items: Table of the corpus.
        column: Column with the category.
        titles: Title of each item, for the examples.
        seed: Seed of the events.

    Returns:
        "share" of the places of the lists; its "interval" over the categories; "chance", the share
        that the items of these categories have; "categories", their number; and "examples": the
        category, its share, and titles of the list.
    """
    # Of object: an array of NumPy's text pads each value to the longest.
    names = np.array(_texts(items, column), dtype=object)
    ids = items["item_id"].to_pylist()
    row_of_id = {item_id: row for row, item_id in enumerate(ids)}
    values, counts = np.unique(names.astype(str), return_counts=True)
    largest = np.argsort(-counts, kind="stable")[:CATEGORIES]
    # Without the empty text, which stands for no category.
    asked = [values[i] for i in largest if counts[i] >= SMALLEST and values[i]]
    generator = np.random.default_rng(seed)
    shares = []
    chances = []
    examples = []
    for value in asked:
        rows = np.flatnonzero(names == value)
        events = [ids[row] for row in generator.choice(rows, EVENTS, replace=False)]
        listed = retriever.recommend(events=events, k=K)
        # A live catalogue may list items that the run was not trained with.
        listed_rows = [row_of_id[item.item_id] for item in listed if item.item_id in row_of_id]
        share = float(np.mean(names[listed_rows] == value)) if listed_rows else 0.0
        shares.append(share)
        chances.append(len(rows) / len(ids))
        if len(examples) < EXAMPLES:
            examples.append([value, share, [titles[row] for row in listed_rows[:EXAMPLES]]])
    found: dict[str, Any] = {"categories": len(asked), "examples": examples}
    if asked:
        # By categories: lists of one category are alike, and would make the interval too narrow.
        of_categories = np.array(shares)[:, None]
        low, high = interval(resampled_means(of_categories, np.arange(len(asked))))
        found["share"] = float(np.mean(shares))
        found["interval"] = [float(low[0]), float(high[0])]
        found["chance"] = float(np.mean(chances))
    return found


def _texts(items: pa.Table, column: str) -> list[str]:
    values = plain_text(items[column]).to_pylist()
    return [str(value) if value is not None else "" for value in values]


def format_sanity(sanity: Mapping[str, Any]) -> str:
    """Returns the result of `check_sanity` as text, with its examples."""
    lines = ["Sanity, on what is known of the items:"]
    titles = sanity.get("titles", {})
    if "auc" in titles:
        low, high = titles["interval"]
        lines.append(
            f"  An item lies closer to one of a like {titles['column']} than to one of an unlike "
            f"one in {titles['auc']:.1%} of {titles['pairs']:,} pairs ({low:.1%} to {high:.1%}; "
            "50% is chance)."
        )
    elif titles:
        lines.append(f"  No two of the items that were looked at have a like {titles['column']}.")
    for one, other, cosine in titles.get("examples", []):
        lines.append(f"    {one} - nearest: {other} ({cosine:.2f})")
    categories = sanity.get("categories", {})
    if "share" in categories:
        low, high = categories["interval"]
        lines.append(
            f"  Somebody new with {EVENTS} events of one {categories['column']} gets it in "
            f"{categories['share']:.1%} of the places of a list of {K} ({low:.1%} to {high:.1%}; "
            f"{categories['chance']:.1%} is chance; {categories['categories']} were tried)."
        )
    elif categories:
        lines.append(f"  No {categories['column']} has {SMALLEST} items.")
    for name, share, listed in categories.get("examples", []):
        lines.append(f"    {name}: {share:.0%}, first {'; '.join(listed)}")
    return "\n".join([*lines, *(f"  {sentence}" for sentence in sanity["cannot"])])
