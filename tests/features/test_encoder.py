"""The encoder: fitted on training rows alone, missing and unknown values in their place."""

from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from tests.features.encoder_shop import assert_same, encode_all, fitted, shop
from twotower.core.arrow import fingerprint
from twotower.core.errors import ConfigError
from twotower.features.inputs import Input


def test_inputs_and_tables_say_what_encode_yields():
    encoder = fitted()
    _, users, items = shop()
    assert encoder.context == ("clock", "page")
    for side, rows in (("user", users), ("item", items)):
        for name, array in encoder.encode(side, rows).items():
            read = encoder.inputs[side][name]
            if read.table:
                row_shape = (read.length,) if read.length else ()
                assert array.dtype == np.int32
                assert array.shape == (len(rows), *row_shape)
                assert array.min() >= 0 and array.max() < encoder.tables[read.table].rows
            else:
                assert array.dtype == np.float32
                assert array.shape == (len(rows), read.width)
    assert encoder.inputs["item"]["item_id"] == Input(
        table="item.item_id", oov_rate=0.1, oov_rows=8
    )
    assert encoder.inputs["item"]["price"] == Input(width=2, projection=5)
    inputs = [*encoder.inputs["user"].values(), *encoder.inputs["item"].values()]
    assert set(encoder.tables) == {read.table for read in inputs if read.table}


def test_a_value_counts_once_for_each_training_row_of_its_item():
    train, _, items = shop()
    encoder = fitted()
    genres_of = dict(zip(items["item_id"].to_pylist(), items["genres"].to_pylist(), strict=True))
    counts = Counter()
    for item in train["item_id"].to_pylist():
        counts.update((genres_of[item] or "").split("|"))
    del counts[""]
    expected = sorted(counts, key=lambda genre: (-counts[genre], genre))
    assert encoder.fitted["item", "genres"].vocabulary.values.to_pylist() == expected


def test_features_of_one_table_share_one_vocabulary():
    encoder = fitted()
    acme = pa.table({"brand": ["acme"], "tags": [["acme"]]})
    ids = encoder.encode("item", acme, ["brand", "tags"])
    assert ids["brand"][0] == ids["tags"][0, 0] > 8
    vocabulary = encoder.fitted["item", "brand"].vocabulary
    assert vocabulary is encoder.fitted["item", "tags"].vocabulary
    assert set(vocabulary.values.to_pylist()) >= {"acme", "umbrella", "new", "sale"}
    assert encoder.inputs["item"]["brand"].table == encoder.inputs["item"]["tags"].table == "tags"


def test_fit_depends_on_training_rows_alone():
    """Whatever is changed of users and items without a training row changes nothing."""
    train, users, items = shop()
    encoder = fitted()
    other_users = users.filter(pc.is_in(users["user_id"], train["user_id"]))
    other_items = items.filter(pc.is_in(items["item_id"], train["item_id"]))
    assert len(other_users) < len(users) and len(other_items) < len(items)
    stranger = {"item_id": "new", "genres": "horror", "tags": ["x"], "brand": "x", "title": "x"}
    stranger |= {"stock": 10**9, "price": 1e9, "listed": 10**12}
    other_items = pa.concat_tables(
        [pa.Table.from_pylist([stranger], schema=items.schema), other_items]
    )
    again = fitted(tables=(train, other_users, other_items))
    assert again.fitted_on == encoder.fitted_on == fingerprint(train)
    assert_same(encode_all(again, shop()), encode_all(encoder, shop()))


def test_fit_sees_the_training_rows():
    """The test above could not fail if fitting ignored everything."""
    train, users, items = shop()
    encoder = fitted()
    less = fitted(tables=(train.slice(0, 50), users, items))
    user_id, price = ("user", "user_id"), ("item", "price")
    assert less.fitted_on != encoder.fitted_on
    assert less.fitted[user_id].vocabulary.size < encoder.fitted[user_id].vocabulary.size
    assert less.fitted[price].statistics != encoder.fitted[price].statistics


def test_the_order_of_rows_changes_no_encoding():
    tables = shop()
    rng = np.random.default_rng(3)
    shuffled = [table.take(pa.array(rng.permutation(len(table)))) for table in tables]
    assert_same(encode_all(fitted(tables=shuffled), tables), encode_all(fitted(), tables))


def test_slices_encode_as_the_whole():
    encoder = fitted()
    _, _, items = shop(items=200)
    whole = encoder.encode("item", items)
    parts = [encoder.encode("item", items.slice(low, 7)) for low in range(0, len(items), 7)]
    assert_same({name: np.concatenate([part[name] for part in parts]) for name in whole}, whole)


