"""What is asked of a model on one's own data, of vectors and lists that are known."""

from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest

from twotower.evaluation.audits import sanity

# Ten kinds of ten items: those of a kind share two of their three words.
KINDS = np.repeat(np.arange(10), 10)
TITLES = [f"kind{kind} lamp{kind} n{row}" for row, kind in enumerate(KINDS)]


def test_vectors_by_title_are_told_from_vectors_by_chance():
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(100, 16))
    by_title = sanity.compare_titles(np.eye(16)[KINDS] + 0.1 * noise, TITLES)
    assert by_title["auc"] == 1.0 and by_title["pairs"] == 100
    for one, nearest, _ in by_title["examples"]:
        assert one.split()[0] == nearest.split()[0]
    by_chance = sanity.compare_titles(noise, TITLES)
    low, high = by_chance["interval"]
    assert low < 0.5 < high and by_chance["auc"] == pytest.approx(0.5, abs=0.2)
    none = sanity.compare_titles(noise, [f"word{row}" for row in range(100)])
    assert none["pairs"] == 0 and "auc" not in none


class ListsOfCategory:
    """Lists the items of the category of the last event, or the first items of all."""

    def __init__(self, knows_category):
        self.knows_category = knows_category

    def recommend(self, *, events, k):
        listed = range(100)
        if self.knows_category:
            listed = np.flatnonzero(KINDS == KINDS[int(events[-1])])
        return [SimpleNamespace(item_id=str(row)) for row in listed][:k]


@pytest.mark.parametrize("knows_category, share", [(True, 1.0), (False, 0.1)])
def test_somebody_of_one_category_gets_it_or_does_not(knows_category, share):
    items = pa.table({"item_id": list(map(str, range(100))), "kind": [f"k{k}" for k in KINDS]})
    found = sanity.ask_categories(ListsOfCategory(knows_category), items, "kind", TITLES)
    assert found["share"] == pytest.approx(share) and found["chance"] == pytest.approx(0.1)
    assert found["categories"] == 10 and len(found["examples"]) == 3
    text = sanity.format_sanity(
        {"categories": {"column": "kind", **found}, "cannot": ["No title."]}
    )
    assert f"{share:.1%} of the places" in text and text.endswith("No title.")
