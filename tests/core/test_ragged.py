"""Ragged lists against lists of lists."""

import numpy as np
import pytest

from twotower.core import arrays
from twotower.core.arrays import Ragged, pair_keys


@pytest.fixture
def lists():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 6, size=n).tolist() for n in (3, 0, 7, 1, 0)]


@pytest.fixture
def ragged(lists):
    pairs = [(row, value) for row, values in enumerate(lists) for value in values]
    # Rows interleaved, each keeping its own order: from_pairs must be stable.
    pairs = sorted(enumerate(pairs), key=lambda p: (p[0] % 3, p[0]))
    regrouped = [[v for _, (r, v) in pairs if r == row] for row in range(len(lists))]
    lists[:] = regrouped
    rows, values = zip(*[pair for _, pair in pairs])
    return Ragged.from_pairs(np.array(rows), np.array(values), num_rows=len(lists))


def as_lists(ragged):
    return [row.tolist() for row in ragged]


def test_from_pairs_groups_and_keeps_order(ragged, lists):
    assert as_lists(ragged) == lists


def test_take_repeats_reorders_and_gives_nothing_for_minus_one(ragged, lists):
    rows = [2, 2, -1, 0, 4]
    assert as_lists(ragged.take(np.array(rows))) == [lists[r] if r >= 0 else [] for r in rows]


@pytest.mark.parametrize("keep", ["first", "last"])
@pytest.mark.parametrize("block", [1, 4, 2**22])
def test_distinct_keeps_one_of_each(ragged, lists, keep, block, monkeypatch):
    monkeypatch.setattr(arrays, "_BLOCK", block)

    def oracle(values):
        if keep == "first":
            return list(dict.fromkeys(values))
        return list(dict.fromkeys(values[::-1]))[::-1]

    assert as_lists(ragged.distinct(keep=keep)) == [oracle(values) for values in lists]


def test_filter_keeps_as_many_lists(ragged, lists):
    expected = [[value for value in values if value > 2] for values in lists]
    assert as_lists(ragged.filter(ragged.values > 2)) == expected


def test_join_puts_the_other_list_behind(ragged, lists):
    other = ragged.take(np.array([2, 1, 0, -1, 4]))
    expected = [a + b for a, b in zip(lists, [lists[2], lists[1], lists[0], [], lists[4]])]
    assert as_lists(ragged.join(other)) == expected


def test_pair_keys_sort_as_pairs_do():
    pairs = [(0, 0), (0, 5), (1, 0), (1, 2**31 - 1), (2**31 - 1, 3)]
    rows, values = np.array(pairs).T
    assert pair_keys(rows, values).tolist() == sorted(set(pair_keys(rows, values).tolist()))


def test_contains_equals_in(ragged, lists):
    values = np.arange(-1, 7)[None].repeat(5, axis=0)
    expected = [[value in row for value in range(-1, 7)] for row in lists]
    assert ragged.contains(np.arange(5)[:, None], values).tolist() == expected


def test_a_row_out_of_range_is_refused():
    with pytest.raises(ValueError, match=r"\[0, 2\)"):
        Ragged.from_pairs(np.array([0, 2]), np.array([1, 1]), num_rows=2)


def test_take_from_no_rows_at_all():
    assert as_lists(Ragged.empty(0).take(np.array([-1, -1]))) == [[], []]
