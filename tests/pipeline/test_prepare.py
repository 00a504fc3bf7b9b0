"""From a configuration to arrays: nothing is fitted on a split that leaks, every column of a row
arrives."""

import numpy as np
import pytest

from twotower.config import from_dict
from twotower.core.errors import ConfigError, LeakageError
from twotower.pipeline.prepare import prepare

LOG = "user_id,item_id,timestamp,weight\n" + "".join(
    f"u{n % 7},i{n % 5},{n},{n % 3}.5\n" for n in range(100)
)
RANDOM = {"kind": "random", "accept_leakage": ("random_split", "repeated_pairs", "identical_rows")}


def _config(tmp_path, text=LOG, **sections):
    (tmp_path / "log.csv").write_text(text)
    data = {"source": "csv", "interactions": {"path": str(tmp_path / "log.csv")}}
    return from_dict({"data": data, **sections})


def test_rows_are_places_in_the_tables_with_their_weights_and_times(tmp_path):
    prepared = prepare(_config(tmp_path))
    users, items = prepared.users["user_id"].to_pylist(), prepared.items["item_id"].to_pylist()
    assert [(users[u], items[i]) for u, i in zip(prepared.train.user, prepared.train.item)] == [
        (f"u{n % 7}", f"i{n % 5}") for n in range(80)
    ]
    np.testing.assert_array_equal(
        prepared.train.weight, np.float32([n % 3 + 0.5 for n in range(80)])
    )
    np.testing.assert_array_equal(prepared.test.timestamp, np.arange(90, 100))


def test_a_split_that_leaks_is_refused_before_anything_is_fitted(tmp_path):
    with pytest.raises(LeakageError, match="random_split"):
        prepare(_config(tmp_path, split={"kind": "random"}))


def test_items_that_only_later_rows_have_are_not_in_the_corpus_without_a_catalogue(tmp_path):
    prepared = prepare(_config(tmp_path, LOG + "u1,new,200,1\n"))
    assert "new" not in prepared.items["item_id"].to_pylist() and prepared.test.item[-1] == -1


def test_rows_partly_without_times_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="no timestamp"):
        prepare(_config(tmp_path, LOG.replace("u3,i3,3,", "u3,i3,,"), split=RANDOM))


@pytest.mark.parametrize(
    "weight,message",
    [
        ("-1", "row 1 .*column 'weight': '-1' is not at least 0"),
        ("0", "weight is 0 in every training row"),
    ],
)
def test_weights_that_teach_nothing_are_refused(tmp_path, weight, message):
    text = "\n".join(",".join([*line.split(",")[:3], weight]) for line in LOG.splitlines()[1:])
    with pytest.raises(ConfigError, match=message):
        prepare(_config(tmp_path, "user_id,item_id,timestamp,weight\n" + text + "\n"))
