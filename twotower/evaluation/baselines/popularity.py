"""Rankings that are alike for every query: by popularity, of all items or of the most popular ones
shuffled, and at random."""

from __future__ import annotations

import numpy as np

from twotower.evaluation.evaluate import Scores
from twotower.pipeline.batches import InteractionRows

TOP_SHARE = 0.1  # share of the items that count as popular, the "top quantile"


def popularity_order(
    train: InteractionRows, num_items: int, *, among: np.ndarray | None = None, seed: int = 0
) -> np.ndarray:
    """Returns the items by falling number of training rows, int64 [N].

    Of items with as many rows the one that was used last comes first, then chance decides. No two
    items are equal, so that the rule that puts relevant items behind their equals does not touch
    this ranking.

    Args:
        train: Training rows.
        num_items: Number of items in the corpus, N.
        among: Rows to count, bool [rows]; None counts all.
        seed: Seed of the order of equals.
    """
    counted_items = train.item
    if among is not None:
        counted_items = counted_items[among]
    # A row outside of the corpus has item -1.
    counts = np.bincount(counted_items[counted_items >= 0], minlength=num_items)
    times = train.timestamp
    if times is None:
        # Without times the order of the log decides.
        times = np.arange(len(train))
    latest = np.full(num_items, np.iinfo(np.int64).min)
    in_corpus = train.item >= 0
    np.maximum.at(latest, train.item[in_corpus], times[in_corpus])
    shuffled = np.random.default_rng(seed).permutation(num_items)
    # The last key is the first to sort by. The least int64 has no negative, hence float64.
    return np.lexsort((shuffled, -latest.astype(np.float64), -counts))


def order_scores(order: np.ndarray) -> Scores:
    """Makes scores that rank the items in `order` for every query."""
    ranks = np.empty(len(order), np.float32)
    # Whole numbers are distinct in float32 up to 2**24 either side of 0.
    ranks[order] = len(order) // 2 - np.arange(len(order))

    def scores(block: slice) -> np.ndarray:
        return np.broadcast_to(ranks, (block.stop - block.start, len(order)))

    return scores


def random_scores(num_items: int, *, seed: int = 0) -> Scores:
    """Makes scores in [0, 1), drawn for each query by its number alone."""

    def draw(query: int) -> np.ndarray:
        # A generator for each query, so that the size of a block does not change what is drawn.
        generator = np.random.Generator(np.random.Philox(key=(seed, query)))
        return generator.random(num_items, dtype=np.float32)

    return lambda block: np.stack([draw(query) for query in range(block.start, block.stop)])


def top_quantile_scores(order: np.ndarray, *, share: float = TOP_SHARE, seed: int = 0) -> Scores:
    """Makes scores that put the first `share` of `order`, shuffled for each query, before all other
    items."""
    num_top = max(1, round(share * len(order)))
    # Random scores are below 1, so that 1 more puts an item before all others.
    bonus = np.zeros((1, len(order)), np.float32)
    bonus[0, order[:num_top]] = 1.0
    draw = random_scores(len(order), seed=seed)
    return lambda block: draw(block) + bonus
