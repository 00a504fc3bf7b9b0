"""Further rows of a log: read in the forms of the run's own, put behind its own rows."""

import pandas as pd
import pytest

from twotower import refitting
from twotower.config import from_dict
from twotower.core.errors import ConfigError
from twotower.fitting import Columns
from twotower.pipeline.prepare import prepare

LOG = "user_id,item_id,timestamp\n" + "".join(
    f"{n % 7:03},{n % 5},{1_700_000_000 + n}\n" for n in range(100)
)
ITEMS = "item_id;price;title\n" + "".join(f"{n};{n},5;lamp {n}\n" for n in range(5))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A log whose user ids have leading zeros, and items whose prices have a decimal comma."""
    folder = tmp_path_factory.mktemp("log")
    (folder / "log.csv").write_text(LOG)
    (folder / "items.csv").write_text(ITEMS)
    items = {"path": str(folder / "items.csv"), "delimiter": ";", "decimal": ","}
    values = {
        "data": {
            "source": "csv",
            "interactions": {"path": str(folder / "log.csv")},
            "item_table": items,
        },
        "features": {"item": {"item_id": {"type": "string"}, "price": {"type": "float"}}},
    }
    return prepare(from_dict(values))


def read(prepared, rows, **tables):
    tables = {"items": None, "users": None} | tables
    return refitting.read_further_rows(prepared, rows, columns=Columns(), **tables)


def test_further_rows_stand_behind_those_of_the_run(prepared):
    day = pd.DataFrame({"user_id": ["001", "008"], "item_id": [4, 7]})
    day["timestamp"] = [1_700_000_200, 1_700_000_300]
    dataset, said = read(prepared, day)
    assert "interactions: 2 rows" in said[0]
    log = dataset.interactions
    assert log["user_id"].to_pylist()[:100] == [f"{n % 7:03}" for n in range(100)]
    assert log["user_id"].to_pylist()[100:] == ["001", "008"]
    assert log["item_id"].to_pylist()[100:] == ["4", "7"]
    # Ids are in the form of the run's log: items are numbers there, users are text.
    day["item_id"] = ["4.0", "7"]
    day["user_id"] = ["1.0", "8"]
    again = read(prepared, day)[0].interactions
    assert again["item_id"].to_pylist()[100:] == ["4", "7"]
    assert again["user_id"].to_pylist()[100:] == ["1.0", "8"]
    # New items are in the corpus, and nothing is known of them.
    prices = dict(zip(dataset.items["item_id"].to_pylist(), dataset.items["price"].to_pylist()))
    assert prices == {"0": 0.5, "1": 1.5, "2": 2.5, "3": 3.5, "4": 4.5, "7": None}


def test_new_tables_say_what_is_so_now(prepared, tmp_path):
    day = pd.DataFrame({"user_id": ["001"], "item_id": [7], "timestamp": [1_700_000_200]})
    (tmp_path / "items.csv").write_text("item_id;price;colour\n7;7,25;red\n2;9,0;\n")
    items = read(prepared, day, items=str(tmp_path / "items.csv"))[0].items
    rows = {row["item_id"]: row for row in items.to_pylist()}
    assert rows["7"] == {"item_id": "7", "price": 7.25, "colour": "red", "title": None}
    assert rows["2"]["price"] == 9.0 and rows["2"]["title"] == "lamp 2"
    assert rows["3"]["price"] == 3.5


def test_a_column_of_another_type_is_refused(prepared):
    day = pd.DataFrame({"user_id": ["001"], "item_id": [7], "timestamp": [1_700_000_200]})
    items = pd.DataFrame({"item_id": [7], "title": [[1, 2]]})
    with pytest.raises(ConfigError, match="another type"):
        read(prepared, day, items=items)
