"""Numbers: buckets and normalisation against a plain reading of the definition."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from tests.features.encoder_shop import assert_same, fitted, shop, training_column
from twotower.core.errors import ConfigError
from twotower.features.fit import fit_encoder
from twotower.features.numeric import FloatFeature, IntFeature
from twotower.features.spec import from_mappings


def test_buckets_are_quantiles_of_the_training_users():
    train, users, _ = shop(users=400, rows=4000)
    encoder = fitted(tables=shop(users=400, rows=4000))
    ages = users.filter(pc.is_in(users["user_id"], train["user_id"]))
    ids = encoder.encode("user", ages, ["age"])["age"]
    missing = ages["age"].is_null().to_numpy()
    assert (ids[missing] == 1).all() and ids[~missing].min() == 2
    assert np.bincount(ids[~missing])[2:].min() > 0.2 * (~missing).sum()
    boundaries = encoder.fitted["user", "age"].statistics["boundaries"]
    values = ages["age"].drop_null().to_numpy()
    assert ids[~missing].tolist() == [2 + sum(b <= v for b in boundaries) for v in values]


def test_no_bucket_is_left_without_a_training_value():
    feature = IntFeature(side="item", name="stock", buckets=8)
    for data, buckets in (
        ([0] * 90 + [*range(1, 11)], 2),
        ([*range(80)], 8),
        ([1, 2] * 9, 2),
        ([5, 5], 1),
        ([None], 1),
    ):
        values = pa.chunked_array([pa.array(data, pa.int64())])
        state = feature.fit(training_column(feature, values))
        rows = feature.encode(state, values.drop_null())
        assert len(state.statistics["boundaries"]) == buckets - 1
        assert not len(rows) or set(rows.tolist()) == set(range(2, 2 + buckets))


def test_statistics_do_not_depend_on_the_order_of_rows_to_the_last_bit():
    values = np.random.default_rng(0).lognormal(3, 3, 1001)
    feature = FloatFeature(side="item", name="price")
    orders = [np.random.default_rng(seed).permutation(len(values)) for seed in range(10)]
    fits = [
        feature.fit(training_column(feature, pa.chunked_array([values[order]]))).statistics
        for order in orders
    ]
    assert all(statistics == fits[0] for statistics in fits)


def test_given_boundaries_are_taken():
    encoder = fitted({"user": {"age": {"type": "int", "boundaries": [18, 65]}}})
    ids = encoder.encode("user", pa.table({"age": [17, 18, 64, 65, None, -1]}))["age"]
    assert ids.tolist() == [2, 3, 3, 4, 1, 2] and encoder.tables["user.age"].rows == 5


@pytest.mark.parametrize("log", [True, False])
def test_floats_are_normalised_over_training_items(log):
    train, _, items = shop()
    encoder = fitted({"item": {"price": {"type": "float", "log": log}}})
    trained = items.filter(pc.is_in(items["item_id"], train["item_id"]))
    prices = trained["price"].drop_null().to_numpy()
    scaled = np.log1p(prices) if log else prices
    expected = (scaled - scaled.mean()) / scaled.std()
    values = encoder.encode("item", pa.table({"price": prices}))["price"]
    np.testing.assert_allclose(values[:, 0], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("log", [True, False])
def test_floats_that_are_no_numbers_are_missing(log):
    encoder = fitted({"item": {"price": {"type": "float", "log": log}}})
    prices = pa.table({"price": [None, float("nan"), float("inf"), -3.0]})
    values = encoder.encode("item", prices)["price"]
    assert values[:3].tolist() == [[0, 1]] * 3
    assert values[3, 1] == 0 and np.isfinite(values).all()


def test_constant_and_absent_numbers_are_finite():
    train, users, items = shop()
    ids = items.select(["item_id"])
    constant = ids.append_column("price", pa.array([2.5] * len(items)))
    absent = ids.append_column("price", pa.nulls(len(items), pa.float64()))
    spec = {"item": {"price": {"type": "float"}, "level": {"type": "int", "column": "price"}}}
    for table in (constant, absent):
        encoder = fitted(spec, (train, users, table))
        arrays = encoder.encode("item", pa.table({"price": [2.5, 3.5]}))
        assert np.isfinite(arrays["price"]).all()
        assert arrays["level"].max() < encoder.tables["item.level"].rows


def test_numbers_written_as_text_are_read_and_others_named():
    encoder = fitted({"item": {"price": {"type": "float"}}})
    number = encoder.encode("item", pa.table({"price": [3.5, None, None]}))
    assert_same(encoder.encode("item", pa.table({"price": [" 3.5", "", None]})), number)
    with pytest.raises(ValueError, match="features.item.price: 'cheap' in row 2 is not a number"):
        encoder.encode("item", pa.table({"price": ["3.5", "cheap"]}))
    with pytest.raises(ValueError, match="features.item.price: a column of type list"):
        encoder.encode("item", pa.table({"price": [[1.0]]}))


def test_a_value_of_the_wrong_type_is_named_with_its_row_in_the_table():
    train, users, items = shop()
    # Rows of the items of training are not rows of the table.
    unseen = train.filter(pc.not_equal(train["item_id"], items["item_id"][0]))
    kinds = (
        ("float", "3.5", "a number"),
        ("int", "3", "a number"),
        ("timestamp", "2020-01-01", "a time"),
    )
    for kind, good, right in kinds:
        values = pa.array([good] * (len(items) - 1) + ["cheap"])
        texts = items.set_column(items.column_names.index("price"), "price", values)
        spec = from_mappings({"item": {"price": {"type": kind}}})
        with pytest.raises(
            ConfigError, match=f"features.item.price: 'cheap' in row {len(items)} is not {right}"
        ):
            fit_encoder(spec, unseen, users=users, items=texts)
