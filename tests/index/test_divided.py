"""An index in shards against one index over all items."""

import numpy as np
import pytest

from twotower.config import RetrievalConfig
from twotower.core.arrays import Ragged
from twotower.index.build import build_index
from twotower.index.exact import ExactIndex
from twotower.index.recall import list_recall
from twotower.index.shards.divided import DividedIndex, merge_lists


def divide(vectors, shards, make=ExactIndex, seed=0):
    part = np.random.default_rng(seed).integers(0, shards, len(vectors))
    rows = [np.flatnonzero(part == number) for number in range(shards)]
    return DividedIndex([make(vectors[own]) for own in rows], rows)


@pytest.mark.parametrize(
    ("items", "width", "shards", "queries"), [(7, 3, 2, 1), (333, 65, 2, 5), (1_000, 16, 3, 1)]
)
def test_exact_shards_are_one_exact_index_to_the_bit(items, width, shards, queries):
    rng = np.random.default_rng(items)
    vectors = rng.normal(size=(items, width)).astype(np.float32)
    # Items of equal scores, in several shards: the lower row comes first.
    vectors[items // 2 :] = vectors[: items - items // 2]
    users = rng.normal(size=(queries, width)).astype(np.float32)
    exclude = Ragged.from_pairs(
        rng.integers(0, queries, 40), rng.integers(0, items, 40), num_rows=queries
    )
    whole = ExactIndex(vectors)
    divided = divide(vectors, shards)
    expected = whole.search(users, 20, exclude=exclude)
    found = divided.search(users, 20, exclude=exclude)
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_array_equal(found[1], expected[1])


def test_an_empty_shard_and_one_without_enough_items():
    vectors = np.eye(4, dtype=np.float32)
    rows = [np.arange(4), np.zeros(0, np.int64), np.zeros(0, np.int64)]
    divided = DividedIndex([ExactIndex(vectors[own]) for own in rows], rows)
    scores, found = divided.search(np.array([[0.1, 0.4, 0.2, 0.3]]), 3)
    assert found.tolist() == [[1, 3, 2]] and divided.kind == "exact"
    np.testing.assert_allclose(scores, [[0.4, 0.3, 0.2]])


def test_what_a_shard_did_not_find_ends_the_merged_list():
    first = np.array([[3.0, -np.inf]]), np.array([[8, -1]])
    second = np.array([[3.0, 2.0]]), np.array([[5, 1]])
    scores, rows = merge_lists(4, [first, second])
    assert rows.tolist() == [[5, 8, 1, -1]] and scores.tolist() == [[3, 3, 2, -np.inf]]


def test_tuned_shards_find_as_much_as_one_tuned_index():
    pytest.importorskip("scann")
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(40, 16))
    vectors = (centres[rng.integers(0, 40, 4_000)] + 0.3 * rng.normal(size=(4_000, 16))).astype(
        np.float32
    )
    users = (centres[rng.integers(0, 40, 400)] + 0.3 * rng.normal(size=(400, 16))).astype(
        np.float32
    )
    config = RetrievalConfig(index="scann_tree", target_recall=0.9, k=20)
    make = lambda part: build_index(part, config, normalized=False, queries=users[:200])  # noqa: E731
    divided = divide(vectors, 3, make)
    _, truth = ExactIndex(vectors).search(users[200:], 20)
    assert {part.kind for part in divided.parts} == {"scann_tree"}
    recalls = []
    for index in (make(vectors), divided):
        recalls.append(list_recall(index.search(users[200:], 20)[1], truth))
    assert recalls[1] >= max(0.9, recalls[0] - 0.01), recalls
