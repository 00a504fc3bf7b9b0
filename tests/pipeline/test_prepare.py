"""From a configuration to arrays: no leaking split is fitted on, every column of a row arrives."""

import numpy as np
import pytest

from twotower.config import from_dict
from twotower.core.errors import ConfigError, LeakageError
from twotower.pipeline.prepare import prepare

HEADER = "user_id,item_id,timestamp,weight\n"
LOG = HEADER + "".join(f"u{n % 7},i{n % 5},{n},{n % 3}.5\n" for n in range(100))
RANDOM = {"kind": "random", "accept_leakage": ("random_split", "repeated_pairs", "identical_rows")}


def make_config(tmp_path, text=LOG, **sections):
    path = tmp_path / "log.csv"
    path.write_text(text)
    data = {
        "source": "csv",
        "interactions": {"path": str(path)},
        "accept": ("old_times",),
    }
    return from_dict({"data": data, **sections})


def test_rows_name_their_user_and_item_with_their_weights_and_times(tmp_path):
    prepared = prepare(make_config(tmp_path))
    users = prepared.users["user_id"].to_pylist()
    items = prepared.items["item_id"].to_pylist()
    train = prepared.train
    pairs = [(users[user], items[item]) for user, item in zip(train.user, train.item)]
    assert pairs == [(f"u{n % 7}", f"i{n % 5}") for n in range(80)]
    np.testing.assert_array_equal(train.weight, np.float32([n % 3 + 0.5 for n in range(80)]))
    np.testing.assert_array_equal(prepared.test.timestamp, np.arange(90, 100))


def test_a_split_that_leaks_is_refused_before_anything_is_fitted(tmp_path):
    def fit(*args, **kwargs):
        pytest.fail("an encoder was fitted")

    with pytest.raises(LeakageError, match="random_split"):
        prepare(make_config(tmp_path, split={"kind": "random"}), fit=fit)


def test_items_that_only_later_rows_have_are_not_in_the_corpus_without_a_catalogue(tmp_path):
    prepared = prepare(make_config(tmp_path, LOG + "u1,new,200,1\n"))
    assert "new" not in prepared.items["item_id"].to_pylist()
    assert prepared.test.item[-1] == -1


def test_rows_partly_without_times_are_refused(tmp_path):
    text = LOG.replace("u3,i3,3,", "u3,i3,,")
    with pytest.raises(ConfigError, match="no timestamp"):
        prepare(make_config(tmp_path, text, split=RANDOM))


@pytest.mark.parametrize(
    "weight, message",
    [
        ("-1", "line 2, column 'weight': '-1' is not at least 0"),
        ("0", "weight is 0 in every training row"),
    ],
)
def test_weights_that_teach_nothing_are_refused(tmp_path, weight, message):
    rows = [line.rsplit(",", 1)[0] for line in LOG.splitlines()[1:]]
    text = HEADER + "".join(f"{row},{weight}\n" for row in rows)
    with pytest.raises(ConfigError, match=message):
        prepare(make_config(tmp_path, text))
