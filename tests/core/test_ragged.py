"""Csr against lists of lists."""

import numpy as np
import pytest

from twotower.core.ragged import Ragged


@pytest.fixture
def lists():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 6, size=n).tolist() for n in (3, 0, 7, 1, 0)]


@pytest.fixture
def csr(lists):
    pairs = [(row, value) for row, values in enumerate(lists) for value in values]
    # Rows interleaved, each keeping its own order: from_pairs must be stable.
    pairs = sorted(enumerate(pairs), key=lambda p: (p[0] % 3, p[0]))
    regrouped = [[v for _, (r, v) in pairs if r == row] for row in range(len(lists))]
    lists[:] = regrouped
    rows, values = zip(*[pair for _, pair in pairs])
    return Ragged.from_pairs(np.array(rows), np.array(values), num_rows=len(lists))


def as_lists(csr):
    return [row.tolist() for row in csr]


def test_from_pairs_groups_and_keeps_order(csr, lists):
    assert as_lists(csr) == lists


def test_take_repeats_reorders_and_gives_nothing_for_minus_one(csr, lists):
    rows = [2, 2, -1, 0, 4]
    assert as_lists(csr.take(np.array(rows))) == [lists[r] if r >= 0 else [] for r in rows]


@pytest.mark.parametrize("keep", ["first", "last"])
def test_distinct_keeps_one_of_each(csr, lists, keep):
    def oracle(values):
        if keep == "first":
            return list(dict.fromkeys(values))
        return list(dict.fromkeys(values[::-1]))[::-1]

    assert as_lists(csr.distinct(keep=keep)) == [oracle(values) for values in lists]


def test_contains_equals_in(csr, lists):
    values = np.arange(-1, 7)[None].repeat(5, axis=0)
    expected = [[value in row for value in range(-1, 7)] for row in lists]
    assert csr.contains(np.arange(5)[:, None], values).tolist() == expected


def test_a_row_out_of_range_is_refused():
    with pytest.raises(ValueError, match=r"\[0, 2\)"):
        Ragged.from_pairs(np.array([0, 2]), np.array([1, 1]), num_rows=2)


def test_take_from_no_rows_at_all():
    assert as_lists(Ragged.empty(0).take(np.array([-1, -1]))) == [[], []]
