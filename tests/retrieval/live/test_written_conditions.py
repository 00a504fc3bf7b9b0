"""Conditions as they are written on a command line."""

import pyarrow as pa
import pytest

from twotower.core.errors import ConfigError
from twotower.retrieval.live.conditions import as_conditions, matching_items, parse_condition

ITEMS = pa.table(
    {
        "item_id": ["1", "2", "3"],
        "price": [5.0, 20.0, None],
        "year": [1999, 2001, 2001],
        "category": ["lamp", "clock", "floor lamp"],
        "brand": pa.array(["Smith, Sons", "in", None]).dictionary_encode(),
        "new": [True, False, None],
    }
)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("price <= 20", {"1", "2"}),
        ("price<20", {"1"}),
        ("year = 2001", {"2", "3"}),
        ("year=1999,2001", {"1", "2", "3"}),
        ("year != 2001", {"1"}),
        ("category = lamp", {"1"}),
        ("category == 'floor lamp'", {"3"}),
        ("category=lamp, clock", {"1", "2"}),
        ("category in (lamp, clock)", {"1", "2"}),
        ("category in lamp", {"1"}),
        ("category not in lamp", {"2", "3"}),
        ("category != lamp,clock", {"3"}),
        ("category starts with floor", {"3"}),
        ("category not  starts with floor", {"1", "2"}),
        ("brand=Smith, Sons", {"1"}),
        ("brand='Smith, Sons'", {"1"}),
        ("brand=in", {"2"}),
        ("new=true", {"1"}),
        ("new=false", {"2"}),
        ("item_id=2", {"2"}),
    ],
)
def test_a_written_condition_keeps_the_items_that_it_says(text, expected):
    conditions = as_conditions([parse_condition(text, ITEMS)])
    kept = ITEMS.filter(pa.array(matching_items(ITEMS, conditions)))
    assert set(kept["item_id"].to_pylist()) == expected


@pytest.mark.parametrize(
    "text, message",
    [
        ("price", "must be a column, an operator and a value"),
        ("pric <= 3", "have no column 'pric'; did you mean 'price'?"),
        ("category = lmap", "no item has 'lmap' in column 'category'. The nearest that there are:"),
        ("category = lmap", "are: lamp, floor lamp, clock."),
        ("year = 2000", "are: 1999, 2001."),
        ("price <= cheap", "the column holds numbers, and 'cheap' is none"),
        ("price <= 3,4", "'<=' compares with one value"),
        ("new=maybe", "holds true or false, and 'maybe' is neither"),
    ],
)
def test_what_cannot_be_a_condition_says_why(text, message):
    with pytest.raises(ConfigError) as refused:
        parse_condition(text, ITEMS)
    assert message in str(refused.value)
