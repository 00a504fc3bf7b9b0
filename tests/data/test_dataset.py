"""A dataset has rows with ids alone, and tables of users and items that are unique and complete."""

import numpy as np
import pyarrow as pa
import pytest

from tests.data.reading import load, read_rows, write
from twotower.core.errors import ConfigError
from twotower.data.dataset import Dropped, collapse


def test_rows_without_ids_are_dropped_and_counted(tmp_path):
    path = write(tmp_path / "log.csv", 'user_id,item_id\nu,i\n,i\nu,\n"",j\n')
    data = load(interactions={"path": path})
    assert data.interactions.to_pylist() == [{"user_id": "u", "item_id": "i"}]
    assert data.dropped == (
        Dropped("without user_id", 2, 4),
        Dropped("without item_id", 1, 2),
    )
    with pytest.raises(ConfigError, match="none of 1 rows has both a user_id and an item_id"):
        read_rows(write(tmp_path / "none.csv", "user_id,item_id\n,i\n"))


def test_entities_are_unique_take_their_first_values_and_hold_every_id_of_the_log(tmp_path):
    log = write(tmp_path / "log.csv", "user_id,item_id\nu2,c\nu1,a\n")
    items = write(tmp_path / "items.csv", "item_id,title,price\na,,1\nb,B,2\na,A,9\n")
    data = load(interactions={"path": log}, item_table={"path": items})
    assert data.items.to_pylist() == [
        {"item_id": "a", "title": "A", "price": "1"},
        {"item_id": "b", "title": "B", "price": "2"},
        {"item_id": "c", "title": None, "price": None},
    ]
    assert data.users.to_pylist() == [{"user_id": "u2"}, {"user_id": "u1"}]
    assert data.has_catalogue
    assert not load(interactions={"path": log}).has_catalogue


def test_collapse_equals_a_loop():
    draw = np.random.default_rng(0)
    ids = draw.integers(0, 20, 200)
    values = [None if v < 3 else int(v) for v in draw.integers(0, 9, 200)]
    names = [str(number) for number in ids]
    expected: dict[str, int | None] = {}
    for name, value in zip(names, values):
        if expected.get(name) is None:
            expected[name] = value
    table = pa.table({"id": pa.chunked_array([names[:70], names[70:]]), "value": values})
    collapsed = collapse(table, "id")
    assert dict(zip(collapsed["id"].to_pylist(), collapsed["value"].to_pylist())) == expected
    assert collapsed["id"].to_pylist() == list(expected)