def test_a_column_that_is_lacking_is_missing_everywhere():
    encoder = fitted()
    _, users, items = shop()
    for side, table in (("user", users), ("item", items)):
        ids = table.select([f"{side}_id"])
        columns = {feature.column for feature in encoder.spec.side(side).values()}
        with_nulls = ids
        for column in columns - {f"{side}_id"}:
            with_nulls = with_nulls.append_column(column, pa.nulls(len(table)))
        assert_same(encoder.encode(side, ids), encoder.encode(side, with_nulls))
    nothing = encoder.encode("item", pa.table({"other": ["x", "y"]}))
    assert nothing["item_id"].tolist() == [0, 0] and nothing["genres"].tolist() == [[0, 0, 0]] * 2
    assert nothing["price"].tolist() == [[0, 1]] * 2 and nothing["listed"].tolist() == [[1, 0]] * 2
    assert nothing["title"].tolist() == [[0] * 12] * 2
    assert encoder.encode("user", pa.table({"other": ["x"]}))["age"].tolist() == [1]


def test_unknown_ids_land_on_all_oov_rows_and_on_no_other():
    strangers = pa.table({"user_id": [f"stranger{n}" for n in range(300)]})
    rows = fitted().encode("user", strangers, ["user_id"])["user_id"]
    assert set(rows.tolist()) == {1, 2, 3}


def test_lists_and_delimited_text_are_one():
    encoder = fitted()
    text = pa.table({"genres": ["war|drama", " war |", "", None, "a|b|c|d", "drama"]})
    lists = pa.table(
        {
            "genres": [
                ["war", "drama"],
                ["war", None, " "],
                [],
                None,
                ["a", "b", "c", "d"],
                ["drama"],
            ]
        }
    )
    ids = encoder.encode("item", text, ["genres"])["genres"]
    np.testing.assert_array_equal(ids, encoder.encode("item", lists, ["genres"])["genres"])
    assert (ids > 0).sum(axis=1).tolist() == [2, 1, 0, 0, 3, 1]
    assert ids[0, 1] == ids[5, 0] and ids[0, 0] == ids[1, 0]


def test_text_without_a_separator_is_refused():
    train, users, items = shop()
    with pytest.raises(
        ValueError,
        match=r"features.item.title: column 'title' holds string, not lists; name the separator",
    ):
        fitted({"item": {"title": {"type": "strings"}}})


def test_a_missing_column_names_its_nearest():
    with pytest.raises(
        ConfigError,
        match=r"features.item.gender reads column 'gender'; the items.*did you mean 'genres'\?",
    ):
        fitted({"item": {"gender": {"type": "string"}}})
    with pytest.raises(
        ConfigError, match=r"features.user.at reads column 'timestmp'.*did you mean 'timestamp'\?"
    ):
        fitted({"user": {"at": {"type": "timestamp", "column": "timestmp"}}})
    with pytest.raises(ConfigError, match=r"features.item.page reads column 'page'"):
        fitted({"item": {"page": {"type": "string"}}})


def test_what_is_to_be_predicted_is_no_context():
    with pytest.raises(
        ConfigError,
        match="features.user.item_id reads column 'item_id' of the interactions, which the model",
    ):
        fitted({"user": {"item_id": {"type": "string"}}})


def test_a_column_of_another_type_names_the_feature():
    for kind in ("string", "text", "float", "timestamp", "int"):
        with pytest.raises(ValueError, match="features.item.tags: .*list"):
            fitted({"item": {"tags": {"type": kind}}}).encode("item", shop()[2])


def test_tables_that_do_not_fit_the_log_are_refused():
    train, users, items = shop()
    with pytest.raises(
        ValueError, match="The users table has 1 ids more than once, the first 'u0'"
    ):
        fitted(tables=(train, pa.concat_tables([users, users.slice(0, 1)]), items))
    with pytest.raises(
        ValueError, match="Training rows have a item_id that the items table lacks, the first 'i"
    ):
        fitted(tables=(train, users, items.slice(25)))
    with pytest.raises(
        ValueError, match="The items table must have a column 'item_id'; columns: genres"
    ):
        fitted(tables=(train, users, items.select(["genres"])))


def test_an_unknown_feature_names_its_nearest():
    with pytest.raises(
        ConfigError,
        match=r"The encoder of the item tower has no field 'genre'; did you mean 'genres'\?",
    ):
        fitted().encode("item", shop()[2], ["genre"])


def test_no_rows_encode_to_no_rows():
    encoder = fitted()
    _, users, items = shop()
    for side, table in (("user", users), ("item", items)):
        arrays = encoder.encode(side, table)
        for name, array in encoder.encode(side, table.slice(0, 0)).items():
            assert array.shape == (0, *arrays[name].shape[1:]), name
